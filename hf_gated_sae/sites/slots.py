"""Read and write one tensor of a module's input or output: the only file that knows how models pack their values."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SiteError
from .multi_rank import Shards
from .site import Site
from .transforms import Transform, view

Key = int | str
Tokens = Callable[[], tuple[int, int]]
Edit = Callable[[Tensor], Tensor | None]

_DEEPEST = 3  # containers nested deeper are caches and the like, not activations


def pack_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Join positional and keyword arguments into one container, so that inputs are searched like outputs."""
    return {"args": args, "kwargs": dict(kwargs)}


def tensors_in(value: object, _above: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Tensor]]:
    """Yield every tensor of a packed input or of an output, in order, with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield _above, value
    elif len(_above) < _DEEPEST:
        pairs: list[tuple[Key, Any]] = []
        if isinstance(value, Mapping):
            pairs = [(key, item) for key, item in value.items() if isinstance(key, str)]
        elif isinstance(value, tuple | list):
            pairs = list(enumerate(value))
        for key, item in pairs:
            yield from tensors_in(item, (*_above, key))


def get_tensor(value: Any, keys: tuple[Key, ...]) -> Tensor | None:
    """Return the tensor at a sequence of keys, None if the container has another structure."""
    for key in keys:
        try:
            value = value[key]
        except (LookupError, TypeError):
            return None
    return value if isinstance(value, Tensor) else None


def put_tensor(value: Any, keys: tuple[Key, ...], new: Tensor) -> Any:
    """Return a copy of a container, of its type, with one tensor replaced; all other elements are the same objects."""
    if not keys:
        return new
    key, rest = keys[0], keys[1:]
    inner = put_tensor(value[key], rest, new)
    if isinstance(value, tuple):
        items = [inner if index == key else item for index, item in enumerate(value)]
        make = getattr(type(value), "_make", None)  # a namedtuple takes its fields one by one
        return make(items) if make else type(value)(items)
    changed = value.copy()
    changed[key] = inner
    return changed


@dataclass(frozen=True, slots=True)
class TensorPath:
    """The path to one tensor in a module's input or output, and how it is read and written.

    Args:
        path: dotted path of the module in the model.
        port: ``"input"`` or ``"output"``.
        keys: keys of the tensor in the packed input, or in the output.
        rank: 3 for ``[B, S, width]``, 2 for ``[B * S, width]``.
        width: last dimension; of the whole tensor where ranks hold parts of it.
        order: place in the order of execution of one forward.
        scale: factor of the tensor where the model adds it to its stream; the scaled value is read and written.
        transforms: transforms applied after `scale` on reading, in this order; none depends on the model.
        in_place: whether to write into the tensor itself, because others than the module hold the same object.
        shards: how the last dimension is split over ranks; None if each rank has the whole tensor.
    """

    path: str
    port: str
    keys: tuple[Key, ...]
    rank: int
    width: int
    order: int
    scale: float = 1.0
    in_place: bool = False
    transforms: tuple[Transform, ...] = ()
    shards: Shards | None = None

    @property
    def steps(self) -> tuple[Transform, ...]:
        """All transforms applied on reading, the scale first; empty if the tensor itself is read."""
        return self.transforms if self.scale == 1.0 else (Transform("scale", self.scale), *self.transforms)

    @property
    def bare(self) -> TensorPath:
        """The tensor path without transforms, which sites with different transforms share."""
        return dataclasses.replace(self, transforms=()) if self.transforms else self

    @property
    def held_width(self) -> int:
        """Last dimension of the tensor that this process holds."""
        return self.width if self.shards is None else self.shards.part_width

    def __str__(self) -> str:
        """Return the module path with the port."""
        return f"{self.path}.{self.port}"


class Slot:
    """A site resolved in one model, at which hooks can be registered.

    Args:
        site: the site.
        tensor_path: path of its tensor.
        root: the model; only a weak reference is stored.
    """

    def __init__(self, site: Site, tensor_path: TensorPath, root: nn.Module) -> None:
        self.site = site
        self.tensor_path = tensor_path
        self._root = weakref.ref(root)

    @property
    def width(self) -> int:
        """Last dimension of the tensor."""
        return self.tensor_path.width

    @property
    def order(self) -> int:
        """Place in the order of execution: larger runs later."""
        return self.tensor_path.order

    @property
    def bare(self) -> Slot:
        """The slot of the tensor itself, without transforms."""
        if not self.tensor_path.transforms:
            return self
        slot = copy.copy(self)
        slot.tensor_path = self.tensor_path.bare
        return slot

    @property
    def module(self) -> nn.Module:
        """The module on which hooks are registered.

        Raises:
            SiteError: if the model has been deleted or no longer has the module.
        """
        root = self._root()
        if root is None:
            raise SiteError(f"The model in which the site '{self.site}' was found no longer exists; resolve it again.")
        try:
            return root.get_submodule(self.tensor_path.path)
        except AttributeError as error:
            raise SiteError(
                f"The module {self.tensor_path.path!r} of the site '{self.site}' is no longer in the model; "
                "resolve again."
            ) from error

    def module_path(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """Return the way from the model to the module, as (parent, name, child) triples; empty for the model itself.

        Raises:
            SiteError: as for `module`.
        """
        module = self.module
        parent = self._root()
        path: list[tuple[nn.Module, str, nn.Module]] = []
        if parent is None or parent is module:
            return path
        for name in self.tensor_path.path.split("."):
            child = parent.get_submodule(name)
            path.append((parent, name, child))
            parent = child
        return path

    def register(self, fn: Edit, tokens: Tokens | None = None) -> RemovableHandle:
        """Register a hook at the tensor, before all other hooks of the module.

        Args:
            fn: takes the tensor ``[B, S, width]`` and returns its replacement, which is copied where the model could
                otherwise write into it, or None to leave the same object there.
            tokens: returns ``(B, S)`` of the running forward; needed where the module gets ``[B * S, width]``.

        Returns:
            The handle whose ``remove()`` removes the hook.

        Raises:
            SiteError: if the module is no longer in the model; and, from the hook, if a call has another structure.
        """
        hook = self.hook(fn, tokens)
        if self.tensor_path.port == "input":
            return self.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        return self.module.register_forward_hook(hook, prepend=True)

    def hook(self, fn: Edit, tokens: Tokens | None = None) -> Callable[..., Any]:
        """Return the hook that `register` registers, for callers that do not use torch's hooks.

        Returns:
            A function of the module and its ``args, kwargs`` (input) or ``args, output`` (output), which returns the
            replacement of ``args, kwargs`` or of the output, or None.
        """
        return (_InputHook if self.tensor_path.port == "input" else _OutputHook)(
            self.site, self.tensor_path, fn, tokens
        )

    def __repr__(self) -> str:
        """Show the site and its tensor."""
        return f"Slot({self.site}, at {self.tensor_path}, width={self.width})"


class _Hook:
    """The hook of one slot; in a copied or unpickled model it is replaced by one that does nothing."""

    def __init__(self, site: Site, tensor_path: TensorPath, fn: Edit, tokens: Tokens | None) -> None:
        self.site, self.tensor_path, self.fn, self.tokens = site, tensor_path, fn, tokens

    def _edited(self, packed: Any) -> Tensor | None:
        """Return the replacement in the tensor's own shape, or None where nothing needs to be put back."""
        found = get_tensor(packed, self.tensor_path.keys)
        if found is None or found.shape[-1:] != (self.tensor_path.held_width,) or found.ndim != self.tensor_path.rank:
            raise SiteError(self._mismatch(packed))
        tensor = found if self.tensor_path.shards is None else self.tensor_path.shards.whole(found)
        raw = tensor.reshape(*self._rows(tensor), -1) if self.tensor_path.rank == 2 else tensor
        seen = view(raw, self.tensor_path.steps) if self.tensor_path.steps else None
        value = raw if seen is None else seen.value
        if seen is None and self.tensor_path.in_place:
            value = raw.clone()  # the edit may store its argument, which is about to be overwritten
        new = self.fn(value)
        if new is None:
            return None
        if new.shape != value.shape:
            raise SiteError(
                f"The edit at the site '{self.site}' returned {list(new.shape)} for {list(value.shape)}; "
                "it must keep the shape."
            )
        given = new
        if seen is not None:
            new = seen.written(new)
        new = new.to(tensor.dtype)
        if new is given and new is not value and not self.tensor_path.in_place:
            new = (
                new.clone()
            )  # some models add to their modules' outputs in place, and the edit's tensor may be used later
        if new.shape != tensor.shape:  # otherwise no view is made, whose gradient FSDP could not track
            new = new.reshape(tensor.shape)
        if self.tensor_path.shards is not None:
            new = self.tensor_path.shards.part(new)
        if self.tensor_path.in_place:
            found.copy_(new)
            return None
        return new

    def _rows(self, tensor: Tensor) -> tuple[int, int]:
        """Return (B, S) for a tensor in which they are flattened."""
        if self.tokens is None:
            raise SiteError(
                f"The module at the site '{self.site}' gets tokens flattened to {list(tensor.shape)}; "
                "register with tokens=..., a function that returns (batch, sequence) of the running forward."
            )
        batch, sequence = self.tokens()
        if batch * sequence != tensor.shape[0]:
            raise SiteError(
                f"The module at the site '{self.site}' gets {tensor.shape[0]} rows, which are not the "
                f"{batch} x {sequence} tokens of this forward."
            )
        return batch, sequence

    def _mismatch(self, packed: Any) -> str:
        where = "".join(f"[{key!r}]" for key in self.tensor_path.keys) or "itself"
        seen = ", ".join(f"{list(tensor.shape)}" for _, tensor in tensors_in(packed)) or "no tensor"
        shape = "[B, S, {}]" if self.tensor_path.rank == 3 else "[B * S, {}]"
        return (
            f"The site '{self.site}' is the {self.tensor_path.port} of {self.tensor_path.path!r} ({where}), where the "
            f"probe saw {shape.format(self.tensor_path.held_width)}; this call has {seen}. The model is called in "
            "another way than when the site was proven: resolve it again with inputs of this kind, resolve(model, "
            "inputs=batch)."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _InputHook(_Hook):
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        packed = pack_input(args, kwargs)
        new = self._edited(packed)
        if new is None:
            return None
        changed = put_tensor(packed, self.tensor_path.keys, new)
        return changed["args"], changed["kwargs"]


class _OutputHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = self._edited(output)
        return None if new is None else put_tensor(output, self.tensor_path.keys, new)


class _Inert:
    """Replacement of a hook in a copy of the model."""

    def __call__(self, *_: object) -> None:
        return None
