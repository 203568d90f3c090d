"""Unwrap a model, run it on a few tokens, and record every tensor in the inputs and outputs of its modules."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, SiteError, shown
from .multi_rank import is_distributed, mesh_within
from .slots import Key, TensorPath, pack_input, tensors_in

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BATCH, SEQUENCE = 2, 7
_POSITION_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_target_positions",
    "context_length",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is probed, and the call that probes it.

    Args:
        root: the model without wrappers; module paths start here.
        call: the module to call; `root`, unless a wrapper has to gather its parameters.
        inputs: keyword arguments of the call.
    """

    root: nn.Module
    call: nn.Module
    inputs: dict[str, Any]

    @property
    def ids(self) -> Tensor:
        """The tokens of the probe: ids ``[B, S]`` or embeddings ``[B, S, width]``."""
        ids: Tensor | None = self.inputs.get("input_ids")
        found: Tensor = ids if ids is not None else self.inputs["inputs_embeds"]
        return found

    def tokens(self) -> tuple[int, int]:
        """Return (B, S) of the probe."""
        return int(self.ids.shape[0]), int(self.ids.shape[1])


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a model without PEFT, torch.compile, DDP and FSDP wrappers.

    Returns:
        The model itself, and the module to call, which is a wrapper only if that has to gather parameters.

    Raises:
        InputError: if it is not a module.
        SiteError: for `torch.nn.DataParallel`, whose replicas would run hooks in racing threads.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"The model is {shown(model)} ({type(model).__name__}); expected a loaded one, such as "
            "AutoModelForCausalLM.from_pretrained('gpt2')."
        )
    call = model
    while True:
        if isinstance(model, nn.DataParallel):
            raise SiteError("torch.nn.DataParallel runs hooks in several threads at once; use DDP or device_map.")
        get_base = getattr(model, "get_base_model", None)
        names = list(model._modules)
        inner: nn.Module | None = None
        if callable(get_base):
            inner = get_base()
        elif names in (["_orig_mod"], ["module"], ["_fsdp_wrapped_module"]):
            inner = model._modules[names[0]]
        if inner is None or inner is model:
            return model, call
        gathers = names == ["_fsdp_wrapped_module"]
        call = call if gathers or call is not model else inner
        model = inner


def make_subject(model: nn.Module, inputs: Mapping[str, Any] | None) -> Subject:
    """Prepare a model for probing, with generated ids unless inputs are given.

    Raises:
        InputError: if the model is not a module, or the inputs are not a mapping.
        SiteError: if the inputs have no tokens, or the model's embedding has no ids to generate.
    """
    root, call = unwrap(model)
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InputError(
            f"The probe's inputs are {shown(inputs)}; expected keyword arguments of the model by name, such as "
            "{'input_ids': ids} with a tensor of ids [B, S]."
        )
    arguments: dict[str, Any] = dict(inputs) if inputs is not None else {"input_ids": _made_up_ids(root)}
    _require_tokens(arguments)
    accepted = inspect.signature(root.forward).parameters
    if "use_cache" in accepted or any(item.kind is item.VAR_KEYWORD for item in accepted.values()):
        arguments.setdefault("use_cache", False)
    return Subject(root, call, arguments)


def _require_tokens(arguments: Mapping[str, Any]) -> None:
    """Raise unless inputs have a batch of token ids or embeddings.

    Raises:
        SiteError: with what was given.
    """
    name, shape = (
        ("input_ids", "[B, S]") if arguments.get("input_ids") is not None else ("inputs_embeds", "[B, S, width]")
    )
    tokens = arguments.get(name)
    if tokens is None:
        raise SiteError("The probe's inputs must have 'input_ids' or 'inputs_embeds'.")
    if not isinstance(tokens, Tensor):
        raise SiteError(
            f"{name!r} of the probe's inputs is {shown(tokens)}; expected a tensor {shape}, as the tokenizer returns "
            "with return_tensors='pt'."
        )
    if tokens.ndim != shape.count(",") + 1 or not tokens.numel():
        raise SiteError(
            f"{name!r} of the probe's inputs is a tensor {list(tokens.shape)}; expected {shape}, not empty."
        )


