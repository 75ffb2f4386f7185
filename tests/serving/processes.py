"""Decoder processes that run on this machine."""

import contextlib
from pathlib import Path

MARK = (
    "LC_DECODERS_OF"  # variable for the mark; decoder processes inherit names that start with LC_
)


def decoder_processes(mark: str) -> set[int]:
    """Return the ids of decoder processes that have not ended.

    Args:
        mark: Text in their environment, which distinguishes them from those of other tests.
    """
    processes = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_decoder = b"decoder_process" in (folder / "cmdline").read_bytes()
            is_decoder &= mark.encode() in (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if is_decoder and state != "Z":
                processes.add(int(folder.name))
    return processes
