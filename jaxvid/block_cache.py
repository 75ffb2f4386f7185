"""A bounded cache of remote files, which is shared by the processes of a machine.

The cache is a folder `jaxvid-objects` of sparse files: `s3/BUCKET/KEY` has the size of the object,
and contains those blocks of it that have been read. Therefore all code that lists folders or looks
at files works unchanged; only code that reads the contents calls `Pinned.fetch` first.
The modification time of a file is the `stamp` of the object's version.

`jaxvid-objects-state2` has a file of the same name: the stamp, then one byte per block, 1 if the
block is in the cache. A block is written before its byte, so a process may be killed at any time.
Readers hold a shared lock on this file. A process that frees space needs an exclusive lock, and
skips the files of readers. The files that were used least recently are freed first.
"""

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvid import object_store
from jaxvid.errors import COPIES, InputError
from jaxvid.object_store import ObjectInfo

_STATE = "-state2"  # the number changes with the size of the blocks
BLOCK = 2**14  # bytes
# Ranges with smaller gaps between them are read with one request: reading and writing such a gap
# needs less CPU time than another request.
MAX_GAP = 2**17
MAX_RANGE = 2**23  # bytes per request
MAX_BYTES = 2**27  # bytes of ranges that are read at the same time, and are in memory
FREE_SHARE = 0.1  # share of the cache that is freed when it is full
TOUCH_SECONDS = 60  # accuracy of the time of the last use
DEFAULT_GB = 20.0
_USAGE = struct.Struct("<qq")  # limit and used bytes
_STAMP = struct.Struct("<q")


def tree(folder: Path) -> Path:
    """Return the folder of the sparse files in a cache folder."""
    return folder / COPIES


def path_of(address: str, root: Path) -> Path:
    """Return the path of the copy of an address in the tree `root`."""
    scheme, _, key = address.partition("://")
    return root / scheme / key


class CopyPath(NamedTuple):
    """The parts of the path of a copy, `CACHE/TREE/KEY`.

    Attributes:
        cache: The cache folder.
        tree_name: Name of the tree, `COPIES` or `WORKDIRS`.
        key: `SCHEME/BUCKET/...`, or empty for the tree itself.
    """

    cache: str
    tree_name: str
    key: str

    @property
    def root(self) -> Path:
        """The tree that contains the copy."""
        return Path(self.cache, self.tree_name)

    @property
    def state_root(self) -> Path:
        """The folder of the state files of the tree."""
        return Path(self.cache, f"{self.tree_name}{_STATE}")

    @property
    def state(self) -> str:
        """The state file of the copy."""
        return f"{self.cache}/{self.tree_name}{_STATE}/{self.key}"


def split_path(path: str | os.PathLike, tree_name: str = COPIES) -> CopyPath | None:
    """Split the path of a copy; return None if the path is not in a folder named `tree_name`."""
    cache, marker, key = os.fspath(path).rpartition(f"/{tree_name}/")
    return CopyPath(cache, tree_name, key) if marker else None


def address_of(path: str | os.PathLike, tree_name: str = COPIES) -> str | None:
    """Return the address of a copy, or None if the path is not in a folder named `tree_name`."""
    copy = split_path(path, tree_name)
    scheme, _, key = copy.key.partition("/") if copy else ("", "", "")
    return f"{scheme}://{key}" if scheme in object_store.SCHEMES else None


def set_limit(folder: Path, max_gb: float) -> None:
    """Set the size limit of the cache in a folder, for all processes that use it.

    Raises:
        InputError: The folder cannot be written.
    """
    state = folder / f"{COPIES}{_STATE}"
    try:
        state.mkdir(parents=True, exist_ok=True)
        _count(state, 0, limit=int(max_gb * 1e9))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another cache folder"
        ) from None


