"""A training run as a YAML file: what it says, its parts, what it will cost, and carrying it out."""

from .assembly import assemble, plain, read_run
from .estimate import Estimate, estimate, measured
from .run import Run
from .run_config import DataSettings, ModelSettings, RunConfig, SAESettings
from .strict_yaml import read_flags

__all__ = [
    "DataSettings",
    "Estimate",
    "ModelSettings",
    "Run",
    "RunConfig",
    "SAESettings",
    "assemble",
    "estimate",
    "measured",
    "plain",
    "read_flags",
    "read_run",
]
