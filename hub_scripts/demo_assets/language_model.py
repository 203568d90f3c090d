"""The demo's language model: a Llama of about a million parameters, trained on the Python standard library.

Everything here is deterministic for a given corpus, seed, PyTorch and number of threads.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_gated_sae.demo import bundled
from hf_gated_sae.errors import InputError

END_OF_TEXT = "<|endoftext|>"
ASSETS = bundled.MODEL

# Pre-tokens separate what the concepts distinguish: a line break with the indentation after it, a quote, a hash, a
# word, a number, a run of operators. Almost every token therefore has one clear label.
PRE_TOKEN = r"""\n+ *| ?["']+| ?#+| ?[^\W\d]\w*| ?\d+| ?[^\s\w"'#]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class LanguageModelRecipe:
    """The settings that determine the trained weights, apart from the corpus.

    Args:
        vocab_size: tokens, `<|endoftext|>` included.
        context: tokens per packed sequence, and positions of the model.
        hidden_size: width of the residual stream.
        intermediate_size: width of each SwiGLU MLP.
        num_layers: decoder layers.
        num_heads: attention heads.
        batch_size: sequences per step.
        steps: optimiser steps.
        peak_learning_rate: AdamW's learning rate after the warm-up; it decays with a cosine to a twentieth.
        warmup_steps: steps of linear warm-up.
        weight_decay: on matrices only.
        gradient_clip: largest gradient norm.
        seed: for the initial weights and the order of the batches.
    """

    vocab_size: int = 1024
    context: int = 256
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    batch_size: int = 16
    steps: int = 3000
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine down to a twentieth of the peak."""
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: documents.
        vocab_size: tokens, the 256 bytes and `<|endoftext|>` included.

    Returns:
        A tokenizer whose bos, eos and padding token is `<|endoftext|>`; it adds no special tokens.

    Raises:
        InputError: `vocab_size` has no room for the 256 bytes.
    """
    if vocab_size <= 257:
        raise InputError(f"vocab_size is {vocab_size}; expected more than 257 (256 bytes and {END_OF_TEXT}).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of `<|endoftext|>`."""
    return int(tokenizer.get_vocab()[END_OF_TEXT])


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Tokenize documents into one stream in which every document begins with `<|endoftext|>`.

    Args:
        tokenizer: from `train_tokenizer`.
        texts: documents.

    Returns:
        Token ids [n_tokens], int64.
    """
    end = _end_of_text_id(tokenizer)
    # The backend is called directly because transformers warns about texts longer than the context.
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in (end, *encoding.ids)], dtype=torch.int64)


def pack(stream: Tensor, context: int, offset: int = 0) -> Tensor:
    """Split a stream into sequences of equal length; an incomplete last one is dropped.

    Args:
        stream: token ids [n_tokens].
        context: tokens per sequence.
        offset: tokens to skip first.

    Returns:
        Token ids [n_sequences, context].

    Raises:
        InputError: the stream is too short for one sequence.
    """
    count = (len(stream) - offset) // context
    if count < 1:
        raise InputError(f"{len(stream)} tokens after an offset of {offset} do not fill one sequence of {context}.")
    return stream[offset : offset + count * context].view(count, context)


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: LanguageModelRecipe) -> LlamaForCausalLM:
    """Build the untrained model.

    Args:
        tokenizer: determines the vocabulary and the id of `<|endoftext|>`.
        recipe: sizes and seed.

    Returns:
        A float32 model on the CPU.
    """
    end = _end_of_text_id(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.02,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config).float()


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    recipe: LanguageModelRecipe,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model in place to predict the next token.

    Every epoch splits the stream at another offset, so that a token appears after contexts of different lengths.

    Args:
        model: on any device.
        stream: token ids [n_tokens].
        recipe: the schedule.
        progress: called after each step with the number of steps done and the loss in nats per token.
    """
    device = model.device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95))
    batches = _batches(stream, recipe)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        tokens = next(batches).to(device)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval()


def _batches(stream: Tensor, recipe: LanguageModelRecipe) -> Iterator[Tensor]:
    """Yield batches [batch_size, context] endlessly, epoch after epoch, in a seeded order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.context, (1,), generator=generator))
        sequences = pack(stream, recipe.context, offset)
        for rows in torch.randperm(len(sequences), generator=generator).split(recipe.batch_size):
            if len(rows) == recipe.batch_size or len(sequences) < recipe.batch_size:
                yield sequences[rows]


def save_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer in the transformers layout, the weights as float16.

    Args:
        model: the trained model; it is converted in place.
        tokenizer: its tokenizer.
        folder: created if it does not exist.
    """
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_k=0,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.half().save_pretrained(folder)
    # float16 halves the file; loading converts to float32, in which a CPU is fast.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def load_language_model(folder: Path = ASSETS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the demo's language model.

    Args:
        folder: of the model; that of the package by default.

    Returns:
        The model in float32 and evaluation mode, and its tokenizer.

    Raises:
        InputError: the folder holds no model.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors; rebuild it with `hub_scripts/make_demo_assets.py lm`.")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer
