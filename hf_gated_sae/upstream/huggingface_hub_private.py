"""Private names of huggingface_hub, seen in 1.31 and 2.4.

Range requests have to retry, authenticate and fail exactly as the client's own downloads do. The public
`HfFileSystem` reads a file in one stream of blocks, one range at a time, and asks the Hub for metadata that the
listing has already given; `get_session` alone neither retries nor turns a status into the client's errors.
"""

from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

__all__ = ["build_hf_headers", "hf_raise_for_status", "http_stream_backoff"]
