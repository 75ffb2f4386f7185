"""Offsets and checksums of the records of a pack, in one file per split.

array_record needs 8 bytes of memory per record in every process, because it reads the footers of a
file when it opens it. With this file, a record is read without the footers: its row is read from
the disk first. The CRC-32 in the row detects damage; array_record then reads the record again and
reports it. The file is optional, and other programs that read the pack do not need it.

The rows and records of a remote pack are read from the copies in the cache. Blocks that are missing
there are zeros, so the CRC-32 reveals them too.

The file starts with `MAGIC`. A row of 16 bytes follows for each record of the split.
"""

import functools
import os
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid.atomic import replacing
from jaxvid.block_cache import Pinned
from jaxvid.data.formats.array_record_layout import parse_chunk, read_layout
from jaxvid.errors import InputError, one_line
from jaxvid.files import open_regular

MAGIC = b"jaxvid offsets 1"
# Start and size of the chunk that contains the record, and CRC-32 of the record.
ROW = np.dtype([("start", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
_ROW = struct.Struct("<QII")
MAX_CHUNK = 2**28  # bytes; larger records are read by array_record
MAX_SPAN = 2**16  # bytes of rows that are read at once
NOTED_MEGABYTES = 50
READ_RECORDS = 64  # number of records that are in memory at the same time


def offsets_path(folder: Path, split: str) -> Path:
    """Return the path of the file of a split."""
    return folder / f"{split}_offsets.bin"


def find_offsets(path: str | Path) -> np.ndarray | None:
    """Return the rows of all records of an ArrayRecord file.

    Args:
        path: The file.

    Returns:
        `(records,)` array of dtype `ROW`; None if the chunks are compressed or have several
        records.

    Raises:
        InputError: The file is damaged: array_record cannot read it or finds a wrong hash.
    """
    try:
        return _find_offsets(path)
    except Exception as error:  # exceptions of array_record have no common base
        raise InputError(
            f"{path}: is damaged ({one_line(error)}); delete it and run prepare again"
        ) from None


def _find_offsets(path: str | Path) -> np.ndarray | None:
    from array_record.python.array_record_module import ArrayRecordReader

    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = ArrayRecordReader(str(path), options=options, file_reader_buffer_size=2**20)
    if not reader.ok():  # it then has no records
        raise ValueError("its footers cannot be read")
    rows = np.zeros(reader.num_records(), ROW)
    if not len(rows):
        return rows
    with open(path, "rb") as file:
        layout = read_layout(
            lambda start, stop: os.pread(file.fileno(), stop - start, start),
            os.fstat(file.fileno()).st_size,
        )
    if layout is None or layout.group_size != 1 or len(layout.offsets) != len(rows) + 1:
        return None
    rows["start"], rows["size"] = layout.offsets[:-1], np.diff(layout.offsets)
    for start in range(0, len(rows), READ_RECORDS):
        part = rows["crc32"][start : start + READ_RECORDS]
        part[:] = [*map(zlib.crc32, reader.read(start, start + len(part)))]
    return rows


def join_offsets(parts: Iterable[Path], path: Path) -> None:
    """Write the file of a split from the files of its parts, each of which has rows only.

    Raises:
        InputError: The file cannot be written.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(MAGIC)
        for part in parts:
            with open(part, "rb") as rows:
                shutil.copyfileobj(rows, file)


def note_memory(folder: str, num_records: int) -> tuple[str, ...]:
    """Return a line for the log if reading a pack without offsets needs much memory.

    Args:
        folder: The pack.
        num_records: Number of records whose offsets are unknown.
    """
    megabytes = num_records * 8 / 1e6
    if megabytes < NOTED_MEGABYTES:
        return ()
    return (
        f"{folder}: without {offsets_path(Path(), 'SPLIT')}, each process needs {megabytes:.0f} MB "
        "for the positions of the records; to write it, run the same prepare command again",
    )


class RecordOffsets:
    """The open file of a split. It can be pickled and is thread-safe.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self._path = path

    @classmethod
    def open(cls, path: Path, num_records: int) -> "RecordOffsets | None":
        """Open the file of a split with `num_records` records.

        Returns:
            The offsets, or None if the file does not exist.

        Raises:
            InputError: The file cannot be read or is not that of this split; or it is remote, and
                the store cannot be reached or refuses access.
        """
        if not os.path.lexists(path):
            return None
        try:
            with Pinned(path) as pinned, open_regular(path) as file:
                pinned.fetch([(0, len(MAGIC))])
                size = os.fstat(file.fileno()).st_size
                is_valid = size == len(MAGIC) + num_records * ROW.itemsize
                is_valid = is_valid and file.read(len(MAGIC)) == MAGIC
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); restore it") from None
        if not is_valid:
            raise InputError(
                f"{path}: does not match the pack; delete it, or run prepare again to write it"
            )
        return cls(path)

    @functools.cached_property
    def _descriptor(self) -> int:
        return open_descriptor(self, self._path)

    def find_ranges(self, records: Sequence[int]) -> list[tuple[int, int]] | None:
        """Return the ranges of bytes `(start, stop)` that contain records of a remote file.

        Args:
            records: Indices of records in the split; all in the same file.

        Returns:
            A range per record; None if a row is damaged, or the file does not exist any more.

        Raises:
            InputError: The store cannot be reached or refuses access.
        """
        try:
            with Pinned(self._path) as pinned:
                pinned.fetch([_range_of_rows(records)])
                rows = self._read_rows(records)
        except (OSError, struct.error):
            return None
        if not all(0 < size <= MAX_CHUNK for _, size, _ in rows):
            return None
        return [(start, start + size) for start, size, _ in rows]

    def read(self, records: Sequence[int], descriptor: int) -> Iterator[bytes | None]:
        """Read records of the split.

        Args:
            records: Indices of records in the split.
            descriptor: The open ArrayRecord file that contains them.

        Yields:
            Each record; None if it or a row is damaged.
        """
        try:
            rows = self._read_rows(records)
        except (OSError, struct.error):
            rows = [None] * len(records)
        for row in rows:
            yield None if row is None else _read_record(descriptor, *row)

    def _read_rows(self, records: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return the start, size and CRC-32 of records; rows between them are read too."""
        start, stop = _range_of_rows(records)
        if stop - start > MAX_SPAN:
            return [row for record in records for row in self._read_rows([record])]
        data = os.pread(self._descriptor, stop - start, start)
        return [_ROW.unpack_from(data, _row_position(record) - start) for record in records]

    def __reduce__(self) -> tuple:
        return RecordOffsets, (self._path,)


def _range_of_rows(records: Sequence[int]) -> tuple[int, int]:
    """Return the range of bytes `(start, stop)` from the first to the last row of records."""
    start = _row_position(min(records, default=0))
    return start, _row_position(max(records, default=-1) + 1)


def _row_position(record: int) -> int:
    """Return the position of a record's row in the file of a split."""
    return len(MAGIC) + record * _ROW.size


def _read_record(descriptor: int, start: int, size: int, crc32: int) -> bytes | None:
    """Return the record in a chunk; None if it or its row is damaged."""
    if size > MAX_CHUNK:
        return None
    try:
        [data] = parse_chunk(os.pread(descriptor, size, start), start)
    except (OSError, ValueError, IndexError, OverflowError):
        return None
    return data if zlib.crc32(data) == crc32 else None


def open_descriptor(owner: object, path: str | Path) -> int:
    """Open a file for reading until `owner` is deleted; return the descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor
