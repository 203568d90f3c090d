"""The text that an SAE prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..functional.short_repr import few_lines

if TYPE_CHECKING:
    from .model import SAEModel


def summary(sae: SAEModel) -> str:
    """Return architecture, site, sizes, dtype and device; below, what it was loaded from and its base model."""
    config, origin = sae.config, sae.checkpoint
    read, written = ", ".join(config.sites_read), ", ".join(config.sites_written)
    site = f"{read} > {written}" if written != read else read
    held = config.kept_latents
    sizes = {"d_in": config.d_in, **({"d_out": sae.d_out} if sae.d_out != config.d_in else {})}
    sizes |= {"d_sae": config.d_sae, **({"k": config.k} if getattr(config, "k", None) is not None else {})}
    parts = [
        site or "no site",
        *(f"{name}={size}" for name, size in sizes.items()),
        *([] if held is None else [f"{len(held)} latents held"]),
        f"{str(sae.dtype).removeprefix('torch.')} on {sae.device}",
    ]
    source = "not loaded from a checkpoint" if origin is None else f"from {origin}, layout {origin.format}"
    base = [f"    base model {config.base_model}"] if config.base_model else []
    return few_lines([f"{type(sae).__name__}({', '.join(parts)})", f"    {source}", *base])
