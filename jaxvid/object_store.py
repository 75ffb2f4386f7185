"""Access to files in object stores and on web servers through fsspec, with retries.

An address is `SCHEME://BUCKET/KEY` with one of `SCHEMES`. Credentials and endpoints come from the
environment of the client, e.g. `AWS_ENDPOINT_URL` for s3fs.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from jaxvid import signed_urls
from jaxvid.errors import InputError, one_line

# Scheme → package that fsspec needs for it.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "https": "aiohttp", "http": "aiohttp", "memory": "fsspec"}
ATTEMPTS = 8  # of a request, including the first
_ATTEMPTS_GCS = 2  # gcsfs itself sends each request up to six times, within half a minute
BACKOFF = 0.1  # seconds before the second attempt; doubled before each further attempt
MAX_WAIT = 20.0  # maximum seconds between two attempts
MAX_WRITE = 2**26  # bytes that are written with one request
MAX_REQUESTS = 16  # concurrent requests of one call

# Scheme → options of its client, in seconds. A connection without data is closed and made again.
_OPTIONS = {
    "s3": {
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 20, "signature_version": "s3v4"}
    }
}

# gcsfs logs tracebacks of errors that `call` reports in one line.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

# `Path` replaces `//` by `/`.
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}(?=[^/])")
# Errors for which a retry is useless. FileNotFoundError and FileExistsError are raised
# unchanged.
_PERMANENT = (ImportError, PermissionError, TypeError, NotImplementedError, IsADirectoryError)
_PERMANENT_WORDS = ("credential", "forbidden", "denied", "unauthorized", "not valid", "invalid")
# Keys of fsspec's file information that identify the version of a file, in order of preference.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "crc32c", "Content-MD5", "Digest"),
    *("mtime", "updated", "LastModified", "Last-Modified", "created"),
)


@dataclasses.dataclass(frozen=True)
class ObjectInfo:
    """A file in an object store.

    Attributes:
        size: Size in bytes.
        stamp: 47-bit hash of its size and version (`_VERSIONS`).
    """

    size: int
    stamp: int


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is an address of an object store or web server."""
    return bool(_ADDRESS.match(os.fspath(path)))


def to_address(path: str | os.PathLike) -> str:
    """Return the address that a path names, also if `Path` has removed a slash from it.

    Raises:
        InputError: The address has an empty part or the part `.` or `..`.
    """
    address = _ADDRESS.sub(r"\1://", os.fspath(path), count=1).rstrip("/")
    if not is_safe(address.partition("://")[2]):
        raise InputError(f"{address}: has an empty part, '.' or '..'; correct the address")
    return address


def is_safe(key: str) -> bool:
    """Return whether a key can be the relative path of a local file."""
    return "\0" not in key and not {"", ".", ".."} & {*key.split("/")}


def info(address: str) -> ObjectInfo | None:
    """Return the size and version of a file, or None if there is no such file.

    Raises:
        InputError: The store cannot be reached or refuses access.
    """
    try:
        entry = call(address, lambda fs, path: fs.info(path, **_refresh(fs)))
    except FileNotFoundError:
        return None
    is_index = address.startswith("http") and "html" in str(entry.get("mimetype"))
    return None if entry["type"] == "directory" or is_index else _to_info(entry)


def find(address: str) -> dict[str, ObjectInfo]:
    """Return the files below an address: path relative to the address → size and version.

    Objects whose key cannot be the path of a local file are left out.

    Raises:
        InputError: The store cannot be reached or refuses access, or the bucket does not exist.
    """

    def list_files(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict]:
        fs.invalidate_cache()
        root = fs._strip_protocol(path).rstrip("/")
        entries = fs.find(root, detail=True)
        if not entries and not fs.exists(root.partition("/")[0] if _has_buckets(address) else root):
            raise FileNotFoundError(root)
        if any(entry.get("size") is None for entry in entries.values()):  # index pages of a server
            entries = {name: fs.info(name) for name in entries}
        return {name[len(root) :].lstrip("/"): entry for name, entry in entries.items()}

    try:
        entries = call(address, list_files)
    except FileNotFoundError:
        if not _has_buckets(address):
            return {}
        bucket = "/".join(address.split("/")[:3])
        raise InputError(f"{bucket}: no such bucket; correct the address") from None
    return {
        name: _to_info(entry)
        for name, entry in entries.items()
        if is_safe(name) and entry["type"] != "directory"
    }


