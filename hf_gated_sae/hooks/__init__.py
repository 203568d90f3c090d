"""Back-ends that carry interventions out on a model that the user already holds: torch forward hooks."""

from .attach import Attachment, attach
from .attribution import Attribution, attribute
from .capture import capture
from .check import AttachCheck
from .harvest import Harvest, harvest
from .report import AttachReport, InterventionReport
from .saving import save_activations
from .shards import ActivationShards

__all__ = [
    "ActivationShards",
    "AttachCheck",
    "AttachReport",
    "Attachment",
    "Attribution",
    "Harvest",
    "InterventionReport",
    "attach",
    "attribute",
    "capture",
    "harvest",
    "save_activations",
]
