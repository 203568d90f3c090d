"""What `hf-gated-sae train` shows; in a folder of its own, because the command imports every module beside it."""