def place(path: Path, info: ObjectInfo) -> None:
    """Create the sparse file of an object; empty it if it is that of another version."""
    try:
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (info.size, info.stamp):
            return
        with _locked(path, fcntl.LOCK_EX) as state:
            status = path.stat()
            # A process that was killed between writing a block and restoring the modification time
            # leaves the stamp in the state file.
            if (status.st_size, _read_stamp(state)) != (info.size, info.stamp):
                os.ftruncate(state, 0)
                os.truncate(path, 0)
                os.truncate(path, info.size)
            os.utime(path, ns=(status.st_atime_ns, info.stamp))
    except FileNotFoundError:
        _create(path, info)


def _create(path: Path, info: ObjectInfo) -> None:
    """Create a sparse file, unless another thread or process has created it.

    The caller may hold a shared lock, so none is acquired here. Other threads see the file only
    with its stamp.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.truncate(info.size)
        os.utime(partial, ns=(time.time_ns(), info.stamp))
        # The state of a deleted file. Losing marks of blocks is safe: they are read again.
        with contextlib.suppress(FileNotFoundError):
            os.truncate(split_path(path).state, 0)
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a copy whose object does not exist any more, unless a reader holds it."""
    with contextlib.suppress(BlockingIOError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
        os.ftruncate(file, 0)
        path.unlink(missing_ok=True)


def _read_stamp(state: int) -> int | None:
    """Return the stamp in a state file, or None if no block was ever written."""
    data = os.pread(state, _STAMP.size, 0)
    return _STAMP.unpack(data)[0] if len(data) == _STAMP.size else None


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[int]:
    """Open and lock the state file of a copy; yield its descriptor."""
    state = split_path(path).state
    try:
        descriptor = os.open(state, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(state), exist_ok=True)
        descriptor = os.open(state, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind)
        yield descriptor
    finally:
        os.close(descriptor)


class Pinned:
    """A file whose blocks stay in the cache until `close`. For other files it does nothing.

    Args:
        path: Any local path.

    Raises:
        InputError: The cache cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self._path, self._stack = path, contextlib.ExitStack()
        self._address, self._has_fetched = address_of(path), False
        if self._address is not None:
            try:
                self._state = self._stack.enter_context(_locked(Path(path), fcntl.LOCK_SH))
            except OSError as error:
                raise _not_written(path, error) from None

    @classmethod
    def whole_file(cls, path: str | os.PathLike) -> "Pinned":
        """Pin a file and read all of it, if it exists.

        Raises:
            InputError: As in `Pinned` and `fetch`.
        """
        pinned = cls(path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(pinned)
            with contextlib.suppress(FileNotFoundError):
                pinned.fetch()
            stack.pop_all()
        return pinned

    def fetch(self, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Read the missing blocks of ranges `(start, stop)`; None: of the whole file.

        A file that the store has, but which has no copy yet, gets one.

        Raises:
            FileNotFoundError: The file does not exist.
            InputError: The store cannot be reached or refuses access, or the cache cannot be
                written.
        """
        if self._address is None:
            return
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            if (info := object_store.info(self._address)) is None:
                raise
            place(Path(self._path), info)
            status = os.stat(self._path)
        if ranges is None:
            ranges = [(0, status.st_size)]
        missing = self._missing(ranges, status.st_size)
        if not missing:
            if time.time_ns() - status.st_atime_ns > TOUCH_SECONDS * 10**9:
                os.utime(self._path, ns=(time.time_ns(), self._stamp()))
            return
        for batch in _batches(missing):
            data = object_store.read_ranges(self._address, batch)
            try:
                self._store(batch, data)
            except OSError as error:
                raise _not_written(self._path, error) from None

    def _missing(self, ranges: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
        """Return the ranges of the missing blocks, joined and ascending."""
        joined, done = [], 0  # `done`: end of the blocks that were looked up
        for first, last in sorted(ranges):
            first, done = max(first // BLOCK, done), max(done, -(-min(last, size) // BLOCK))
            if first >= done:
                continue
            marks = os.pread(self._state, done - first, _STAMP.size + first)
            marks = marks.ljust(done - first, b"\0")
            i = marks.find(0)
            while i >= 0:
                start, stop = (first + i) * BLOCK, min((first + i + 1) * BLOCK, size)
                is_near = joined and start - joined[-1][1] <= MAX_GAP
                if is_near and stop - joined[-1][0] <= MAX_RANGE:
                    joined[-1] = joined[-1][0], stop
                else:
                    joined.append((start, stop))
                i = marks.find(0, i + 1)
        return joined

    def _stamp(self) -> int:
        """Return the stamp; write it to the state file before the first block is written."""
        if (stamp := _read_stamp(self._state)) is None:
            modified = os.stat(self._path).st_mtime_ns
            # Another thread may have begun to write blocks, which changes the modification time.
            if (stamp := _read_stamp(self._state)) is None:
                os.pwrite(self._state, _STAMP.pack(modified), 0)
                stamp = modified
        return stamp

    def _store(self, ranges: list[tuple[int, int]], data: list[bytes]) -> None:
        """Write blocks, and mark them as present."""
        # Counted first: a process that is killed may count too much, which the next search for
        # files to free corrects, but never too little.
        self._has_fetched, stamp = True, self._stamp()
        _count(split_path(self._path).state_root, sum(map(len, data)))
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            for (start, _), part in zip(ranges, data, strict=True):
                _write(descriptor, part, start)
            os.utime(descriptor, ns=(time.time_ns(), stamp))  # writing has changed the latter
        finally:
            os.close(descriptor)
        for start, stop in ranges:
            count = -(-stop // BLOCK) - start // BLOCK
            os.pwrite(self._state, b"\1" * count, _STAMP.size + start // BLOCK)

    def close(self) -> None:
        """Allow that the blocks are freed; free space if the cache is full."""
        if self._address is not None:
            self._stack.close()
        if self._has_fetched:
            with contextlib.suppress(OSError):
                _free_space(split_path(self._path).state_root)

    def __enter__(self) -> "Pinned":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield consecutive ranges `(start, stop)` of at most `MAX_BYTES` together."""
    batch, size = [], 0
    for start, stop in ranges:
        if batch and size + stop - start > MAX_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((start, stop))
        size += stop - start
    yield batch


def _not_written(path: str | os.PathLike, error: OSError) -> InputError:
    return InputError(
        f"{path}: its copy in the cache cannot be written ({error.strerror}); free disk space, or "
        "set a smaller data.cache_gb or another data.cache_dir"
    )


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _count(root: Path, num_bytes: int, *, limit: int | None = None) -> tuple[int, int]:
    """Add to the number of used bytes, or set the limit; return the limit and the used bytes."""
    descriptor = os.open(root / "usage", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        data = os.pread(descriptor, _USAGE.size, 0)
        stored = _USAGE.unpack(data) if len(data) == _USAGE.size else (int(DEFAULT_GB * 1e9), 0)
        values = stored[0] if limit is None else limit, max(0, stored[1] + num_bytes)
        if values != stored or not data:
            os.pwrite(descriptor, _USAGE.pack(*values), 0)
        return values
    finally:
        os.close(descriptor)


def _free_space(root: Path) -> None:
    """Free the least recently used files that no reader holds, if the cache is too large."""
    limit, used = _count(root, 0)
    if used <= limit:
        return
    objects = root.parent / COPIES
    entries, total = [], 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = objects / Path(folder, name).relative_to(root)
            with contextlib.suppress(OSError):
                status = path.stat()
                size = status.st_blocks * 512
                total += size
                if size:
                    entries.append((status.st_atime_ns, size, path))
    freed = 0
    for _, size, path in sorted(entries):
        if total - freed <= limit * (1 - FREE_SHARE):
            break
        with contextlib.suppress(OSError):  # a reader holds the lock
            _empty(path)
            freed += size
    _count(root, total - freed - used)


def _empty(path: Path) -> None:
    """Remove all blocks of a copy; raise a BlockingIOError if it is in use."""
    with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as state:
        status = path.stat()
        stamp = _read_stamp(state)
        os.ftruncate(state, 0)
        # Not replaced by a new file: other processes may have this one open.
        os.truncate(path, 0)
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns if stamp is None else stamp))
