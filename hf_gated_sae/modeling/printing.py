"""What an SAE says of itself when it is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..functional.short_repr import few_lines

if TYPE_CHECKING:
    from .model import SAEModel


class Introduction:
    """Prints an SAE in a few lines: what it is, where it belongs, how large it is, and where it is from."""

    def __repr__(self: SAEModel | Any) -> str:
        """Return architecture, site, sizes, dtype and device; below, what it was loaded from and its base model."""
        config, origin = self.config, self.checkpoint
        read, written = ", ".join(config.sites_read), ", ".join(config.sites_written)
        site = f"{read} > {written}" if written != read else read
        held = config.kept_latents
        sizes = {"d_in": config.d_in, **({"d_out": self.d_out} if self.d_out != config.d_in else {})}
        sizes |= {"d_sae": config.d_sae, **({"k": config.k} if getattr(config, "k", None) is not None else {})}
        parts = [
            site or "no site",
            *(f"{name}={size}" for name, size in sizes.items()),
            *([] if held is None else [f"{len(held)} latents held"]),
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
        ]
        source = "not loaded from a checkpoint" if origin is None else f"from {origin}, layout {origin.format}"
        base = [f"    base model {config.base_model}"] if config.base_model else []
        return few_lines([f"{type(self).__name__}({', '.join(parts)})", f"    {source}", *base])
