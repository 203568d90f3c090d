"""Read parts of a file on the Hub by HTTP range requests.

Not through `HfFileSystem`, which asks for one range per request, each by way of the Hub, and reads 5 MB ahead: 20 rows
of 3 KB cost it 42 requests (40 without reading ahead), here one.
"""

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
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from ..errors import CheckpointError, MissingFileError
from ..storage import ByteSource, LocalBytes
from .column_reads import transposed_rows
from .error_messages import TransportError, explained
from .integrity import MARKERS

if TYPE_CHECKING:
    from .repository import HubRepository

CONNECTIONS = 8
TRIES = 3
MOST_RANGES = 150
"""Most ranges in one request, so that its header stays below the 4 KB that every server accepts."""
TOO_MANY = frozenset({400, 413, 414, 416, 431})
"""Status codes of servers that refuse several ranges, or that many of them."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class RemoteBytes(ByteSource):
    """A file of a repository, read in part; `map` downloads it whole into the Hub cache.

    Several ranges are requested at once. If the server does not support that, they are requested one by one; if it
    supports no ranges, the whole file is downloaded.

    Args:
        repository: the repository at one commit.
        path: path of the file from the root.
    """

    def __init__(self, repository: HubRepository, path: str) -> None:
        super().__init__(f"{repository.repo}/{path}@{(repository.revision or '')[:12]}")
        self._repository = repository
        self._path = path
        self._url = hf_hub_url(repository.repo, path, revision=repository.revision)
        self._location: tuple[str, int, str] | None = None
        self._accepts_several = True
        self._whole: LocalBytes | None = None
        self._digests: dict[tuple[int, int], bytes] = {}

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._resolved()[1]

    def _resolved(self) -> tuple[str, int, str]:
        """Return the URL of the content, its length and its etag; requested once."""
        if self._location is None:
            with explained(self._repository.repo, self._repository.revision, self._path):
                found = get_hf_file_metadata(self._url, token=self._repository.access.token, retry_on_errors=True)
            if found.size is None:
                raise MissingFileError(f"The Hub did not report the size of {self.name}; try again.")
            self._location = (found.location, found.size, found.etag or "")
        return self._location

    def map(self) -> Any:
        """Download the file, then map it."""
        return self._downloaded().map()

    def fetch(self) -> None:
        """Download the file."""
        self._downloaded()

    def _downloaded(self) -> LocalBytes:
        """Return the downloaded and verified file, after comparing with it the parts that were read before.

        Raises:
            CheckpointError: if one of them differs.
        """
        if self._whole is None:
            whole = LocalBytes(self._repository.download(self._path), self.name)
            for (offset, length), digest in self._digests.items():
                if whole.size < offset + length or _digest(whole.read([(offset, length)])[0]) != digest:
                    raise CheckpointError(
                        f"A part of {self.name} that was read before the download differs from the downloaded file: "
                        "a response of the Hub was corrupt, and nothing was loaded. Try again."
                    )
            self._whole = whole
        return self._whole

    def transposed(self, span: tuple[int, int], rows: int, itemsize: int, name: str) -> ByteSource | None:
        """Fetch a matrix alone and store its transpose in a local file; see `hub.column_reads`."""
        if self._whole is not None or not span[1]:
            return None
        repository = self._repository
        cache = Path(repository.access.cache_dir or constants.HF_HUB_CACHE)
        folder = cache / repo_folder_name(repo_id=repository.repo, repo_type="model") / MARKERS
        content = f"{self._resolved()[2]} {self._path}@{repository.revision}"
        try:
            source, fetched = transposed_rows(
                folder, content, span, rows, itemsize, name, self._stream, overwrite=repository.access.force_download
            )
        except _NoRanges:
            return None
        self.bytes_read += fetched
        return source

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        wanted = list(dict.fromkeys(span for span in ranges if span[1]))
        found = dict.fromkeys(ranges, b"")
        if wanted and self._whole is None:
            found |= self._request_all(wanted)
        missing = [span for span in wanted if not found[span]]
        if missing:  # the server supports no ranges: download the whole file
            found |= zip(missing, self._downloaded().read(missing), strict=True)
        if self._whole is None:
            self._digests |= {span: _digest(found[span]) for span in wanted}
        return [found[span] for span in ranges]

    def _request_all(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Request all ranges at once, else each by itself; those that the server does not send are empty."""
        found: dict[tuple[int, int], bytes] = {}
        while len(ranges) > 1 and self._accepts_several:
            found |= self._request_with_retries(ranges[:MOST_RANGES])
            self._accepts_several = all(found.values())
            ranges = [span for span in ranges if not found.get(span)]
        if not ranges:
            return found
        first = self._request_with_retries(ranges[:1])  # if the server does not send one, it sends none
        found |= first
        if all(first.values()) and len(ranges) > 1:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                answers = list(pool.map(lambda span: self._request_with_retries([span]), ranges[1:]))
            found |= {span: content for answer in answers for span, content in answer.items()}
        return {span: found.get(span, b"") for span in [*found, *ranges]}

    def _request_with_retries(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Send one request for ranges, again after failures; ranges that the response lacks are empty."""
        with explained(self._repository.repo, self._repository.revision, self._path):
            for _ in range(TRIES - 1):
                try:
                    return self._send(ranges)
                except HfHubHTTPError as error:  # the server responded with an error
                    if error.response.status_code not in (401, 403) or self._location is None:
                        raise
                    self._location = None  # the storage's URLs expire
                except TransportError:  # the connection broke while the content was being sent
                    continue
            return self._send(ranges)

    def _request(self, ranges: Sequence[tuple[int, int]]) -> tuple[str, dict[str, str]]:
        """Return URL and headers of a request for ranges."""
        address, _, _ = self._resolved()
        headers = {"Range": "bytes=" + ",".join(f"{start}-{start + length - 1}" for start, length in ranges)}
        headers["Accept-Encoding"] = "identity"
        if urlsplit(address).netloc == urlsplit(HfApi().endpoint or constants.ENDPOINT).netloc:
            headers |= build_hf_headers(token=self._repository.access.token)
        return address, headers

    def _send(self, ranges: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Send one request and return the ranges in the response."""
        address, headers = self._request(ranges)
        broken: Exception | None = None
        body = b""
        with http_stream_backoff("GET", address, headers=headers, max_retries=TRIES) as response:
            if response.status_code == 206:
                try:
                    body = response.read()
                except TransportError as error:  # raised inside the `with`, it would start the client's own retries
                    broken = error
            elif response.status_code not in (200, 416) and (len(ranges) == 1 or response.status_code not in TOO_MANY):
                broken = _failure(response)
        if broken is not None:
            raise broken
        parts = _parts(response.headers, body, self.size)
        return {(start, length): _cut(parts, start, length) for start, length in ranges}

    def _stream(self, offset: int, length: int, chunk: int) -> Iterator[bytes]:
        """Yield one long range in chunks; after a broken connection it continues with the rest.

        Raises:
            _NoRanges: if the server does not respond with that range.
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
        """Yield the response to a request for one range as it arrives."""
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
    """The server does not send the requested part of a file."""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _failure(response: Any) -> Exception:
    """Return the client's error for a response."""
    try:
        hf_raise_for_status(response)
    except TransportError as error:
        return error
    return MissingFileError(f"The Hub responded {response.status_code} to a request for part of a file; try again.")


def _parts(headers: Any, body: bytes, size: int) -> list[tuple[int, bytes]]:
    """Return the parts of a partial response with their offsets; parts that do not fit the file are omitted."""
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
    """Return one part with its offset, if its announced range fits the file and the body."""
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None or match[3] not in ("*", str(size)):
        return []
    start, length = int(match[1]), int(match[2]) + 1 - int(match[1])
    return [(start, body[:length])] if len(body) >= length else []


def _cut(parts: list[tuple[int, bytes]], start: int, length: int) -> bytes:
    """Return the bytes of a range from the parts, empty if no part contains it."""
    for offset, content in parts:
        if offset <= start and start + length <= offset + len(content):
            return content[start - offset : start - offset + length]
    return b""
