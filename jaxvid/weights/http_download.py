"""Downloads of large files over HTTP that continue where they were interrupted.

`urllib` uses the proxies that `http_proxy`, `https_proxy` and `no_proxy` name.
"""

import contextlib
import dataclasses
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jaxvid.atomic import write_json
from jaxvid.errors import InputError, one_line
from jaxvid.files import check_room
from jaxvid.progress import Progress

TIMEOUT = 30.0  # seconds without any data after which a connection is closed
ATTEMPTS = 5  # consecutive connections without any data before the download fails
BACKOFF = 1.0  # seconds to wait per consecutive failure
MAX_CONNECTIONS = 100  # per download
BLOCK = 2**20  # maximum bytes per write
MEGABYTE = 10**6


class _IncompleteError(Exception):
    """The connection ended early, or the server has a problem that may be temporary."""


class _RefusedError(Exception):
    """The server does not offer the file."""


@dataclasses.dataclass(frozen=True)
class _Partial:
    """An incomplete download: `FILE.part`, and `FILE.part.json` with its validator.

    The validator is the `ETag` or `Last-Modified` header of the file. A server continues a download
    only if the validator has not changed, so that parts of two versions are never combined.
    """

    file: Path

    @property
    def info(self) -> Path:
        return self.file.with_name(f"{self.file.name}.json")

    def size(self) -> int:
        with contextlib.suppress(OSError):
            return self.file.stat().st_size
        return 0

    def validator(self, url: str) -> str:
        """Return the validator of the existing part; empty if it cannot be continued."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            info = json.loads(self.info.read_text(encoding="utf-8"))
            if info["url"] == url and self.size():
                return str(info["validator"])
        return ""

    def restart(self, url: str, validator: str) -> None:
        """Delete the existing part, and store the validator of the new one."""
        self.remove()
        write_json(self.info, {"url": url, "validator": validator})

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self.info.unlink(missing_ok=True)


def download(url: str, path: Path, *, remedy: str) -> None:
    """Download a file, and show the progress on stderr.

    An interrupted download leaves `FILE.part`, with which the next call continues. Only one process
    may download the same file at a time.

    Args:
        url: Address, `http://` or `https://`.
        path: The file. It appears when it is complete.
        remedy: What to do if the server does not deliver the file, for the message.

    Raises:
        InputError: The server cannot be reached, does not have the file, or closes the connection
            again and again; or the file cannot be written.
    """
    partial = _Partial(path.with_name(f"{path.name}.part"))
    largest, failures, has_received, reason = partial.size(), 0, False, ""
    for _ in range(MAX_CONNECTIONS):
        before = partial.size()
        try:
            _fetch(url, partial)
        except InputError:
            raise
        except _RefusedError as error:
            reason = str(error)
            break
        except (_IncompleteError, OSError, http.client.HTTPException, ValueError) as error:
            reason = one_line(getattr(error, "reason", None) or error)
        else:
            with _write_errors(path):
                partial.file.replace(path)
                partial.remove()
            return
        has_received = has_received or partial.size() != before
        is_further = partial.size() > largest and partial.validator(url)
        failures = 0 if is_further else failures + 1
        largest = max(largest, partial.size())
        if not has_received or failures == ATTEMPTS:
            break
        time.sleep(BACKOFF * failures)
    if partial.validator(url):
        reason += f"; {partial.size() / MEGABYTE:.1f} MB are kept for the next attempt"
    raise InputError(f"{url} cannot be downloaded ({reason}); {remedy}")


def _fetch(url: str, partial: _Partial) -> None:
    """Download the rest of a file in one connection.

    Raises:
        _IncompleteError: The connection ended before the end of the file.
        _RefusedError: The server does not offer the file.
        InputError: The file cannot be written.
        OSError, http.client.HTTPException, ValueError: The connection failed.
    """
    headers = {"User-Agent": "jaxvid", "Accept-Encoding": "identity"}
    if validator := partial.validator(url):
        headers |= {"Range": f"bytes={partial.size()}-", "If-Range": validator}
    try:
        request = urllib.request.Request(url, headers=headers)
        opener = urllib.request.build_opener()  # reads the proxies from the environment
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            _handle_status(error, partial)
        return
    with response:
        offset, total = _body_range(response)
        if offset != partial.size() or not validator:
            offset = 0
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                partial.remove()
                raise _IncompleteError("the server sent a different part")
            with _write_errors(partial.file):
                partial.restart(url, _read_validator(response))
        if total is not None:
            check_room(partial.file, total - offset)
        _write_body(response, partial, total)
    if total is not None and partial.size() != total:
        raise _IncompleteError(f"{partial.size()} of {total} bytes received")


def _handle_status(error: urllib.error.HTTPError, partial: _Partial) -> None:
    """Return if an error status means that the existing part is the complete file.

    Raises:
        _IncompleteError: The part cannot be continued, or the server has a temporary problem.
        _RefusedError: The server does not offer the file.
    """
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if error.headers.get("Content-Range") == f"bytes */{partial.size()}":
            return
        partial.remove()
        raise _IncompleteError("the server has a different file")
    reason = f"the server answered {error.code} {one_line(error.reason)}"
    temporary = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
    if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR or error.code in temporary:
        raise _IncompleteError(reason)
    raise _RefusedError(reason)


def _body_range(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the offset of a response's body in the file, and the size of the file if known."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
        if not match:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers["Content-Length"]
    return 0, int(length) if length and length.isdecimal() else None


def _read_validator(response: http.client.HTTPResponse) -> str:
    """Return the header that identifies the version of a file; empty if there is none."""
    etag = response.headers["ETag"] or ""
    if etag.startswith('"'):  # a weak ETag, W/"...", cannot be used to continue
        return etag
    return response.headers["Last-Modified"] or ""


def _write_body(response: http.client.HTTPResponse, partial: _Partial, total: int | None) -> None:
    """Append the body of a response to the partial file."""
    with contextlib.ExitStack() as stack:
        with _write_errors(partial.file):
            file = stack.enter_context(partial.file.open("ab"))
        progress = None
        if total is not None:
            progress = Progress(
                total // MEGABYTE,
                title=f"downloading {partial.file.stem}",
                unit="MB",
                done=file.tell() // MEGABYTE,
            )
            stack.callback(progress.close)
        while block := response.read1(BLOCK):
            with _write_errors(partial.file):
                file.write(block)
            if progress:
                progress.advance(file.tell() // MEGABYTE - progress.done)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Convert errors of the local disk to an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); free disk space, or set JAXVID_CACHE "
            "to another folder"
        ) from None
