"""The settings of a run, as in its YAML file: a model, SAEs, activations and a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .strict_yaml import REST


@dataclass(frozen=True)
class ModelSettings:
    """The causal LM whose activations the SAEs are trained on.

    Attributes:
        name: Hub id, or folder.
        revision: branch, tag or commit; the commit that it resolves to is recorded.
        dtype: of its weights, such as bfloat16; auto is that of the checkpoint, or float32 where that is faster and
            loses nothing, as on many CPUs.
        device: where it runs, such as cuda:1; by default with the SAE.
        device_map: how to spread it over several devices, as in transformers, such as auto.
        hub_id: for a model in a folder, its Hub id, which cards state; the word none if it has no such id.
        quantization: as in transformers, such as {quant_method: bitsandbytes, load_in_8bit: true}.
    """

    name: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | dict[str, Any] | None = None
    hub_id: str | None = None
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True)
class SAESettings:
    """One SAE. Other fields of its architecture's configuration, such as k, are given beside these.

    Attributes:
        architecture: such as gated, standard, jumprelu, topk, batch_topk.
        site: where it reads, such as resid_post.12.
        site_out: for a transcoder, where it writes.
        d_sae: number of latents.
        expansion_factor: number of latents as a multiple of the width of the site, instead of d_sae.
        sparsity_coefficient: lambda, in units of a squared error summed over the width.
        objective: variants of the architecture's objective, such as {frozen_decoder: false}.
        dtype: of its weights.
        settings: the other fields of its configuration, by name.
    """

    architecture: str = "gated"
    site: str | None = None
    site_out: str | None = None
    d_sae: int | None = None
    expansion_factor: float | None = None
    sparsity_coefficient: float | None = None
    objective: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict, metadata=REST)


@dataclass(frozen=True)
class DataSettings:
    """Where activations come from: a data set of the Hub, files, or a folder of shards; exactly one of them.

    Attributes:
        dataset: Hub id of a data set.
        config: its configuration.
        split: its split.
        revision: branch, tag or commit of it; the commit that it resolves to is recorded.
        streaming: stream a data set, rather than download it first.
        files: a file or folder of .txt, JSON (lines), Parquet, CSV or Arrow; or a list of paths and patterns, of one
            such kind or of plain text with any file names.
        shards: folder that save_activations() wrote.
        text_column: column with the text; by default text, else the only column of strings.
        documents: what one document of plain text is: file, paragraph or line.
        context_length: tokens per sequence; by default the model's maximum, at most 1024.
        packing: fill every sequence with as many documents as fit, rather than one each.
        bos: what a BOS token precedes: document, sequence or none; by default sequence, if the tokenizer has one.
        eos: whether an EOS token follows each document; by default between packed documents that no BOS separates.
        special_tokens: also train on the activations of special tokens.
        sequences_per_batch: sequences per forward of the model; by default at most 32, fewer in a short run.
        buffer_size: activations held for shuffling; by default a tenth of the run, at most a million.
        save_buffer: store them in checkpoints, so that a resumed run continues bit for bit.
        held_out: other text that the SAEs are measured on during training, a file, folder or data set's Hub id; by
            default the first sequences of the data, which are then not trained on.
        held_out_tokens: number of its tokens; by default 0.5 % of the run, from 1,024 to 16,384. 0 measures nothing.
    """

    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    files: str | list[str] | None = None
    shards: str | None = None
    text_column: str | None = None
    documents: Literal["file", "paragraph", "line"] = "file"
    context_length: int | None = None
    packing: bool = True
    bos: Literal["document", "sequence", "none"] | None = None
    eos: bool | None = None
    special_tokens: bool = False
    sequences_per_batch: int | None = None
    buffer_size: int | None = None
    save_buffer: bool = True
    held_out: str | None = None
    held_out_tokens: int | None = None

    @property
    def name(self) -> str:
        """Name of the data: Hub id, folder of shards, or files."""
        files = [self.files] if isinstance(self.files, str) else self.files or []
        return self.dataset or self.shards or ", ".join(files)


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
        output_dir: folder for checkpoints, the trained SAEs and run.yaml.
        model: the causal LM.
        data: where activations come from.
        sae: the SAE; with saes, the settings that they have in common.
        saes: several SAEs by name, trained on the same activations; each a section like sae.
        preset: a recipe, which all other settings override; see --presets.
        training: any field of SAETrainingArguments.
        license: licence of the SAEs, for their cards, such as apache-2.0; other requires the next two settings.
        license_name: name of a licence that is not in the Hub's list.
        license_link: LICENSE for a file beside the card, or a URL.
        seed: seed of the initial weights, the shuffling and the resampling.
    """

    output_dir: str
    data: DataSettings
    model: ModelSettings | None = None
    sae: SAESettings = field(default_factory=SAESettings)
    saes: dict[str, SAESettings] = field(default_factory=dict)
    preset: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    seed: int = 0

    @property
    def named(self) -> dict[str, SAESettings]:
        """The SAEs by name; the only one of a run without `saes` has the empty name."""
        return self.saes or {"": self.sae}
