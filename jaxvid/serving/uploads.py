"""Receive the body of a request into an unnamed file, within limits."""

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from jaxvid.errors import short_repr
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Limits

FIELD = "video"  # name of the form field that has the video
FORM_BYTES = 100_000  # allowed in addition to the videos of a form: boundaries and headers
MAX_OTHER_FIELDS = 100  # of a form; millions of small fields would keep the server busy for minutes
JSON_BYTES = 10_000
MEMORY_BYTES = 2**20  # maximum size of a body that is held in memory
# `curl --data-binary @FILE` sends the type of an HTML form.
RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded", "image/gif")


class Upload:
    """A received body. The system deletes the file when it is closed.

    Attributes:
        file: Unnamed file, in memory or in the folder for temporary files.
        parts: Start and size in bytes of each part of the file: one video, or several images.
        url: URL of the video, instead of a file; empty: none.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.url = file, ""
        self.parts: list[tuple[int, int]] = []

    @property
    def fd(self) -> int:
        """Descriptor of the file."""
        return self.file.fileno()


@contextlib.asynccontextmanager
async def receive(request: Request, limits: Limits, *, max_parts: int = 1) -> AsyncIterator[Upload]:
    """Receive the body of a request: a video, a form with videos, or JSON with a URL.

    Args:
        request: The request.
        limits: Limits of the body.
        max_parts: Maximum number of fields `video` of a form.

    Yields:
        The upload, whose file is closed at the end of the context.

    Raises:
        RequestError: The body is empty, too large, too slow, malformed or of another type.
        ClientDisconnect: The client has closed the connection.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    kind = kind.decode("latin-1")
    with _make_file(request, kind) as file:
        upload = Upload(file)
        if kind == "multipart/form-data":
            await _receive_form(request, limits, upload, options.get(b"boundary", b""), max_parts)
        elif kind == "application/json":
            upload.url = await _receive_url(request, limits)
        elif kind in RAW_TYPES or kind.startswith("video/"):
            await _receive_raw(request, limits, upload)
        else:
            raise RequestError(
                415,
                f"Content-Type: expected video/*, application/octet-stream or multipart/form-data, "
                f"got {short_repr(kind)}",
            )
        yield upload


def _make_file(request: Request, kind: str) -> BinaryIO:
    """Return an unnamed file for a video: in memory if the body is the video and is small."""
    is_url = kind == "application/json"
    if is_url or _declared_size(request, MEMORY_BYTES + 1) > MEMORY_BYTES:
        return tempfile.TemporaryFile(buffering=0)
    return os.fdopen(os.memfd_create("upload"), "w+b", buffering=0)


