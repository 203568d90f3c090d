"""A demo that needs no download: a small language model of Python source, its SAEs and ground-truth concepts."""
