"""The one large matrix product of an SAE, on the fastest path that computes it in its own precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``.

    On a CPU in float32 torch's own `linear` goes through BLAS, which took up to twice as long for these shapes as
    oneDNN, through which torch itself compiles this very operation. Where gradients, `torch.func` or a compiler need
    it, or the operation is not there, `torch.nn.functional.linear` is called.

    Args:
        x: ``[..., d_in]``.
        weight: ``[n, d_in]``, of any strides.

    Returns:
        ``[..., n]``.
    """
    if _onednn_serves(x, weight):
        flat = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, None, "none", [], "")
        return flat.reshape(*x.shape[:-1], weight.shape[0])
    return nn.functional.linear(x, weight)


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the product may go through oneDNN."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if not plain or not _AVAILABLE or not x.numel() or not weight.numel():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if type(x) not in (Tensor, nn.Parameter) or type(weight) not in (Tensor, nn.Parameter):
        return False
    if _is_transformed(x) or _is_transformed(weight):
        return False  # the operation has no forward derivative, and would drop tangents without a word
    if x.numel() == x.shape[-1] and weight.stride(0) == 1:
        return False  # one token, latents side by side: BLAS reads the matrix once, on one core, and that is enough
    needs_graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not needs_graph and not torch.is_autocast_enabled("cpu") and bool(torch.backends.mkldnn.enabled)


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a transformation of `torch.func` sees the tensor, or it carries a tangent."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


def _available() -> bool:
    """Whether this build of torch has the operation, and it computes what it should."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        _is_transformed(x)
    except (AttributeError, RuntimeError, TypeError):  # another version of torch
        return False
    return torch.equal(found, x @ weight.T)


_AVAILABLE = _available()
