"""What a run is: a model, SAEs, activations and a recipe, as they stand in a YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .strict_yaml import REST


@dataclass(frozen=True)
class ModelSettings:
    """The causal LM whose activations are learned.

    Attributes:
        name: Hub id, or folder.
        revision: branch, tag or commit; the commit that it leads to is recorded.
        dtype: of its weights, such as bfloat16; auto is that of the checkpoint, or float32 where that is faster and
            loses nothing, as on many CPUs.
        device: where it runs, such as cuda:1; by default with the SAE.
        device_map: spreads it over several devices, as in transformers, such as auto.
        hub_id: of a model in a folder, the id under which others find it, which cards name; none if it has no such id.
        quantization: as transformers takes it, such as {quant_method: bitsandbytes, load_in_8bit: true}.
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
    """One SAE; any field of its architecture's configuration, such as k, stands beside these.

    Attributes:
        architecture: such as gated, standard, jumprelu, topk, batch_topk.
        site: where it reads, such as resid_post.12.
        site_out: for a transcoder, where it writes.
        d_sae: number of latents.
        expansion_factor: the same as a multiple of the width of the site.
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
        revision: branch, tag or commit of it; the commit that it leads to is recorded.
        streaming: read a data set as it comes, rather than download it first.
        files: a file or folder of .txt, JSON (lines), Parquet, CSV or Arrow; or a list of paths and patterns, of one
            such kind or of plain text, whatever it is called.
        shards: folder that save_activations() wrote.
        text_column: column with the text; by default text, else the only one of strings.
        documents: of plain text, what is one document, file, paragraph or line.
        context_length: tokens per sequence; by default what the model takes, at most 1024.
        packing: fill every sequence with as many documents as fit, rather than one each.
        bos: where a BOS token stands, before each document, before each sequence, or none; by default sequence, if the
            tokenizer has one.
        eos: whether an EOS token follows each document; by default between packed ones that no BOS separates.
        special_tokens: learn the activations of special tokens, too.
        sequences_per_batch: sequences per forward of the model; by default at most 32, fewer in a short run.
        buffer_size: activations held for shuffling; by default a tenth of the run, at most a million.
        save_buffer: keep them in checkpoints, so that a resumed run goes on bit by bit.
        held_out: other text that the SAEs are measured on while they learn, a file, folder or data set's Hub id; by
            default the first sequences of the data, which are not learned.
        held_out_tokens: tokens of it; by default 0.5 % of the run, from 1,024 to 16,384. 0 measures nothing.
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
        """What it is called."""
        files = [self.files] if isinstance(self.files, str) else self.files or []
        return self.dataset or self.shards or ", ".join(files)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
        output_dir: folder for checkpoints, the trained SAEs and run.yaml.
        model: the causal LM.
        data: where activations come from.
        sae: the SAE; with saes, what they have in common.
        saes: several SAEs by name, trained on the same activations; each a section like sae.
        preset: a recipe that everything given here is laid over; see --presets.
        training: any field of SAETrainingArguments.
        license: of the trained SAEs, for their cards, such as apache-2.0; other needs the next two.
        license_name: what a licence is called that the Hub's list does not have.
        license_link: where it is, LICENSE for a file beside the card, or an address.
        seed: of the initial weights, the shuffling and the resampling.
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
        """The SAEs by name; the only one of a run without `saes` is named by an empty text."""
        return self.saes or {"": self.sae}
