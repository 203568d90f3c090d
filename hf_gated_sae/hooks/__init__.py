"""Back-ends that carry interventions out on a model that the user already holds: torch forward hooks."""

from .attach import Attachment, attach
from .capture import capture
from .report import AttachReport, InterventionReport

__all__ = ["AttachReport", "Attachment", "InterventionReport", "attach", "capture"]