def embedding_of(root: nn.Module) -> nn.Module | None:
    """Return the module that embeds tokens, None if the model does not name one."""
    getter = getattr(root, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def configured_layers(root: nn.Module) -> int:
    """Return the number of layers in the model's configuration, 0 if it has none."""
    config = getattr(root, "config", None)
    text = config.get_text_config() if config is not None else None
    layers = getattr(text, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else 0


def _made_up_ids(root: nn.Module) -> Tensor:
    """Return ordinary ids ``[2, 7]`` on the embedding's device, all distinct if the vocabulary is large enough.

    With a small vocabulary they repeat, and special ones are used if there are no others. A model with fewer positions
    gets shorter sequences.
    """
    weight = getattr(embedding_of(root), "weight", None)
    config = getattr(root, "config", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        size = int(weight.shape[0])
    else:  # between forwards FSDP 1 flattens and shards weights
        size = int(getattr(config, "vocab_size", 0))
    special = set(_special_ids(config.to_dict())) if config is not None else set()
    known = range(min(size, 4096))
    ordinary = [token for token in known if token not in special] or list(known)
    if not ordinary:
        raise SiteError(
            "The probe needs token ids, and the model's embedding has none: give resolve(model, inputs=...)."
        )
    sequence = min(SEQUENCE, max(2, _max_positions(config)))
    wanted = BATCH * sequence
    step = max(1, len(ordinary) // wanted)
    chosen = ordinary[step - 1 :: step]
    skipped = 1 if sequence % len(chosen) == 0 else 0  # otherwise both sequences would be equal
    device = weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else torch.device("cpu")
    ids = [chosen[(n + skipped * (n // sequence)) % len(chosen)] for n in range(wanted)]
    return torch.tensor(ids, device=device).view(BATCH, sequence)


def _max_positions(config: Any) -> int:
    """Return the number of positions that a configuration allows, `SEQUENCE` if it states none."""
    text = config.get_text_config() if config is not None else None
    limits = (getattr(text, name, None) for name in _POSITION_LIMITS)
    return min((count for count in limits if isinstance(count, int) and count > 0), default=SEQUENCE)


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield every special id in a configuration: padding, end of text, image placeholders."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


@contextlib.contextmanager
def quiet(root: nn.Module) -> Iterator[None]:
    """Run eagerly, in eval mode, without gradients; restore every module's mode and the random state afterwards."""
    modes = [(module, module.training) for module in root.modules()]
    devices = {parameter.device for parameter in root.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            same = [device.index for device in devices if device.type == kind and device.index is not None]
            stack.enter_context(torch.random.fork_rng(devices=same, device_type=kind))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            root.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@dataclass(frozen=True, slots=True)
class Seen:
    """One tensor that the probe recorded in a module's input or output.

    Args:
        tensor_path: path of the tensor; its `order` is the time of recording.
        value: digest of the content; equal digests mean bitwise equal contents of the same dtype.
        is_tokens: whether it has one row per token and a floating-point dtype.
    """

    tensor_path: TensorPath
    value: str
    is_tokens: bool


class Trace:
    """All tensors that one forward showed in the inputs and outputs of modules.

    Args:
        tokens: (B, S) of the forward.
    """

    def __init__(self, tokens: tuple[int, int]) -> None:
        self.tokens = tokens
        self.calls: dict[str, int] = defaultdict(int)
        self.seen: dict[tuple[str, str], list[Seen]] = defaultdict(list)
        self.values: dict[str, Tensor] = {}
        self.output: Tensor | None = None
        self.mesh: DeviceMesh | None = None
        """The ranks of tensor parallelism."""
        self._clock = 0
        self._digests: dict[tuple[int, int], tuple[weakref.ref[Tensor], str]] = {}

    def hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks that record one module's input and output."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[path] += 1
            self.mesh = self.mesh or mesh_within(module)
            self._record(path, "input", pack_input(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._record(path, "output", output)

        return before, after

    def _record(self, path: str, port: str, packed: Any) -> None:
        self._clock += 1
        if self.calls[path] > 1:
            return
        for keys, tensor in tensors_in(packed):
            if not is_distributed(tensor):
                self.seen[path, port].append(self._recorded(path, port, keys, tensor))

    def _recorded(self, path: str, port: str, keys: tuple[Key, ...], tensor: Tensor) -> Seen:
        batch, sequence = self.tokens
        shape = tuple(tensor.shape)
        shaped = (
            shape[:2] == (batch, sequence) if tensor.ndim == 3 else tensor.ndim == 2 and shape[0] == batch * sequence
        )
        tensor_path = TensorPath(path, port, keys, tensor.ndim, shape[-1] if shape else 0, self._clock)
        return Seen(tensor_path, self._digest(tensor), shaped and tensor.is_floating_point())

    def _digest(self, tensor: Tensor) -> str:
        """Store a copy of the content, once, and return its digest; later in-place changes do not affect the copy."""
        key = (id(tensor), 0 if tensor.is_inference() else tensor._version)
        owner, number = self._digests.get(key, (None, ""))
        if owner is None or owner() is not tensor:  # Python reuses the id of a deleted tensor
            content = tensor.detach().to("cpu", copy=True).contiguous()
            number = digest_of(content)
            self.values.setdefault(number, content)
            self._digests[key] = (weakref.ref(tensor), number)
        return number

    def one(self, path: str, port: str) -> list[Seen]:
        """Return the tensors at one port of a module; none if the module did not run exactly once."""
        return self.seen.get((path, port), []) if self.calls.get(path) == 1 else []

    def within(self, path: str, port: str) -> Iterator[Seen]:
        """Yield the tensors at one port of all modules below a path, in module order."""
        prefix = f"{path}."
        for (name, side), items in self.seen.items():
            if side == port and name.startswith(prefix) and self.calls[name] == 1:
                yield from items

    def not_finite(self) -> str | None:
        """Return where NaN or infinity first occurred, as the reason why nothing is proven; None if nowhere.

        Minus infinity is accepted: models write it to logits that they exclude.
        """
        if self.output is None or not _has_nan_or_inf(self.output):
            return None
        rows = (item for items in self.seen.values() for item in items if item.is_tokens)
        for item in sorted(rows, key=lambda item: item.tensor_path.order):
            value = self.values[item.value]
            if _has_nan_or_inf(value):
                where = f"the {item.tensor_path.port} of {item.tensor_path.path or 'the model'}, in {value.dtype}"
                break
        else:
            where = f"its logits, in {self.output.dtype}"
        return (
            f"the model itself computes NaN or infinity, first seen at {where}: check that its weights are "
            "complete, and run it in bfloat16 or float32 rather than float16"
        )

    def keep_width(self, width: int) -> None:
        """Release the contents of all tensors that are not as wide as the residual stream; shapes and dtypes stay."""
        elements = self.tokens[0] * self.tokens[1] * width
        for number, content in self.values.items():
            if content.numel() != elements or content.shape[-1] != width:
                self.values[number] = content.to("meta")


def _has_nan_or_inf(values: Tensor) -> bool:
    return bool(values.isnan().any() or values.isposinf().any())


def digest_of(content: Tensor) -> str:
    """Return a digest of a tensor's dtype and bits, which does not depend on its shape."""
    digest = hashlib.blake2b(digest_size=16)
    if content.numel():
        digest.update(content.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{content.dtype}:{digest.hexdigest()}"


class _BlocksDone(Exception):  # noqa: N818  # not an error
    """Raised to stop a forward when the blocks have run and the logits are not needed."""


def run_blocks(subject: Subject) -> None:
    """Run one forward without the output embedding, whose product is a large part of a small model's forward.

    Raises:
        SiteError: if the forward raises.
    """

    def end(*_: Any) -> None:
        raise _BlocksDone

    getter: Any = getattr(subject.root, "get_output_embeddings", None)
    head = None if getter is None else getter()
    handle = head.register_forward_pre_hook(end) if isinstance(head, nn.Module) else None
    try:
        _called(subject)
    except _BlocksDone:
        pass
    finally:
        if handle is not None:
            handle.remove()


def run(subject: Subject) -> Tensor:
    """Run one forward and return the first floating-point tensor of its output (the logits), on the CPU.

    Raises:
        SiteError: if the forward raises or returns no such tensor.
    """
    output = _called(subject)
    logits = next((tensor for _, tensor in tensors_in(output) if tensor.is_floating_point()), None)
    if logits is None:
        raise SiteError(f"The probe forward of {type(subject.root).__name__} returned no floating-point tensor.")
    return logits.detach().to("cpu", copy=True)


def _called(subject: Subject) -> Any:
    try:
        return subject.call(**subject.inputs)
    except (SiteError, _BlocksDone):
        raise
    except Exception as error:  # any error of the user's model is reported as a SiteError
        raise SiteError(
            f"The probe forward of {type(subject.root).__name__} with {sorted(map(str, subject.inputs))} raised "
            f"{type(error).__name__}: {error}. No site can be proven without a forward. Call "
            "resolve(model, inputs=batch) once with a small batch that the model accepts, with ids of shape [B, S]; "
            "then semantic names and module paths such as 'model.layers.3.output' work."
        ) from error


def trace(subject: Subject, only: Collection[str] | None = None) -> Trace:
    """Run one forward and record the modules' inputs and outputs; all hooks are removed, also after errors.

    Args:
        subject: the model and its inputs.
        only: paths of the modules to record; then the forward stops before the logits. None records all modules and
            the logits.

    Raises:
        SiteError: if the sequences have one token, or the forward raises.
    """
    batch, sequence = subject.tokens()
    if sequence < 2:  # one token does not show whether positions are mixed
        raise SiteError(
            f"The probe's inputs are {batch} x {sequence} tokens [B, S]; expected sequences of 2 tokens or more."
        )
    record = Trace((batch, sequence))
    handles = []
    try:
        for path, module in subject.root.named_modules():
            if only is not None and path not in only:
                continue
            before, after = record.hooks(path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        if only is None:
            record.output = run(subject)
        else:
            run_blocks(subject)
    finally:
        for handle in handles:
            handle.remove()
    return record
