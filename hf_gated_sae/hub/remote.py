"""Parts of a file on the Hub, by HTTP range requests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from ..errors import CheckpointError, MissingFileError
from ..storage import ByteSource, LocalBytes
from ..upstream.huggingface_hub_private import build_hf_headers, hf_raise_for_status, http_stream_backoff
from .column_reads import turned_rows
from .error_messages import TransportError, explained
from .integrity import MARKERS

if TYPE_CHECKING:
    from .repository import HubRepository

CONNECTIONS = 8
TRIES = 3
MOST_RANGES = 150
"""In one request: its header stays below the 4 KB that every server takes."""
TOO_MANY = frozenset({400, 413, 414, 416, 431})
"""Answers of servers that do not like several ranges, or so many of them."""
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
        self._place: tuple[str, int, str] | None = None
        self._several_at_once = True
        self._whole: LocalBytes | None = None
        self._answers: dict[tuple[int, int], bytes] = {}

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._located()[1]

    def _located(self) -> tuple[str, int, str]:
        """Return the address of the content, its length and its etag, asked for once."""
        if self._place is None:
            with explained(self._repository.repo, self._repository.revision, self._path):
                found = get_hf_file_metadata(self._url, token=self._repository.access.token, retry_on_errors=True)
            if found.size is None:
                raise MissingFileError(f"The Hub does not tell how long {self.name} is; try again.")
            self._place = (found.location, found.size, found.etag or "")
        return self._place

    def map(self) -> Any:
        """Download the file, then map it."""
        return self._downloaded().map()

    def fetch(self) -> None:
        """Download the file."""
        self._downloaded()

    def _downloaded(self) -> LocalBytes:
        """Return the downloaded file, whose content has been checked; so now is what was read of it before.

        Raises:
            CheckpointError: if that was something else.
        """
        if self._whole is None:
            whole = LocalBytes(self._repository.download(self._path), self.name)
            for (offset, length), digest in self._answers.items():
                if whole.size < offset + length or _digest(whole.read([(offset, length)])[0]) != digest:
                    raise CheckpointError(
                        f"What was read of {self.name} before it was downloaded is not what it holds: an answer of "
                        "the Hub was corrupt, and nothing was loaded. Try again."
                    )
            self._whole = whole
        return self._whole

    def turned(self, place: tuple[int, int], rows: int, itemsize: int, name: str) -> ByteSource | None:
        """Fetch a matrix alone and keep its columns as rows of a local file; see `hub.column_reads`."""
        if self._whole is not None or not place[1]:
            return None
        repository = self._repository
        cache = Path(repository.access.cache_dir or constants.HF_HUB_CACHE)
        folder = cache / repo_folder_name(repo_id=repository.repo, repo_type="model") / MARKERS
        content = f"{self._located()[2]} {self._path}@{repository.revision}"
        try:
            source, fetched = turned_rows(
                folder, content, place, rows, itemsize, name, self._stream, afresh=repository.access.force_download
            )
        except _NoRanges:
            return None
        self.bytes_read += fetched
        return source

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        wanted = list(dict.fromkeys(span for span in ranges if span[1]))
        found = dict.fromkeys(ranges, b"")
        if wanted and self._whole is None:
            found |= self._ask_for_all(wanted)
        missing = [span for span in wanted if not found[span]]
        if missing:  # no ranges here: the whole file, then
            found |= zip(missing, self._downloaded().read(missing), strict=True)
        if self._whole is None:
            self._answers |= {span: _digest(found[span]) for span in wanted}
        return [found[span] for span in ranges]

    def _ask_for_all(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Ask for all ranges at once, else for each by itself; what could not be had is empty."""
        found: dict[tuple[int, int], bytes] = {}
        while len(ranges) > 1 and self._several_at_once:
            found |= self._ask(ranges[:MOST_RANGES])
            self._several_at_once = all(found.values())
            ranges = [span for span in ranges if not found.get(span)]
        if not ranges:
            return found
        first = self._ask(ranges[:1])  # one that gets no answer tells for all
        found |= first
        if all(first.values()) and len(ranges) > 1:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                answers = list(pool.map(lambda span: self._ask([span]), ranges[1:]))
            found |= {span: content for answer in answers for span, content in answer.items()}
        return {span: found.get(span, b"") for span in [*found, *ranges]}

    def _ask(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Send one request for ranges; those that the answer does not hold are empty."""
        with explained(self._repository.repo, self._repository.revision, self._path):
            for _ in range(TRIES - 1):
                try:
                    return self._answer(ranges)
                except HfHubHTTPError as error:  # an answer
                    if error.response.status_code not in (401, 403) or self._place is None:
                        raise
                    self._place = None  # addresses of the storage expire
                except TransportError:  # broken off while the content was being sent
                    continue
            return self._answer(ranges)

    def _request(self, ranges: Sequence[tuple[int, int]]) -> tuple[str, dict[str, str]]:
        """Return address and headers of a request for ranges."""
        address, _, _ = self._located()
        headers = {"Range": "bytes=" + ",".join(f"{start}-{start + length - 1}" for start, length in ranges)}
        headers["Accept-Encoding"] = "identity"
        if urlsplit(address).netloc == urlsplit(HfApi().endpoint or constants.ENDPOINT).netloc:
            headers |= build_hf_headers(token=self._repository.access.token)
        return address, headers

    def _answer(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Send the request and take the ranges out of the answer."""
        address, headers = self._request(ranges)
        broken: Exception | None = None
        body = b""
        with http_stream_backoff("GET", address, headers=headers, max_retries=TRIES) as response:
            if response.status_code == 206:
                try:
                    body = response.read()
                except TransportError as error:  # raised in here it would start the client's own retries
                    broken = error
            elif response.status_code not in (200, 416) and (len(ranges) == 1 or response.status_code not in TOO_MANY):
                broken = _failure(response)
        if broken is not None:
            raise broken
        parts = _parts(response.headers, body, self.size)
        return {(start, length): _cut(parts, start, length) for start, length in ranges}

    def _stream(self, offset: int, length: int, chunk: int) -> Iterator[bytes]:
        """Yield one long range in chunks, going on where a connection broke off.

        Raises:
            _NoRanges: if the server does not answer with that range.
        """
        left, held, tries = length, bytearray(), 0
        with explained(self._repository.repo, self._repository.revision, self._path):
            while left:
                before, broken = left, None
                try:
                    for piece in self._pieces(offset + length - left, left):
                        held += piece
                        left -= len(piece)
                        while len(held) >= chunk:
                            yield bytes(held[:chunk])
                            del held[:chunk]
                except HfHubHTTPError:
                    raise
                except TransportError as error:
                    broken = error
                tries = tries + 1 if left == before else 0
                if tries == TRIES:
                    raise broken or _NoRanges()
        if held:
            yield bytes(held)

    def _pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the answer to a request for one range as it arrives."""
        address, headers = self._request([(offset, length)])
        broken: Exception | None = None
        with http_stream_backoff("GET", address, headers=headers, max_retries=TRIES) as response:
            if response.status_code not in (200, 206, 416):
                broken = _failure(response)
            elif (
                response.status_code != 206
                or response.headers.get("Content-Range") != f"bytes {offset}-{offset + length - 1}/{self.size}"
            ):
                broken = _NoRanges()
            else:
                try:
                    for piece in response.iter_bytes():
                        yield piece[:length]
                        length -= len(piece)
                        if length <= 0:
                            break
                except TransportError as error:
                    broken = error
        if broken is not None:
            raise broken


class _NoRanges(Exception):
    """A server does not send the part of a file that it is asked for."""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


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
