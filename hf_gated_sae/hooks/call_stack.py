"""Whether a module's call is still running. torch tells no hook after a call that KeyboardInterrupt ended."""

from __future__ import annotations

import sys
from types import FrameType

from ..upstream.torch_private import MODULE_CALL


def call_frame() -> FrameType | None:
    """Return where the interpreter runs the call of the module whose hook asks; None if that is not to be found."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    return frame


def is_running(frame: FrameType | None) -> bool:
    """Whether this thread is within the call that runs in a frame; true where the frame is not known."""
    if frame is None:
        return True
    within: FrameType | None = sys._getframe(1)
    while within is not None and within is not frame:
        within = within.f_back
    return within is not None
