"""Positions of the records in an ArrayRecord file, so that a single record can be read.

array_record reads local files only, and does not expose where a record is. An ArrayRecord file is a
Riegeli file (https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md) that
ends with a chunk of footers, one per data chunk, and a chunk that contains the position of the
footers. Hashes are not checked here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

BLOCK = 2**16  # bytes; each block starts with a header, also within a chunk
BLOCK_HEADER = 24
CHUNK_HEADER = 40
MAGIC = 0x71930E704FDAE05E  # of the last chunk
MAX_FOOTER = 2**28  # bytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Positions of the chunks of a file in which every chunk has the same number of records.

    Attributes:
        offsets: `(chunks + 1,)` int64: the start of each chunk, and the end of the last one.
        group_size: Number of records per chunk; the last chunk may have fewer.
    """

    offsets: np.ndarray
    group_size: int

    def range_of(self, record: int) -> tuple[int, int]:
        """Return the range of bytes `(start, stop)` of the blocks with the chunk of a record."""
        chunk = record // self.group_size
        start, stop = int(self.offsets[chunk]), int(self.offsets[chunk + 1])
        return start // BLOCK * BLOCK, -(-stop // BLOCK) * BLOCK

    @property
    def tail(self) -> int:
        """The start of the footers. The bytes from this block on are needed to open the file."""
        return int(self.offsets[-1]) // BLOCK * BLOCK


def read_layout(read: Callable[[int, int], bytes], size: int) -> Layout | None:
    """Read the layout of a file.

    Args:
        read: Function that returns the bytes of a range `(start, stop)` of the file.
        size: Size of the file.

    Returns:
        The layout; None if the footers are compressed or not as expected. The file must then be
        read completely.
    """
    try:
        [postscript, *_] = read_chunk(read, size - BLOCK, size)
        fields = _read_fields(postscript)
        if fields[2] != MAGIC:
            return None
        footers = [_read_fields(entry) for entry in read_chunk(read, fields[1], size)[1:]]
        offsets = np.array([entry[1] for entry in footers] + [fields[1]], np.int64)
        group_size = footers[0][3]
        counts = [entry[3] for entry in footers]
    except (IndexError, KeyError, ValueError, OverflowError):
        return None
    is_regular = counts[:-1] == [group_size] * (len(counts) - 1) and 0 < counts[-1] <= group_size
    is_ascending = offsets[0] >= 0 and (np.diff(offsets) > 0).all() and offsets[-1] <= size
    return Layout(offsets, group_size) if is_regular and is_ascending else None


def read_chunk(read: Callable[[int, int], bytes], position: int, size: int) -> list[bytes]:
    """Return the records of an uncompressed simple chunk. Its hashes are not checked.

    Args:
        read: Function that returns the bytes of a range `(start, stop)` of the file.
        position: Start of the chunk.
        size: Size of the file.

    Raises:
        ValueError: The chunk is compressed, of another type or damaged.
    """
    header, position = _read_across_blocks(read, position, CHUNK_HEADER, size)
    data, _ = _read_across_blocks(read, position, _data_size(header), size)
    return _split_records(data, 0)


def parse_chunk(data: bytes, position: int) -> list[bytes]:
    """Return the records of an uncompressed simple chunk. Its hashes are not checked.

    Args:
        data: The bytes of the chunk in the file.
        position: Start of the chunk in the file.

    Raises:
        ValueError: The chunk is compressed, of another type or damaged.
    """
    chunk = _remove_block_headers(data, position)
    if len(chunk) != CHUNK_HEADER + _data_size(chunk):
        raise ValueError("its size does not match its header")
    return _split_records(chunk, CHUNK_HEADER)


def _data_size(header: bytes) -> int:
    """Return the number of bytes of a chunk after its header."""
    size = int.from_bytes(header[8:16], "little")
    if header[24:25] != b"r" or size > MAX_FOOTER:
        raise ValueError("not a simple chunk of records")
    return size


def _split_records(data: bytes, start: int) -> list[bytes]:
    """Return the records of a chunk whose data after the header starts at `start`."""
    if data[start]:
        raise ValueError("compressed")
    length, i = _read_varint(data, start + 1)
    records, record_start = [], i + length  # the sizes come before the records
    end_of_sizes = record_start
    while i < end_of_sizes:
        size, i = _read_varint(data, i)
        records.append(data[record_start : record_start + size])
        record_start += size
    if record_start != len(data):
        raise ValueError("sizes of records do not match the chunk")
    return records


def _read_across_blocks(
    read: Callable[[int, int], bytes], position: int, length: int, size: int
) -> tuple[bytes, int]:
    """Return `length` bytes from a position on, without block headers, and the end position."""
    if position < 0:
        raise ValueError("negative position")
    if not position % BLOCK:
        position += BLOCK_HEADER
    # Bytes before the first block boundary after the position, then blocks with a header each.
    headers = max(0, -(-(length - (BLOCK - position % BLOCK)) // (BLOCK - BLOCK_HEADER)))
    end = position + length + headers * BLOCK_HEADER
    if end > size:
        raise ValueError("beyond the end of the file")
    return _remove_block_headers(read(position, end), position), end


def _remove_block_headers(data: bytes, position: int) -> bytes:
    """Return bytes of a file without the headers of blocks; `position` is that of the first."""
    first = -position % BLOCK
    if first >= len(data):
        return data
    view = memoryview(data)
    parts = [view[i + BLOCK_HEADER : i + BLOCK] for i in range(first, len(data), BLOCK)]
    return b"".join([view[:first], *parts])


def _read_fields(message: bytes) -> dict[int, int]:
    """Return the integer fields of a protobuf message: number → value."""
    fields, i = {1: 0, 2: 0, 3: 0}, 0  # fields with the value 0 are not written
    while i < len(message):
        key, i = _read_varint(message, i)
        if key & 7:
            raise ValueError("not an integer field")
        fields[key >> 3], i = _read_varint(message, i)
    return fields


def _read_varint(data: bytes, i: int) -> tuple[int, int]:
    """Return a variable-length integer and the position after it."""
    value = shift = 0
    while True:
        byte = data[i]
        i, value, shift = i + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, i
        if shift > 63:
            raise ValueError("an integer is too long")
