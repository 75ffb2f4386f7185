"""An ArrayRecord file, local or in the cache of remote files, of which single records are read."""

import contextlib
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxvid.block_cache import Pinned, address_of
from jaxvid.data.formats.array_record_layout import Layout, read_layout
from jaxvid.data.formats.jpeg_reader import keep_freed_memory
from jaxvid.data.formats.record_offsets import RecordOffsets, open_descriptor


class ArrayRecordFile:
    """A file of records. It is thread-safe.

    With `offsets`, records are read without array_record, which needs memory for each record.

    From a remote file, only the blocks that contain the requested records are read. Without
    `offsets`, the footers are read first, and a file with compressed footers is read completely.

    Args:
        path: The file.
        offsets: Offsets of the records of the split; None: unknown.
        first: Index of the file's first record in the split.
    """

    def __init__(self, path: str, offsets: RecordOffsets | None = None, first: int = 0):
        self._path, self._lock = path, threading.Lock()
        self._offsets, self._first = offsets, first
        self._is_remote = address_of(path) is not None
        self._layout: Layout | None = None
        self._has_layout = False  # whether `_layout` was read

    def _read_layout(self, pinned: Pinned) -> Layout | None:
        """Read the footers into the cache, and return the layout; None if it is not known."""
        pinned.fetch([])  # creates the sparse file if there is none yet
        with open(self._path, "rb") as file:

            def read(start: int, stop: int) -> bytes:
                pinned.fetch([(start, stop)])
                return os.pread(file.fileno(), stop - start, start)

            size = os.fstat(file.fileno()).st_size
            layout = read_layout(read, size)
            pinned.fetch(None if layout is None else [(layout.tail, size)])
            return layout

    @functools.cached_property
    def _reader(self) -> Any:
        """The thread-safe `ArrayRecordReader`, which reads the footers when it is made."""
        keep_freed_memory()
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(
            self._path,
            options="readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2**15,
        )

    def fetch(self, positions: Sequence[int]) -> None:
        """Read records of a remote file into the cache, with concurrent requests.

        Raises:
            FileNotFoundError: The file does not exist.
            InputError: The store cannot be reached or refuses access.
        """
        if self._is_remote:
            with Pinned(self._path) as pinned:
                self._fetch(pinned, positions)

    def _fetch(self, pinned: Pinned, positions: Sequence[int]) -> None:
        if self._offsets is not None:
            ranges = self._offsets.find_ranges([self._first + i for i in positions])
            if ranges is not None:
                pinned.fetch(ranges)
                return
        self._fetch_by_layout(pinned, positions)

    def _fetch_by_layout(self, pinned: Pinned, positions: Sequence[int]) -> None:
        with self._lock:
            if not self._has_layout:
                self._layout, self._has_layout = self._read_layout(pinned), True
        ranges = None if self._layout is None else [*map(self._layout.range_of, positions)]
        pinned.fetch(ranges)

    def read(self, positions: Sequence[int]) -> Iterator[bytes]:
        """Yield records.

        Raises:
            FileNotFoundError: The file does not exist.
            InputError: The store cannot be reached or refuses access.
            Exception: The file is damaged; the exceptions of array_record have no common base.
        """
        # The blocks of a remote file are usually in the cache. The CRC-32 of a record reveals if
        # they are not, so the file is not locked here.
        for position, data in zip(positions, self._read_at_offsets(positions), strict=True):
            yield self._read_again(position) if data is None else data

    def _read_again(self, position: int) -> bytes:
        """Return a record that cannot be read at its offset."""
        if not self._is_remote:
            return self._read_with_array_record(position, None)
        with Pinned(self._path) as pinned:  # the blocks stay until the record is read
            self._fetch(pinned, [position])
            [data] = self._read_at_offsets([position])
            if data is not None:
                return data
            self._fetch_by_layout(pinned, [position])
            return self._read_with_array_record(position, pinned)

    def _read_with_array_record(self, position: int, pinned: Pinned | None) -> bytes:
        """Return a record of a local file, or of a remote one whose blocks are in the cache."""
        with self._lock:
            reader = self._open(pinned)
        # A range, because `read([position])` takes time proportional to the number of records in
        # the file.
        [data] = reader.read(position, position + 1)
        return data

    @functools.cached_property
    def _descriptor(self) -> int:
        keep_freed_memory()
        return open_descriptor(self, self._path)

    def _read_at_offsets(self, positions: Sequence[int]) -> Iterable[bytes | None]:
        """Return records; None if the offset is unknown, or something is missing or damaged."""
        if self._offsets is not None:
            with contextlib.suppress(OSError):  # the file cannot be opened
                descriptor = self._descriptor
                return self._offsets.read([self._first + i for i in positions], descriptor)
        return [None] * len(positions)

    def _open(self, pinned: Pinned | None) -> Any:
        """Return the reader; make it when it is first needed."""
        if pinned is not None and self._layout is not None and "_reader" not in self.__dict__:
            # The footers may have been removed from the cache since the layout was read.
            pinned.fetch([(self._layout.tail, os.stat(self._path).st_size)])
        return self._reader