def read_ranges(address: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read ranges `(start, stop)` of a file, with concurrent requests.

    Only ranges whose request failed are requested again.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The store cannot be reached or refuses access, or the file is shorter.
    """
    parts: list[bytes | None] = [None] * len(ranges)

    def read_missing(fs: fsspec.AbstractFileSystem, path: str) -> None:
        if "s3" in fs.protocol and len(ranges) > 1 and not any(parts):
            parts[:] = signed_urls.read_ranges(fs, path, ranges, MAX_REQUESTS)
        missing = [i for i, part in enumerate(parts) if part is None]
        if not missing:
            return
        starts = [ranges[i][0] for i in missing]
        stops = [ranges[i][1] for i in missing]
        if len(missing) == 1:
            read = [fs.cat_file(path, start=starts[0], end=stops[0])]
        else:
            options = {"batch_size": MAX_REQUESTS} if fs.async_impl else {}
            paths = [path] * len(missing)
            read = fs.cat_ranges(paths, starts, stops, on_error="return", **options)
        failure = None
        for i, part in zip(missing, read, strict=True):
            start, stop = ranges[i]
            if isinstance(part, bytes) and len(part) > stop - start:
                part = part[start:stop]  # a web server without range requests sends the whole file
            if not isinstance(part, bytes):
                failure = part
            elif len(part) != stop - start:
                failure = OSError(f"{len(part)} bytes received, {stop - start} requested")
            else:
                parts[i] = part
        if failure is not None:
            raise failure

    call(address, read_missing)
    return parts


def read(address: str) -> bytes | None:
    """Return the contents of a small file, or None if there is no such file.

    Raises:
        InputError: The store cannot be reached or refuses access.
    """
    try:
        return call(address, lambda fs, path: fs.cat_file(path))
    except FileNotFoundError:
        return None


def create(address: str, data: bytes) -> bool:
    """Write a file unless it exists; return whether it was written.

    S3 and Google Cloud Storage do this atomically. Some other S3 servers ignore the condition and
    replace the file.

    Raises:
        InputError: As in `write`.
    """
    try:
        with _missing_bucket(address):
            call(address, lambda fs, path: fs.pipe_file(path, data, mode="create"))
    except FileExistsError:
        return False
    return True


def write(address: str, data: bytes) -> None:
    """Write a file. Other programs see it only when it is complete.

    Raises:
        InputError: The store cannot be reached or refuses access, or there is no such bucket.
    """
    with _missing_bucket(address):
        call(address, lambda fs, path: fs.pipe_file(path, data))


def upload(file: Path, address: str) -> None:
    """Write a local file to an address, as `write` does.

    Raises:
        FileNotFoundError: There is no local file.
        InputError: As in `write`.
    """
    if file.stat().st_size <= MAX_WRITE:
        write(address, file.read_bytes())  # a larger file that grows must not be read as a whole
        return
    with _missing_bucket(address):
        call(address, lambda fs, path: fs.put_file(str(file), path))


@contextlib.contextmanager
def _missing_bucket(address: str) -> Iterator[None]:
    """Turn the FileNotFoundError of a write into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{address} cannot be written ({one_line(error)}); correct the address"
        ) from None


