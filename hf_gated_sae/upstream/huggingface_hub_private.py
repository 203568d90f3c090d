"""Private names of huggingface_hub, seen in 1.31 and 2.4.

Range requests retry, authenticate and fail as the client's own downloads do, which `get_session` alone does not.
Whether `HfFileSystem` could take their place at no more requests has not been measured.
"""

from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

__all__ = ["build_hf_headers", "hf_raise_for_status", "http_stream_backoff"]