def _declared_size(request: Request, unknown: int) -> int:
    """Return the size of a body according to its headers, or `unknown`."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else unknown


async def read_body(
    request: Request, limits: Limits, max_bytes: int, *, overhead: int = 0
) -> AsyncIterator[bytes]:
    """Yield the chunks of a body.

    Args:
        request: The request.
        limits: Limits of the time.
        max_bytes: Maximum size. The declared size is checked first.
        overhead: Number of bytes that are allowed in addition.

    Raises:
        RequestError: The body is too large or too slow.
        ClientDisconnect: The client has closed the connection.
    """
    if _declared_size(request, 0) > max_bytes + overhead:
        raise _too_large(max_bytes)
    loop = asyncio.get_running_loop()
    start, size = loop.time(), 0
    async with contextlib.aclosing(request.stream()) as stream:
        while True:
            seconds, problem = min(
                (
                    limits.upload_seconds,
                    f"the upload takes longer than {limits.upload_seconds:g} s",
                ),
                (
                    limits.stall_seconds + size / limits.upload_rate,
                    f"the upload is slower than {limits.upload_rate / 1000:g} kB/s",
                ),
                (
                    limits.stall_seconds + loop.time() - start,
                    f"no data of the body for {limits.stall_seconds:g} s",
                ),
            )
            try:
                async with asyncio.timeout_at(start + seconds):
                    chunk = await anext(stream, b"")
            except TimeoutError:
                raise RequestError(408, f"{problem}; try again") from None
            if not chunk:
                return
            size += len(chunk)
            if size > max_bytes + overhead:
                raise _too_large(max_bytes)
            yield chunk


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(
        413, f"the body is larger than the limit of {max_bytes / 1e6:g} MB; send a smaller one"
    )


def _empty(reason: str) -> RequestError:
    return RequestError(400, f"{reason}; send a video, e.g. curl -F {FIELD}=@FILE URL")


async def _receive_raw(request: Request, limits: Limits, upload: Upload) -> None:
    """Receive a body that is the video itself."""
    size = 0
    async for chunk in read_body(request, limits, limits.upload_bytes):
        size += upload.file.write(chunk)
    if not size:
        raise _empty("the body is empty")
    upload.parts.append((0, size))


async def _receive_url(request: Request, limits: Limits) -> str:
    """Receive `{"url": ...}`; return the URL."""
    body = b"".join([chunk async for chunk in read_body(request, limits, JSON_BYTES)])
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or [*value] != ["url"] or not isinstance(value["url"], str):
        raise RequestError(400, 'the body: expected JSON {"url": "https://..."}')
    return value["url"]


# ------------------------------------------------------------------ forms


async def _receive_form(
    request: Request, limits: Limits, upload: Upload, boundary: bytes, max_parts: int
) -> None:
    """Receive the fields `video` of a form; other fields are ignored."""
    if not boundary:
        raise RequestError(400, "Content-Type: multipart/form-data has no boundary")
    receiver = _FormReceiver(upload, max_parts)
    try:
        parser = MultipartParser(boundary, receiver.callbacks())
        async for chunk in read_body(request, limits, limits.upload_bytes, overhead=FORM_BYTES):
            parser.write(chunk)
            receiver.check()
        parser.finalize()
    except FormParserError as error:
        raise RequestError(400, f"the form is malformed ({error}); send it again") from None
    if not receiver.is_complete:
        raise RequestError(400, "the form has no closing boundary; send it again")
    if not upload.parts:
        raise _empty(f"the form has no field {FIELD}")
    if not all(size for _, size in upload.parts):
        raise _empty(f"the field {FIELD} is empty")


class _FormReceiver:
    """Writes the fields `video` of a form to a file, one after the other.

    Args:
        upload: The file and its parts.
        max_parts: Maximum number of parts.

    Attributes:
        is_complete: Whether the closing boundary has arrived.
    """

    def __init__(self, upload: Upload, max_parts: int):
        self._upload, self._max_parts = upload, max_parts
        self._name, self._value, self._is_video = b"", b"", False
        self._size = self._num_fields = 0
        self.is_complete = False

    def callbacks(self) -> dict[str, Callable]:
        """Return the callbacks of the parser."""
        names = ("header_begin", "header_field", "header_value", "header_end", "part_begin")
        names += ("part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def check(self) -> None:
        """Refuse a form with too many videos or other fields.

        Raises:
            RequestError: There are too many.
        """
        if len(self._upload.parts) > self._max_parts:
            raise RequestError(
                400, f"the form has too many fields {FIELD}; send at most {self._max_parts}"
            )
        limit = self._max_parts + MAX_OTHER_FIELDS
        if self._num_fields > limit:
            raise RequestError(400, f"the form has more than {limit} fields; send only {FIELD}")

    def _header_begin(self) -> None:
        self._name = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if options.get(b"name") == FIELD.encode():
                self._is_video = True

    def _part_begin(self) -> None:
        self._num_fields += 1
        self._is_video = False

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_video:
            self._size += self._upload.file.write(data[start:end])

    def _part_end(self) -> None:
        if self._is_video:
            start = sum(self._upload.parts[-1]) if self._upload.parts else 0
            self._upload.parts.append((start, self._size - start))

    def _end(self) -> None:
        self.is_complete = True
