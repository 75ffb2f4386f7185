"""Decodes videos once and packs their frames as JPEG pictures, which are fast to read in any order.

    python -m jaxvid.data.prepare --input LIST_OR_FOLDER --output DIR [--format h5]

Killed at any time, it continues when it is run again, and the pack is the same byte for byte. With
`--shard 0/8` to `--shard 7/8` eight jobs share the work; the last one finishes the pack. Ends with
status 0, 3 where videos were broken and left out, 2 where the input is unusable.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.prepare", "; run the same command to continue")

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvid.atomic import format_json
from jaxvid.data.check import (
    SOME_BROKEN,
    Finding,
    Progress,
    gather,
    make_report,
    map_in_order,
    note_skipped,
    print_report,
)
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats import pack_writer
from jaxvid.data.formats.pack_index import format_table, list_videos, table_path
from jaxvid.data.formats.pack_writer import Clip, Part, Settings, encode, plan
from jaxvid.data.formats.xvit_hdf5 import write_h5
from jaxvid.errors import InputError, printable
from jaxvid.locks import LockedError, locked

# ------------------------------------------------------------------ what goes to disk


def _write_atomically(path: Path, text: str | bytes) -> None:
    """Write a file, whole or not at all; names of files in a text need not be UTF-8."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_part(
    part: Part, clips: Iterator[Clip], output: Path, settings: Settings, labels: list[str], tag: str
) -> None:
    """Writes a part's files under other names, renames them, and then says that it is complete."""
    start, kept, findings, files = time.monotonic(), [], [], {}
    partials = output / ".parts"

    def usable() -> Iterator[tuple[str, Clip]]:
        for name, clip in zip(part.names, clips, strict=True):
            findings.append(clip.finding)
            uneven = int(clip.times is not None)
            # A broken video has no frames, and stays listed: what reads the pack must count it.
            kept.append([name, clip.finding.id, clip.label, len(clip.jpegs), clip.fps, uneven])
            if clip.jpegs:
                yield name, clip

    def place(partial: Path, name: str) -> None:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = partial.stat().st_size
        os.replace(partial, output / name)

    if settings.format == "arrayrecord":
        examples = (
            example
            for _, clip in usable()
            for example in pack_writer.make_examples(clip, settings.frames_per_record)
        )
        name = pack_writer.array_record_name(part.split, part.number, part.count)
        partial = partials / f"{name}{tag}"
        pack_writer.write_array_record(partial, examples, labels)
        place(partial, name)
    else:
        (output / "seq_h5" / part.split).mkdir(parents=True, exist_ok=True)
        for name, clip in usable():
            partial = partials / f"{part.split}-{part.number}.h5{tag}"
            write_h5(partial, name, clip.jpegs)
            place(partial, f"seq_h5/{part.split}/{name}.h5")
    state = {
        "kept": kept,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "files": files,
        "seconds": time.monotonic() - start,
    }
    _write_atomically(part.state_path(output), json.dumps(state))


