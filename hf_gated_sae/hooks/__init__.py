"""Apply interventions to a causal LM through torch forward hooks, and read activations and latents from it."""

from ..versions import require_supported

require_supported("torch", "transformers", "accelerate")  # before importing names that other versions lack

from .activation_shards import ActivationShards  # noqa: E402
from .attach import Attachment, attach  # noqa: E402
from .attach_report import AttachReport, InterventionReport  # noqa: E402
from .attribution import Attribution, attribute  # noqa: E402
from .capture import capture  # noqa: E402
from .harvest import Harvest, harvest  # noqa: E402
from .save_activations import save_activations  # noqa: E402
from .site_check import AttachCheck  # noqa: E402

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
