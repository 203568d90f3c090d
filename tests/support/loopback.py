"""The loopback Hub of a test session. Importing this starts it and points the real client at it.

It must be imported before huggingface_hub, which reads its environment on import; `tests/conftest.py` ensures that.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from typing import Any

from .mini_hub import MiniHub

HOME = tempfile.mkdtemp(prefix="hf_home_")
HUB = MiniHub()
HUB.add_user("alice", "hf_alice", orgs=["acme"])
HUB.add_user("bob", "hf_bob")
HUB.add_user("eve", "hf_read", role="read")

os.environ.update(HUB.env(token="hf_alice", home=HOME))
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

_connect = socket.socket.connect


def _connect_on_this_machine(self: socket.socket, address: Any) -> None:
    """Refuse connections to other machines: no test may reach the network."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise ConnectionRefusedError(f"A test tried to reach {address[0]}; tests may use the loopback Hub only.")
    _connect(self, address)


socket.socket.connect = _connect_on_this_machine  # type: ignore[method-assign]


@atexit.register
def _clean_up() -> None:
    HUB.close()
    shutil.rmtree(HOME, ignore_errors=True)
