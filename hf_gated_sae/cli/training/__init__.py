"""Output of `hf-gated-sae train`; in its own folder, because every module in `cli/` is imported as a subcommand."""
