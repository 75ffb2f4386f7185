"""Parts of a pack: their files and their state files, written by threads or by workers of Beam."""

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxvid.atomic import write_file
from jaxvid.data.check import Finding
from jaxvid.data.formats import pack_writer
from jaxvid.data.formats.pack_writer import Clip, Part, Settings, encode
from jaxvid.data.formats.record_offsets import find_offsets
from jaxvid.data.formats.xvit_hdf5 import write_h5


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; file names in the text need not be UTF-8."""
    write_file(path, text.encode("utf-8", "surrogateescape"), writer=str(os.getpid()))


def write_part(
    part: Part, clips: Iterator[Clip], output: Path, settings: Settings, labels: list[str], tag: str
) -> None:
    """Write the files of a part under temporary names, rename them, and write its state file."""
    start, rows, findings, files = time.monotonic(), [], [], {}
    partials = output / ".parts"

    def readable() -> Iterator[tuple[str, Clip]]:
        """Yield the names and clips of readable videos; collect `findings` and `rows` of all."""
        for name, clip in zip(part.names, clips, strict=True):
            findings.append(clip.finding)
            has_times = int(clip.times is not None)
            # Broken videos have a row with zero frames, because evaluation must count them.
            rows.append([name, clip.finding.id, clip.label, len(clip.jpegs), clip.fps, has_times])
            if clip.jpegs:
                yield name, clip

    def commit(partial: Path, name: str) -> None:
        """Give a complete file its final name."""
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = partial.stat().st_size
        os.replace(partial, output / name)

    if settings.format == "arrayrecord":
        examples = (
            example
            for _, clip in readable()
            for example in pack_writer.make_examples(clip, settings.frames_per_record)
        )
        name = pack_writer.array_record_name(part.split, part.number, part.count)
        partial = partials / f"{name}{tag}"
        pack_writer.write_array_record(partial, examples, labels)
        offsets = find_offsets(partial)  # also reads the file back, and checks its hashes
        commit(partial, name)
        write_offsets(part, output, offsets)
    else:
        (output / "seq_h5" / part.split).mkdir(parents=True, exist_ok=True)
        for name, clip in readable():
            partial = partials / f"{part.split}-{part.number}.h5{tag}"
            write_h5(partial, name, clip.jpegs)
            commit(partial, f"seq_h5/{part.split}/{name}.h5")
    state = {
        # One row per video, also for broken ones: file name, id, label, number of frames, fps,
        # has_times.
        "kept": rows,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "files": files,
        "seconds": time.monotonic() - start,
    }
    write_text(part.state_path(output), json.dumps(state))


def write_offsets(part: Part, output: Path, offsets: np.ndarray | None) -> None:
    """Write the offsets of the records of a part, unless `find_offsets` did not find them."""
    if offsets is None:
        return
    write_file(part.offsets_path(output), offsets.tobytes(), writer=uuid.uuid4().hex)


def load_state(part: Part, output: Path) -> dict | None:
    """Return the contents of a part's state file, or None if the part must be written.

    A part must be written if it has no readable state file, if one of its files is missing or
    does not have the size in the state file, or if a broken video now has a different size: it may
    have been repaired.
    """
    try:
        state = json.loads(part.state_path(output).read_text())
        sizes = state["files"].items()
        complete = all((output / name).stat().st_size == size for name, size in sizes)
        findings = [Finding(**finding) for finding in state["findings"]]
        pairs = list(zip(part.records, findings, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    for record, finding in pairs:
        size = os.path.getsize(record.path) if os.path.isfile(record.path) else -1
        complete &= not finding.broken or size == finding.size
    return {**state, "findings": findings} if complete else None


def encode_and_write(part: Part, output: Path, settings: Settings, labels: list[str]) -> None:
    """Decode the videos of a part and write it. Workers of Beam call this function.

    Several workers may write the same part at the same time, because a runner may repeat work. They
    write the same bytes under different temporary names.

    Raises:
        OSError: A file cannot be written.
    """
    if load_state(part, output) is not None:  # written by an earlier attempt
        return
    clips = (encode(record, part.split, settings) for record in part.records)
    write_part(part, clips, output, settings, labels, f".{uuid.uuid4().hex}.partial")
