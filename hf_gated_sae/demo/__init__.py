"""An example that needs no download: a small language model of Python source, its SAEs and the ground truth."""
