"""The training videos of a run, in the order of its first start.

The order of the batches depends on the number of videos and on their positions. A run that is
resumed with a shorter list therefore keeps the positions of missing videos. The missing videos
fail like broken ones, and all other videos are drawn in the same order as before.
"""

import dataclasses
import gzip
import json
import zlib
from pathlib import Path

import jax

from jaxvid.atomic import write_file
from jaxvid.data import fingerprints
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.label_sets import LabelSet, to_json
from jaxvid.data.pipeline import stored_id
from jaxvid.data.records import LostVideo, Selection, ids_of, labels_of
from jaxvid.data.sources import VideoDataset
from jaxvid.data.split_checks import find_overlaps
from jaxvid.errors import InputError, printable
from jaxvid.training import outputs, run_metadata
from jaxvid.training.checkpoint_files import find_steps
from jaxvid.training.skipped_videos import read_skipped

FILE = "training_videos.json.gz"


def check_overlap(workdir: Path, data: VideoDataset) -> VideoDataset:
    """Refuse a new run whose training and validation videos include the same files.

    Args:
        workdir: The run's folder. Runs with checkpoints are not checked again.
        data: The current data.

    Returns:
        The data, with a note if other files have the same content.

    Raises:
        InputError: A file is in both splits.
    """
    if find_steps(workdir):
        return data
    same_files, copies = find_overlaps(data.records)
    if same_files:
        raise InputError(same_files[0])
    notes = (f"warning: {line}" for line in copies)
    return dataclasses.replace(data, notes=(*data.notes, *notes))


def align(workdir: Path, data: VideoDataset) -> tuple[VideoDataset, tuple[str, ...]]:
    """Put the training videos into the order of the run's first start.

    A video of that start may be missing now if `WORKDIR/skipped.jsonl` lists it, or if
    `data.skip_broken` left it out. A video that the first start left out is not added later.

    Args:
        workdir: The run's folder. Without an earlier start the data is returned unchanged.
        data: The current data.

    Returns:
        The data, with a `LostVideo` at the position of each missing video; and the ids of the
        missing videos.

    Raises:
        InputError: Videos are missing for another reason, or there are new videos.
    """
    first, records = _load(workdir), data.records["train"]
    if first is None or outputs.starts_over(workdir):
        return data, ()
    now = {id_: i for i, id_ in enumerate(ids_of(records))}
    if list(now) == first["ids"] or len(now) < len(records):  # unchanged, or ids are not unique
        return data, ()
    known = set(first["ids"])
    returned = set(first["left_out"]) & now.keys()
    lost = [id_ for id_ in first["ids"] if id_ not in now]
    skipped, left_out = read_skipped(workdir), set(data.left_out)
    gone = [id_ for id_ in lost if stored_id(id_) not in skipped and id_ not in left_out]
    added = [id_ for id_ in now if id_ not in known and id_ not in returned]
    if gone or added:
        problems = [f"{len(added)} are new (the first is {added[0]!r})"] if added else []
        if gone:
            problems.append(
                f"{len(gone)} are missing (the first is {gone[0]!r}) and not listed in "
                f"{workdir / 'skipped.jsonl'}"
            )
        raise InputError(
            f"{workdir} was started with {len(known)} training videos, now there are {len(now)}: "
            f"{'; '.join(problems)}; restore the list or choose another --workdir"
        )
    multi_label = isinstance(records[0].label, LabelSet)
    videos = []
    for id_, label in zip(first["ids"], first["labels"], strict=True):
        if multi_label:
            label = LabelSet(tuple(label), len(data.labels))
        videos.append(now[id_] if id_ in now else LostVideo(id_, label))
    notes = []
    if lost:
        notes.append(
            f"{len(lost)} of the run's {len(videos)} training videos are missing from the list "
            f"or left out (the first is {lost[0]}); their positions in the batches stay empty"
        )
    if returned:
        notes.append(
            f"{len(returned)} training videos that the first start left out are available now; "
            "this run continues without them"
        )
    data = dataclasses.replace(
        data,
        records={**data.records, "train": Selection(records, videos)},
        notes=(*data.notes, *map(printable, notes)),
    )
    return data, tuple(lost)


def save(workdir: Path, data: VideoDataset) -> None:
    """Write the ids and labels of the first start's training videos (on the first process).

    Args:
        workdir: The run's folder.
        data: The data that `align` returned.

    Raises:
        InputError: The file cannot be written.
    """
    records = data.records["train"]
    # Packs without ids name their videos by position, so there is no list to save.
    numbered = isinstance(records, PackRecords) and not records.has_ids
    if jax.process_index() or numbered or _load(workdir) is not None:
        return
    listed = {
        "ids": ids_of(records),
        "labels": [*map(to_json, labels_of(records))],
        "left_out": list(data.left_out),
    }
    write_file(workdir / FILE, gzip.compress(json.dumps(listed).encode(), mtime=0))


def _load(workdir: Path) -> dict | None:
    """Return the list of the first start; None if it is missing, damaged or from another run."""
    last = run_metadata.last_start(workdir)
    try:
        first = json.loads(gzip.decompress((workdir / FILE).read_bytes()))
        same = last is not None and last["data"]["train"]["sha256"] == fingerprints.digest(
            first["ids"]
        )
        return first if same and len(first["labels"]) == len(first["ids"]) else None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None