class RemoteFile:
    """A file at an address, with some of the attributes and methods of `Path`.

    Args:
        address: The address.
    """

    def __init__(self, address: str):
        self._address = address

    def __str__(self) -> str:
        return self._address

    @property
    def name(self) -> str:
        """The part of the address after the last slash."""
        return self._address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return os.path.splitext(self.name)[1]

    def with_name(self, name: str) -> "RemoteFile":
        """Return the file with another name in the same folder."""
        return RemoteFile(f"{self._address.rpartition('/')[0]}/{name}")

    def write_bytes(self, data: bytes) -> None:
        """Write the file; see `write`."""
        write(self._address, data)

    def check_writable(self) -> None:
        """Write and delete another file in the same folder.

        Raises:
            InputError: As in `write`.
        """

        def probe(fs: fsspec.AbstractFileSystem, path: str) -> None:
            folder, _, name = path.rpartition("/")
            fs.pipe_file(f"{folder}/.{name}.probing", b"")
            fs.rm_file(f"{folder}/.{name}.probing")

        with _missing_bucket(self._address):
            call(self._address, probe)


def delete(addresses: Iterable[str]) -> None:
    """Delete files; those that do not exist are ignored.

    Raises:
        InputError: The store cannot be reached or refuses access.
    """
    for address in addresses:
        with contextlib.suppress(FileNotFoundError):
            call(address, lambda fs, path: fs.rm_file(path))


def call(address: str, function: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
    """Call a function of a file system and a path; repeat it after errors that may be temporary.

    Args:
        address: The address, which fsspec translates into the arguments of `function`.
        function: Any function that may be called repeatedly.

    Raises:
        FileNotFoundError: Raised by `function`.
        FileExistsError: Raised by `function`.
        InputError: The client is not installed, access is refused, or all attempts failed.
    """
    scheme = address.partition("://")[0]
    attempts = _ATTEMPTS_GCS if scheme == "gs" else ATTEMPTS
    for attempt in range(attempts):
        try:
            fs, path = fsspec.core.url_to_fs(address, **_OPTIONS.get(scheme, {}))
            return function(fs, path)
        except ImportError as error:
            raise InputError(
                f"{address}: needs {SCHEMES[scheme]} ({one_line(error)}); pip install "
                f"{SCHEMES[scheme]}"
            ) from None
        except Exception as error:  # each client has exceptions of its own
            cause = _cause(address, error)
            if isinstance(cause, FileNotFoundError | FileExistsError):
                raise
            reason = f"{type(cause).__name__}: {one_line(cause)}"
            if isinstance(cause, _PERMANENT) or any(
                word in reason.lower() for word in _PERMANENT_WORDS
            ):
                raise InputError(
                    f"{address}: access refused ({reason}); check the address, your credentials "
                    "and your access rights"
                ) from None
        if attempt + 1 < attempts:
            # Random waits, so that many processes do not repeat their requests at the same time.
            time.sleep(min(MAX_WAIT, BACKOFF * 2**attempt) * random.uniform(0.5, 1.5))
    raise InputError(
        f"{address}: {attempts} requests failed, the last with {reason}; check the network and the "
        "endpoint, then run the same command again"
    )


def _cause(address: str, error: Exception) -> BaseException:
    """Return the cause of a FileNotFoundError that is due to a connection to a web server.

    fsspec raises it for every problem of such a connection. Other errors are returned unchanged.
    """
    cause = error.__cause__
    is_missing = cause is None or getattr(cause, "status", None) in (404, 410)
    is_hidden = address.startswith("http") and isinstance(error, FileNotFoundError)
    return cause if is_hidden and not is_missing else error


def _has_buckets(address: str) -> bool:
    return address.startswith(("s3://", "gs://"))


def _refresh(fs: fsspec.AbstractFileSystem) -> dict[str, bool]:
    """Return the option that makes `info` of s3fs ask the server."""
    return {"refresh": True} if "s3" in fs.protocol else {}


def _to_info(entry: dict) -> ObjectInfo:
    size = int(entry["size"] or 0)
    version = next((entry[key] for key in _VERSIONS if entry.get(key)), "")
    if isinstance(version, datetime.datetime):  # the memory file system lists seconds
        version = version.timestamp()
    digest = hashlib.sha256(f"{size} {version}".encode(errors="surrogateescape")).digest()
    return ObjectInfo(size, int.from_bytes(digest[:6], "big") >> 1)