def _load_state(part: Part, output: Path) -> dict | None:
    """What a complete part holds; None for one that is to be done, or done again.

    A part is done again where a file of it is gone, or a broken video has changed since.
    """
    try:
        state = json.loads(part.state_path(output).read_text())
        complete = all((output / n).stat().st_size == size for n, size in state["files"].items())
        findings = [Finding(**finding) for finding in state["findings"]]
        pairs = list(zip(part.records, findings, strict=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    for record, finding in pairs:
        size = os.path.getsize(record.path) if os.path.isfile(record.path) else -1
        complete &= not finding.broken or size == finding.size
    return {**state, "findings": findings} if complete else None


def _claim(output: Path, settings: dict) -> None:
    """Makes the folder; refuses one that holds something else.

    Raises:
        InputError: It does.
    """
    parts = output / ".parts"
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder; name another")
    if not parts.exists() and output.exists() and any(output.iterdir()):
        raise InputError(f"{output} holds something else; name another folder")
    parts.mkdir(parents=True, exist_ok=True)
    path = parts / "settings.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        found = {"color_matrix": "tagged"} | found  # older versions knew no other
        names = [name for name in settings if found.get(name) != settings[name]]
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: is damaged; delete {output} and prepare it again") from None
    if found != settings:
        raise InputError(
            f"{output} was begun with another {', '.join(names)}; name another folder, or delete it"
        )
    _write_atomically(path, json.dumps(settings, ensure_ascii=False))


def _finish(
    output: Path, parts: list[Part], states: list[dict], labels: list[str], settings: Settings
) -> None:
    """Writes what describes the whole pack; always the same for the same parts."""
    lengths, sizes, rows = {}, {}, {}
    for part, state in zip(parts, states, strict=True):
        listed = list_videos([row[1:] for row in state["kept"]], settings.frames_per_record)
        lengths.setdefault(part.split, []).append(sum(video.num_records for video in listed))
        sizes[part.split] = sizes.get(part.split, 0) + sum(state["files"].values())
        rows.setdefault(part.split, []).extend(state["kept"])
    if settings.format == "arrayrecord":
        for split, found in rows.items():
            listed = list_videos([row[1:] for row in found], settings.frames_per_record)
            _write_atomically(table_path(output, split), format_table(listed))
        try:
            pack_writer.write_metadata(output, labels, lengths, sizes)
        except OSError:
            for name in pack_writer.METADATA:
                (output / name).unlink(missing_ok=True)
            raise
        return
    (output / "annotations").mkdir(exist_ok=True)
    (output / "annotation").mkdir(exist_ok=True)  # where the original looks for frame rates
    for split, listed in rows.items():
        found = [row for row in listed if row[3]]  # its readers know of no video without frames
        lines = "".join(f"{name},{frames},{label}\n" for name, _, label, frames, *_ in found)
        rates = "".join(f"{row[0]},{row[4]}\n" for row in found)
        _write_atomically(output / "annotations" / f"{split}.txt", lines)
        _write_atomically(output / "annotations" / f"{split}_fps.txt", rates)
        _write_atomically(output / "annotation" / f"{split}_fps.txt", rates)
    _write_atomically(output / "labels.txt", "".join(f"{label}\n" for label in labels))


# ------------------------------------------------------------------ the program


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: Settings,
    *,
    workers: int,
    shard: tuple[int, int] = (0, 1),
    prefix: str = "",
) -> dict:
    """Packs the videos of lists and folders, or continues to.

    Args:
        inputs: As `check.gather`.
        output: The folder to write.
        settings: How.
        workers: Threads.
        shard: `(index, count)` of this job among those that share the work.
        prefix: As `check.gather`.

    Returns:
        The report of `check.make_report`, with `complete`, whether the pack is finished, and
        `packed_bytes`. It is about all videos, or, before the pack is finished, this job's.

    Raises:
        InputError: The input is unusable, or the folder cannot be written.
    """
    output, skipped = Path(output), Skipped()
    records, labels = gather(inputs, prefix, skipped=skipped)
    note_skipped(skipped)
    for name in labels:
        if name != name.strip():  # files with a name a line lose the spaces
            raise InputError(f"the class {name!r} begins or ends with a space; rename it")
    if labels == [str(i) for i in range(len(labels))]:
        print("no labels.txt names the classes: the pack numbers them", file=sys.stderr)
    lines = [[split, r.id, r.label] for split, found in records.items() for r in found]
    listed = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    parts = plan(records, settings)
    mine, tag = parts[shard[0] :: shard[1]], f".{shard[0]}-of-{shard[1]}.partial"
    try:
        _claim(output, {**dataclasses.asdict(settings), "labels": labels, "list": listed})
        with locked(output / ".parts" / f"lock{tag}"):
            try:
                _do_parts(mine, output, settings, labels, tag, workers)
                return _conclude(parts, mine, output, labels, settings)
            finally:
                for partial in (output / ".parts").glob(f"*{tag}"):
                    partial.unlink(missing_ok=True)
    except LockedError as error:
        raise InputError(
            f"{output}: another prepare writes it ({error.holder}); wait for it"
        ) from None
    except OSError as error:
        raise InputError(
            f"{error.filename or output}: cannot be written ({error.strerror or error}); mend that "
            "and run the same command again: what is complete is kept"
        ) from None


def _do_parts(mine, output, settings, labels, tag, workers) -> None:
    todo = [part for part in mine if _load_state(part, output) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} parts are complete", file=sys.stderr)
    items = [(record, part.split) for part in todo for record in part.records]
    progress = Progress(len(items), "packing")
    with contextlib.closing(
        map_in_order(lambda item: encode(*item, settings), items, workers)
    ) as clips:

        def counted(part: Part) -> Iterator[Clip]:
            for clip in itertools.islice(clips, len(part.records)):
                progress.advance(sum(map(len, clip.jpegs)))
                yield clip

        try:
            for part in todo:
                _write_part(part, counted(part), output, settings, labels, tag)
        finally:
            progress.close()


def _conclude(parts, mine, output, labels, settings) -> dict:
    """Finishes the pack where all its parts are complete, and reports."""
    states = [_load_state(part, output) for part in parts]
    complete = None not in states
    shown = states if complete else [_load_state(part, output) for part in mine]
    findings = [finding for state in shown for finding in state["findings"]]
    report = make_report(findings, sum(state["seconds"] for state in shown))
    report["packed_bytes"] = sum(sum(state["files"].values()) for state in shown)
    report |= {"complete": complete, "settings": dataclasses.asdict(settings)}
    if complete:
        if not report["readable"]:
            print_report(report, "packed")
            raise InputError(f"{output}: none of {report['videos']} videos can be read")
        for folder in (".parts", ".", "annotations", "annotation"):
            for partial in (output / folder).glob("*.partial"):  # of jobs that were killed
                partial.unlink(missing_ok=True)
        _finish(output, parts, states, labels, settings)
        _write_atomically(output / "report.json", format_json(report))
    return report


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, metavar="LIST_OR_FOLDER")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--prefix", default="", help="what paths in lists are relative to")
    parser.add_argument("--format", default="arrayrecord", help="arrayrecord or h5")
    parser.add_argument("--short_side", type=int, default=256, help="pixels; 0: as it is")
    parser.add_argument("--frames", default="all", help="of a video: all, or so many")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG, 1 to 100")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--shard", default="0/1", help="i/n: this job of n, from 0")
    parser.add_argument("--clips_per_file", type=int, default=0)
    parser.add_argument("--frames_per_record", type=int, default=Settings.frames_per_record)
    parser.add_argument(
        "--color_matrix",
        default="tagged",
        help="tagged: convert to RGB by the matrix that the file names (default); bt601: by BT.601 "
        "whatever it names, for converted STAM weights",
    )
    args = parser.parse_args()
    try:
        index, _, count = args.shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(f"--shard {args.shard}: must be i/n, from 0/n to (n-1)/n")
        if args.frames != "all" and (not args.frames.isdecimal() or not int(args.frames)):
            raise InputError(f"--frames {args.frames}: must be 'all' or a number")
        frames = 0 if args.frames == "all" else int(args.frames)
        settings = Settings(
            args.format,
            args.short_side,
            frames,
            args.quality,
            args.clips_per_file,
            args.frames_per_record,
            args.color_matrix,
        )
        shard = (int(index), int(count))
        report = prepare(
            args.input,
            args.output,
            settings,
            workers=max(1, args.workers),
            shard=shard,
            prefix=args.prefix,
        )
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {printable(error)}\n")
    print_report(report, f"packed ({report['packed_bytes'] / 1e6:.1f} MB)")
    if report["complete"]:
        print(f"{args.output}: complete")
    else:
        print(f"{args.output}: this job is done; the last of the others completes it")
    parser.exit(SOME_BROKEN if report["broken"] else 0)
