"""Training runs from YAML files: reading and checking them, building their parts, estimating costs, and training."""

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
