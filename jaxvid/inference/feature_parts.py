"""Features of a list of videos, extracted in parts by workers of Apache Beam."""

import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxvid.data.beam import BeamRunner, run_on_workers
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.protocols import VideoRecord
from jaxvid.distributed import setup, sharding
from jaxvid.errors import InputError
from jaxvid.inference.feature_extraction import (
    ExtractedFeatures,
    Step,
    concatenate,
    extract_batches,
    join_batches,
    make_feature_step,
)
from jaxvid.inference.feature_network import FeatureOptions, Network, load_network
from jaxvid.storage.partial_results import read_batch, write_batch

PART_VIDEOS = 64  # minimum number of videos per part; an interrupted run repeats unfinished parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureJob:
    """The settings of an extraction that all its parts share.

    Attributes:
        model: Model folder, or another name of a model; see `resolve_model`.
        sha256: SHA-256 of its weights.
        options: Options of the extraction.
        batch_size: Videos or windows per batch, over all devices of a worker.
        pack: Folder and split of the pack that contains the videos, or None if they are files.
        folder: Folder of the features of the parts.
    """

    model: str
    sha256: str
    options: FeatureOptions
    batch_size: int
    pack: tuple[str, str] | None
    folder: Path

    @property
    def part_size(self) -> int:
        """Videos per part. It is a multiple of the batch size.

        The batches of whole videos are therefore the same as without parts.
        """
        return -(-PART_VIDEOS // self.batch_size) * self.batch_size


class FeaturePart(NamedTuple):
    """Consecutive videos, whose features are stored in one file.

    Attributes:
        number: Number of the part; the name of its file.
        start: Index of the first video.
        stop: Index after that of the last video.
        records: The videos; None: they are in a pack.
    """

    number: int
    start: int
    stop: int
    records: Sequence[VideoRecord] | None


# ------------------------------------------------------------------ on the driver


def extract_on_workers(
    job: FeatureJob, records: Sequence[VideoRecord], runner: BeamRunner
) -> ExtractedFeatures:
    """Extract the features of all videos on the workers of a runner.

    Parts that an interrupted run has finished are not extracted again.

    Args:
        job: The settings.
        records: The videos.
        runner: The runner. Its workers must see the videos, the model and `job.folder` under the
            same paths.

    Raises:
        InputError: Apache Beam is not installed, the pipeline failed, or a part was not written.
    """
    starts = range(0, len(records), job.part_size)
    remaining = [i for i in range(len(starts)) if read_batch(job.folder, i) is None]
    if len(remaining) < len(starts):
        complete = len(starts) - len(remaining)
        print(f"{complete} of {len(starts)} parts are complete", file=sys.stderr)
    parts = []
    for i in remaining:
        stop = min(starts[i] + job.part_size, len(records))
        listed = records[starts[i] : stop] if job.pack is None else None
        parts.append(FeaturePart(i, starts[i], stop, listed))
    run_on_workers(functools.partial(extract_part, job=job), parts, runner)
    batches = [read_batch(job.folder, i) for i in range(len(starts))]
    if None in batches:
        raise InputError(
            f"{job.folder}: not all parts were written; use a folder that all workers share and "
            "run the same command again"
        )
    return join_batches(batches)


def parts_folder(output: Path, key: dict[str, Any]) -> Path:
    """Return the folder of the parts of an output file.

    Args:
        output: The output file.
        key: Everything that the features depend on, as JSON. Another key has another folder, so
            that workers of an abandoned run, which may still write, do no harm.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return _parts_root(output) / digest[:16]


def remove_parts(output: Path) -> None:
    """Remove the parts of an output file."""
    shutil.rmtree(_parts_root(output), ignore_errors=True)


def _parts_root(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


# ------------------------------------------------------------------ on a worker

_one_part = threading.Lock()  # a part uses all cores, so a process extracts one part at a time


def extract_part(part: FeaturePart, job: FeatureJob) -> None:
    """Extract the features of a part and write its file. Workers of Beam call this function.

    Several workers may write the same part at the same time, because a runner may repeat work. They
    write the same features under different temporary names.

    Raises:
        InputError: The model or the pack is unusable, the model differs from that of the command,
            the batch size is not divisible by the number of devices, the features are not finite,
            or the file cannot be written.
    """
    with _one_part:
        if read_batch(job.folder, part.number) is not None:  # written by an earlier attempt
            return
        network, step, mesh = _load(job.model, job.options)
        if network.sha256 != job.sha256:
            raise InputError(
                f"{job.model}: the weights differ from those on the machine of the command; use a "
                "folder that all workers share"
            )
        sharding.check_batch_size("--batch_size", job.batch_size, mesh)
        records = part.records
        if job.pack is not None:
            records = _open_pack(*job.pack)[part.start : part.stop]
        batches = extract_batches(
            network.params,
            records,
            network.protocol,
            step=step,
            batch_size=job.batch_size,
            mesh=mesh,
            todo=dict.fromkeys(range(len(records)), 0),
        )
        joined = concatenate(list(batches))
        joined["video"] += part.start
        write_batch(job.folder, part.number, joined, writer=uuid.uuid4().hex)


@functools.lru_cache(maxsize=1)
def _load(model: str, options: FeatureOptions) -> tuple[Network, Step, Mesh]:
    """Load a model; once per process, because this and the compilation take seconds."""
    setup.use_compilation_cache()
    mesh = sharding.make_mesh(sharding.MeshShape())
    network = load_network(model, options, mesh)
    return network, make_feature_step(network.protocol, network.graphdef, mesh), mesh


@functools.lru_cache(maxsize=1)
def _open_pack(folder: str, split: str) -> PackRecords:
    return PackRecords(folder, split)
