"""Convert videos to a pack, a data set of JPEG frames: the command `jaxvid prepare`."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.data.prepare", "; run the same command to continue")

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvid import parsers, remote, remote_folder
from jaxvid.atomic import format_json, write_file
from jaxvid.data.beam import BeamRunner, make_runner, run_on_workers
from jaxvid.data.check import SOME_BROKEN, Progress, make_report, map_in_order, print_report
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats import pack_writer, tfds_api
from jaxvid.data.formats.pack_index import format_table, list_videos, table_path
from jaxvid.data.formats.pack_writer import Clip, Part, Settings, encode, plan
from jaxvid.data.formats.record_offsets import find_offsets, join_offsets, offsets_path
from jaxvid.data.gather import gather, note_overlaps, note_skipped
from jaxvid.data.label_sets import SEPARATOR
from jaxvid.data.pack_parts import (
    encode_and_write,
    load_state,
    write_offsets,
    write_part,
    write_text,
)
from jaxvid.data.records import VideoFiles
from jaxvid.data.validation_split import ValidationSplit
from jaxvid.errors import InputError, printable
from jaxvid.locks import LockedError, locked

PACK_FILES = ("*.array_record-*", "seq_h5/*")  # the files of the videos, which are not read again

# ------------------------------------------------------------------ files


def _claim(output: Path, settings: dict) -> None:
    """Create the output folder, or check that it contains a pack with the same settings.

    Raises:
        InputError: The path is not a folder, or the folder contains something else, a pack with
            different settings, class names or lists, or a damaged settings file.
    """
    parts = output / ".parts"
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder; choose another path")
    if not parts.exists() and output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and is not a pack; choose another folder")
    parts.mkdir(parents=True, exist_ok=True)
    path = parts / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
        # Settings files of older versions have no `color_matrix`; they always used `tagged`.
        before = {"color_matrix": "tagged"} | before
        names = [name for name in settings if before.get(name) != settings[name]]
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: is damaged; delete {output} and prepare it again") from None
    if before != settings:
        raise InputError(
            f"{output} was started with different settings ({', '.join(names)}); choose another "
            "folder or delete it"
        )
    write_text(path, json.dumps(settings, ensure_ascii=False))


def _write_metadata(
    output: Path, parts: list[Part], states: list[dict], labels: list[str], settings: Settings
) -> None:
    """Write the indices or lists, metadata and class names of a pack whose parts are complete.

    `states` are the results of `load_state` for the parts.
    """
    # Split → number of records of each file, total size of the files, and rows of the videos.
    lengths, sizes, rows = {}, {}, {}
    for part, state in zip(parts, states, strict=True):
        listed = list_videos([row[1:] for row in state["kept"]], settings.frames_per_record)
        lengths.setdefault(part.split, []).append(sum(video.num_records for video in listed))
        sizes[part.split] = sizes.get(part.split, 0) + sum(state["files"].values())
        rows.setdefault(part.split, []).extend(state["kept"])
    if settings.format == "arrayrecord":
        for split, split_rows in rows.items():
            listed = list_videos([row[1:] for row in split_rows], settings.frames_per_record)
            write_text(table_path(output, split), format_table(listed))
        try:
            tfds_api.write_metadata(output, labels, lengths, sizes)
        except OSError:
            for name in pack_writer.METADATA:
                (output / name).unlink(missing_ok=True)
            raise
        return
    (output / "annotations").mkdir(exist_ok=True)
    # The original code reads the lists from `annotations` and the frame rates from `annotation`.
    (output / "annotation").mkdir(exist_ok=True)
    for split, split_rows in rows.items():
        # Leave out videos without frames, on which the original implementation fails.
        readable = [row for row in split_rows if row[3]]
        lines = "".join(f"{name},{frames},{label}\n" for name, _, label, frames, *_ in readable)
        rates = "".join(f"{row[0]},{row[4]}\n" for row in readable)
        write_text(output / "annotations" / f"{split}.txt", lines)
        write_text(output / "annotations" / f"{split}_fps.txt", rates)
        write_text(output / "annotation" / f"{split}_fps.txt", rates)
    write_text(output / "labels.txt", "".join(f"{label}\n" for label in labels))


def _write_offsets(output: Path, parts: list[Part]) -> None:
    """Write the offsets of the records of each split."""
    older = []  # parts of an older version, without offsets, and their files
    for part in parts:
        name = pack_writer.array_record_name(part.split, part.number, part.count)
        # The copy of a file that is in an object store already has no contents.
        if not part.offsets_path(output).exists() and (output / name).stat().st_blocks:
            older.append((part, output / name))
    if older:
        print(f"reading {len(older)} finished files for their offsets", file=sys.stderr)
    for part, path in older:
        write_offsets(part, output, find_offsets(path))
    for split in {part.split: None for part in parts}:
        files = [part.offsets_path(output) for part in parts if part.split == split]
        if all(file.exists() for file in files):
            join_offsets(files, offsets_path(output, split))


# ------------------------------------------------------------------ the program


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: Settings,
    *,
    workers: int | BeamRunner,
    shard: tuple[int, int] = (0, 1),
    prefix: str = "",
    split: ValidationSplit | None = None,
) -> dict:
    """Pack the videos of lists and folders, or resume an unfinished pack.

    Args:
        inputs: Lists and folders, as in `gather`.
        output: Folder of the pack. In an object store, each part is uploaded when it is finished.
        settings: Settings of the pack.
        workers: Number of threads of this process; or a runner of Apache Beam, whose workers read
            the videos and write the pack under the same paths.
        shard: `(index, count)`: index of this job, and number of jobs that share the work.
        prefix: Folder that paths in lists are relative to, as in `gather`.
        split: Division of the videos into training and validation, or None.

    Returns:
        The report of `check.make_report` with three more keys: `packed_bytes`, `settings`, and
        `complete` (whether the pack is finished). If it is, the report covers all videos, otherwise
        those of this job.

    Raises:
        InputError: The input is invalid; the output folder cannot be written, contains something
            else or is being written by another run of this job; or no video can be read.
    """
    if remote.is_remote(output) and (shard != (0, 1) or isinstance(workers, BeamRunner)):
        raise InputError(
            f"{output}: only one process can write a pack to an object store; choose a folder that "
            "the jobs share, or leave out --shard and --runner"
        )
    skipped = Skipped()
    records, labels = gather(inputs, prefix, skipped=skipped)
    note_skipped(skipped)
    for videos in records.values():
        for id_, label in zip(videos.ids, videos.labels, strict=True):
            if isinstance(label, tuple):
                raise InputError(
                    f"{id_} has the label {SEPARATOR.join(map(str, label))}{SEPARATOR}, but a pack "
                    "stores one class per video; train on the list itself"
                )
    if split is not None and split.share:
        records = _divide(records, split, ", ".join(map(str, inputs)))
    for name in labels:
        if name != name.strip():  # reading labels.txt strips the spaces
            raise InputError(f"the class {name!r} begins or ends with a space; rename it")
    if labels == [str(i) for i in range(len(labels))]:
        print(
            "the class names are the label numbers; write labels.txt to name them", file=sys.stderr
        )
    with remote_folder.opened(output, sparse=PACK_FILES) as folder:
        return _pack(records, labels, folder, settings, workers, shard)


def _pack(
    records: dict[str, VideoFiles],
    labels: list[str],
    output: Path,
    settings: Settings,
    workers: int | BeamRunner,
    shard: tuple[int, int],
) -> dict:
    """Write the parts of this job, and finish the pack if all parts are complete.

    Args:
        records: Split → videos.
        labels: Class names.
        output: Folder of the pack, or the local copy of a remote one.
        settings: As in `prepare`.
        workers: As in `prepare`.
        shard: As in `prepare`.

    Returns:
        The report, as in `prepare`.

    Raises:
        InputError: As in `prepare`.
    """
    lines = [
        [split, id_, label]
        for split, videos in records.items()
        for id_, label in zip(videos.ids, videos.labels, strict=True)
    ]
    list_digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    parts = plan(records, settings)
    job_parts = parts[shard[0] :: shard[1]]
    tag = f".{shard[0]}-of-{shard[1]}.partial"  # suffix of the temporary files of this job
    try:
        _claim(output, {**dataclasses.asdict(settings), "labels": labels, "list": list_digest})
        with locked(output / ".parts" / f"lock{tag}"):
            note_overlaps(records)
            try:
                _write_parts(job_parts, output, settings, labels, tag, workers)
                return _finish(parts, job_parts, output, labels, settings)
            finally:
                for partial in (output / ".parts").glob(f"*{tag}"):
                    partial.unlink(missing_ok=True)
    except LockedError as error:
        raise InputError(
            f"{output}: another prepare is writing it with the same --shard ({error.holder}); wait "
            "until it has finished"
        ) from None
    except OSError as error:
        raise InputError(
            f"{error.filename or output}: cannot be written ({error.strerror or error}); fix this "
            "and run the same command again to continue"
        ) from None


def _divide(
    records: dict[str, VideoFiles], split: ValidationSplit, source: str
) -> dict[str, VideoFiles]:
    """Divide the videos of the only split of an input into training and validation.

    Args:
        records: Split → videos.
        split: The division.
        source: The list or folder, for messages.

    Raises:
        InputError: There are several splits, or a split would be empty.
    """
    if len(records) > 1:
        raise InputError(
            f"--val_share {split.share:g}: the input has the splits {', '.join(records)} already; "
            "leave out --val_share, or give only one of them"
        )
    [videos] = records.values()
    divided, note = split.divide(videos, source)
    print(note, file=sys.stderr)
    return divided


def _write_parts(
    parts: list[Part],
    output: Path,
    settings: Settings,
    labels: list[str],
    tag: str,
    workers: int | BeamRunner,
) -> None:
    """Write the parts of this job that are not complete."""
    remaining = [part for part in parts if load_state(part, output) is None]
    num_complete = len(parts) - len(remaining)
    if num_complete:
        print(f"{num_complete} of {len(parts)} parts are complete", file=sys.stderr)
    if isinstance(workers, BeamRunner):
        write = functools.partial(encode_and_write, output=output, settings=settings, labels=labels)
        run_on_workers(write, remaining, workers)
        return
    items = [(record, part.split) for part in remaining for record in part.records]
    progress = Progress(len(items), "packing")
    with contextlib.closing(
        map_in_order(lambda item: encode(*item, settings), items, workers)
    ) as clips:

        def clips_of(part: Part) -> Iterator[Clip]:
            """Yield the clips of the next part, and count them as progress."""
            for clip in itertools.islice(clips, len(part.records)):
                progress.advance(sum(map(len, clip.jpegs)))
                yield clip

        try:
            for part in remaining:
                write_part(part, clips_of(part), output, settings, labels, tag)
                remote_folder.push(output)
        finally:
            progress.close()


def _finish(
    parts: list[Part], job_parts: list[Part], output: Path, labels: list[str], settings: Settings
) -> dict:
    """Finish the pack if all its parts are complete, and return the report, as in `prepare`.

    `job_parts` are the parts of this job, which are complete.

    Raises:
        InputError: All parts are complete, but no video can be read.
    """
    states = [load_state(part, output) for part in parts]
    complete = None not in states
    reported = states if complete else [load_state(part, output) for part in job_parts]
    findings = [finding for state in reported for finding in state["findings"]]
    report = make_report(findings, sum(state["seconds"] for state in reported))
    report["packed_bytes"] = sum(sum(state["files"].values()) for state in reported)
    report |= {"complete": complete, "settings": dataclasses.asdict(settings)}
    if complete:
        if not report["readable"]:
            print_report(report, "packed")
            raise InputError(
                f"{output}: none of {report['videos']} videos can be read; check the paths and the "
                "files"
            )
        for folder in (".parts", ".", "annotations", "annotation"):
            for partial in (output / folder).glob("*.partial"):  # files of jobs that were killed
                partial.unlink(missing_ok=True)
        _write_metadata(output, parts, states, labels, settings)
        if settings.format == "arrayrecord":
            _write_offsets(output, parts)
        write_file(output / "report.json", format_json(report), writer=str(os.getpid()))
    return report


def main() -> None:
    """Run the command line of this module."""
    parser = parsers.prepare()
    args = parser.parse_args()
    try:
        index, _, count = args.shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(f"--shard {args.shard}: must be i/n, from 0/n to (n-1)/n")
        if args.frames != "all" and (not args.frames.isdecimal() or not int(args.frames)):
            raise InputError(f"--frames {args.frames}: must be 'all' or a positive number")
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
        beam = make_runner(args.runner, args.beam_args)
        if beam and shard != (0, 1):
            raise InputError("--shard cannot be combined with --runner, which divides the work")
        report = prepare(
            args.input,
            args.output,
            settings,
            workers=beam or max(1, args.workers),
            shard=shard,
            prefix=args.prefix,
            split=ValidationSplit(args.val_share, args.group),
        )
    except InputError as error:
        parser.exit(InputError.EXIT_CODE, f"error: {printable(error)}\n")
    print_report(report, f"packed ({report['packed_bytes'] / 1e6:.1f} MB)")
    if report["complete"]:
        print(f"{args.output}: complete")
    else:
        print(f"{args.output}: this job is done; the last job to finish completes the pack")
    parser.exit(SOME_BROKEN if report["broken"] else 0)
