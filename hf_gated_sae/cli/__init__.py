"""The `hf-gated-sae` command. One file per subcommand; each adds itself to `app`."""

from .app import main

__all__ = ["main"]
