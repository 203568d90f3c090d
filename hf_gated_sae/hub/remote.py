"""Parts of a file on the Hub, by HTTP range requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

from ..errors import MissingFileError
from ..storage import ByteSource, LocalBytes
from .trouble import TransportError, explained

if TYPE_CHECKING:
    from .repository import HubRepository

CONNECTIONS = 8
TRIES = 3
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RemoteBytes(ByteSource):
    """A file of a repository, read in part; `map` downloads it whole into the Hub cache.

    Several ranges are asked for in one request. A server that does not know that, or no ranges at all, is asked for
    them one by one, or for the whole file.

    Args:
        repository: the repository at one commit.
        path: the file, counted from the root.
    """

    def __init__(self, repository: HubRepository, path: str) -> None:
        super().__init__(f"{repository.repo}/{path}@{(repository.revision or '')[:12]}")
        self._repository = repository
        self._path = path
        self._url = hf_hub_url(repository.repo, path, revision=repository.revision)
        self._place: tuple[str, int] | None = None
        self._several_at_once = True
        self._whole: LocalBytes | None = None

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._located()[1]

    def _located(self) -> tuple[str, int]:
        """Return the address of the content and its length, asked for once."""
        if self._place is None:
            with explained(self._repository.repo, self._repository.revision, self._path):
                found = get_hf_file_metadata(self._url, token=self._repository.access.token)
            if found.size is None:
                raise MissingFileError(f"The Hub does not tell how long {self.name} is; try again.")
            self._place = (found.location, found.size)
        return self._place

    def map(self) -> Any:
        """Download the file, then map it."""
        return self._downloaded().map()

    def _downloaded(self) -> LocalBytes:
        if self._whole is None:
            self._whole = LocalBytes(self._repository.download(self._path), self.name)
        return self._whole

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        wanted = [span for span in ranges if span[1]]
        found = dict.fromkeys(ranges, b"")
        if wanted and self._whole is None:
            found |= self._ask_for_all(wanted)
        missing = [span for span in wanted if not found[span]]
        if missing:  # no ranges here: the whole file, then
            found |= zip(missing, self._downloaded().read(missing), strict=True)
        return [found[span] for span in ranges]

    def _ask_for_all(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Ask for all ranges at once, else for each by itself; what could not be had is empty."""
        if len(ranges) > 1 and self._several_at_once:
            found = self._ask(ranges)
            if all(found.values()):
                return found
            self._several_at_once = False
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            answers = list(pool.map(lambda span: self._ask([span]), ranges))
        return {span: content for answer in answers for span, content in answer.items()}

    def _ask(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Send one request for ranges; those that the answer does not hold are empty."""
        address, size = self._located()
        headers = {"Range": "bytes=" + ",".join(f"{start}-{start + length - 1}" for start, length in ranges)}
        headers["Accept-Encoding"] = "identity"
        if urlsplit(address).netloc == urlsplit(HfApi().endpoint or constants.ENDPOINT).netloc:
            headers |= build_hf_headers(token=self._repository.access.token)
        with explained(self._repository.repo, self._repository.revision, self._path):
            for _ in range(TRIES - 1):
                try:
                    return self._answer(address, headers, ranges, size)
                except TransportError:  # broken off while the content was being sent
                    continue
            return self._answer(address, headers, ranges, size)

    def _answer(
        self, address: str, headers: dict[str, str], ranges: list[tuple[int, int]], size: int
    ) -> dict[tuple[int, int], bytes]:
        """Send the request and take the ranges out of the answer."""
        broken: Exception | None = None
        body = b""
        with http_stream_backoff("GET", address, headers=headers, max_retries=TRIES) as response:
            if response.status_code == 206:
                try:
                    body = response.read()
                except TransportError as error:  # raised in here it would start the client's own retries
                    broken = error
            elif response.status_code not in (200, 416):
                broken = _failure(response)
        if broken is not None:
            raise broken
        parts = _parts(response.headers, body, size)
        return {(start, length): _cut(parts, start, length) for start, length in ranges}


def _failure(response: Any) -> Exception:
    """Return the client's error for an answer."""
    try:
        hf_raise_for_status(response)
    except TransportError as error:
        return error
    return MissingFileError(f"The Hub answered {response.status_code} to a request for a part of a file; try again.")


def _parts(headers: Any, body: bytes, size: int) -> list[tuple[int, bytes]]:
    """Return the parts of a partial answer with their offsets; parts that do not fit the file are left out."""
    kind = headers.get("Content-Type", "")
    if not kind.startswith("multipart/byteranges"):
        return _part(headers.get("Content-Range", ""), body, size)
    boundary = kind.partition("boundary=")[2].strip('"; ').encode()
    found, position = [], body.find(b"--" + boundary)
    while position >= 0:
        end_of_headers = body.find(b"\r\n\r\n", position)
        if not boundary or end_of_headers < 0:
            break
        lines = body[position:end_of_headers].decode("latin-1").splitlines()
        span = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("content-range")), "")
        part = _part(span, body[end_of_headers + 4 :], size)
        found += part
        position = body.find(b"--" + boundary, end_of_headers + 4 + (len(part[0][1]) if part else 0))
    return found


def _part(content_range: str, body: bytes, size: int) -> list[tuple[int, bytes]]:
    """Return one part if its announced place fits the file and its length."""
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or match[3] not in ("*", str(size)):
        return []
    start, length = int(match[1]), int(match[2]) + 1 - int(match[1])
    return [(start, body[:length])] if len(body) >= length else []


def _cut(parts: list[tuple[int, bytes]], start: int, length: int) -> bytes:
    """Return a range out of the parts, or nothing if no part holds it."""
    for offset, content in parts:
        if offset <= start and start + length <= offset + len(content):
            return content[start - offset : start - offset + length]
    return b""
