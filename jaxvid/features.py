"""Extract features of videos: the command `jaxvid features`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.features", "; run the same command to continue")

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvid import parsers, remote_folder
from jaxvid.atomic import OutputPath, output_path
from jaxvid.data import fingerprints
from jaxvid.data.beam import BeamRunner, make_runner
from jaxvid.data.check import SOME_BROKEN
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.pack_reader import PackRecords, read_color_matrix
from jaxvid.data.input_videos import InputVideos, open_input
from jaxvid.data.records import NO_LABEL
from jaxvid.distributed import collectives, process_group, setup, sharding
from jaxvid.errors import InputError, printable
from jaxvid.inference.feature_extraction import (
    ExtractedFeatures,
    FeatureProtocol,
    extract_features,
)
from jaxvid.inference.feature_network import FeatureOptions, Network, load_network
from jaxvid.inference.feature_parts import (
    PART_VIDEOS,
    FeatureJob,
    extract_on_workers,
    parts_folder,
    remove_parts,
)
from jaxvid.locks import LockedError, locked
from jaxvid.object_store import is_remote
from jaxvid.storage.feature_file import (
    FORMAT_VERSION,
    FeatureTable,
    check_feature_file,
    save_features,
)
from jaxvid.storage.partial_results import PartialResults
from jaxvid.training import run_metadata

DEVICE_VIEWS = 8  # views per batch and device, summed over the videos


def features(
    videos: InputVideos,
    folder: str | Path,
    output: OutputPath,
    options: FeatureOptions,
    runner: BeamRunner | None = None,
) -> FeatureTable:
    """Extract the features of videos, and write them to a file.

    An interrupted extraction is resumed when it is started again with the same arguments. If the
    output is in an object store, only on the same machine.

    Args:
        videos: The videos.
        folder: Model folder, or another name of a model; see `resolve_model`.
        output: File to write; its suffix is the format.
        options: Options of the extraction.
        runner: Runner of Apache Beam, whose workers extract the features; None: this process, or
            all processes of this run, extract them on all devices.

    Returns:
        The contents of the file.

    Raises:
        InputError: The model folder is unusable, an option is invalid, no video can be decoded, the
            file cannot be written, another run is writing it, or the pipeline failed.
    """
    if runner is not None and not isinstance(output, Path):
        raise InputError(
            f"--output {output}: is an address; with --runner, choose a folder that all workers "
            "share"
        )
    collectives.raise_on_all_processes(check_feature_file, "--output", output)
    mesh = sharding.make_mesh(sharding.MeshShape())
    run_metadata.check_same_videos(fingerprints.describe_videos(videos.records))
    network = load_network(folder, options, mesh)
    _warn_of_color_matrix(videos, network.protocol)
    local = remote_folder.local_folder(str(output))  # unfinished results are stored beside it
    batch_size = _choose_batch_size(options, network.protocol, len(videos.records))
    with contextlib.ExitStack() as stack:
        collectives.raise_on_all_processes(_lock, stack, output, local)
        if runner is None:
            staging = local.with_name(f".{local.name}.unfinished")
            unfinished = PartialResults(staging, _resume_key(network, videos))
            extracted = extract_features(
                network.params,
                videos.records,
                network.protocol,
                graphdef=network.graphdef,
                batch_size=batch_size,
                mesh=mesh,
                unfinished=unfinished,
            )
            remove = unfinished.remove
        else:
            job = _make_job(network, folder, options, batch_size, videos, local)
            extracted = extract_on_workers(job, videos.records, runner)
            remove = functools.partial(remove_parts, local)
        if not len(extracted.values):
            remove()
            first = printable(next(iter(extracted.errors.values())))
            raise InputError(
                f"none of {len(videos.records)} videos can be decoded; the first error: {first}"
            )
        table = _make_table(extracted, videos, network)
        collectives.raise_on_all_processes(_save, output, table)
        remove()
    return table


def _make_job(
    network: Network,
    folder: str | Path,
    options: FeatureOptions,
    batch_size: int,
    videos: InputVideos,
    output: Path,
) -> FeatureJob:
    """Return the settings of an extraction on the workers of a runner."""
    records = videos.records
    key = _resume_key(network, videos) | {"batch_size": batch_size, "part_videos": PART_VIDEOS}
    is_pack = isinstance(records, PackRecords)
    return FeatureJob(
        model=str(folder),
        sha256=network.sha256,
        options=options,
        batch_size=batch_size,
        pack=(records.name, records.split) if is_pack else None,
        folder=parts_folder(output, key),
    )


def _save(output: OutputPath, table: FeatureTable) -> None:
    if not jax.process_index():
        save_features(output, table)


def _lock(stack: contextlib.ExitStack, output: OutputPath, local: Path) -> None:
    """Lock the output until the stack is closed; in the first process only."""
    if jax.process_index():
        return
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(local.with_name(f".{local.name}.lock")))
    except LockedError as error:
        raise InputError(
            f"--output {output}: in use by another run ({error.holder}); wait until that run has "
            "ended or choose another file"
        ) from None
    except OSError as error:
        raise InputError(
            f"--output {output}: {local.parent} cannot be written ({error.strerror}); choose "
            "another folder"
        ) from None


# ------------------------------------------------------------------ the features


def _choose_batch_size(options: FeatureOptions, protocol: FeatureProtocol, num_videos: int) -> int:
    """Return the number of videos or windows per batch, over all devices.

    Raises:
        InputError: `options.batch_size` is not divisible by the number of devices.
    """
    devices = jax.device_count()
    if options.batch_size is not None:
        if options.batch_size < 1 or options.batch_size % devices:
            raise InputError(
                f"--batch_size={options.batch_size}: must be a positive multiple of {devices}, the "
                "number of devices"
            )
        return options.batch_size
    num_rows = max(1, DEVICE_VIEWS // protocol.preprocessing.num_views)
    if options.window is None:
        num_rows = min(num_rows, -(-num_videos // devices))
    return num_rows * devices


def _resume_key(network: Network, videos: InputVideos) -> dict[str, Any]:
    """Return everything that the features depend on, for `PartialResults`.

    The batch size and the number of devices are left out, because they change features only by
    rounding errors. All processes must call it, because file fingerprints are gathered from all.
    """
    return {
        "weights": network.sha256,
        "model": dataclasses.asdict(network.config),
        "protocol": network.protocol.to_json(),
        "videos": fingerprints.fingerprint(videos.records),
        # Each process may have its own copy of the files.
        "files": sorted({*collectives.gather(fingerprints.fingerprint_files(videos.records))}),
    }


def _warn_of_color_matrix(videos: InputVideos, protocol: FeatureProtocol) -> None:
    """Print a line if a pack was made with another color matrix than that of the model."""
    if not isinstance(videos.records, PackRecords) or jax.process_index():
        return
    packed, used = read_color_matrix(videos.records.name), protocol.preprocessing.color_matrix
    if packed not in (None, used):
        print(
            f"{videos.records.name} was packed with color_matrix={packed}, but the model uses "
            f"{used}; prepare it again with --color_matrix {used}",
            file=sys.stderr,
        )


def _make_table(
    extracted: ExtractedFeatures, videos: InputVideos, network: Network
) -> FeatureTable:
    """Return the contents of the file."""
    records, protocol = videos.records, network.protocol
    has_windows = protocol.window is not None
    return FeatureTable(
        features=extracted.values,
        ids=[printable(records[i].id) for i in extracted.videos.tolist()],
        labels=np.array([records[i].label for i in extracted.videos.tolist()], np.int32),
        label_names=[str(label) for label in videos.labels],
        padded=extracted.padded,
        starts=extracted.starts if has_windows else None,
        ends=extracted.ends if has_windows else None,
        about={
            "format_version": FORMAT_VERSION,
            "model": network.name,
            "weights_sha256": network.sha256,
            **protocol.to_json(),
            "num_videos": len(records),
            "failed": [
                {"id": printable(records[i].id), "label": int(records[i].label), "error": error}
                for i, error in sorted(extracted.errors.items())
            ],
        },
    )


# ------------------------------------------------------------------ command line


def run(args: argparse.Namespace) -> int:
    """Extract the features that the command line asks for; return the exit code.

    Raises:
        InputError: An option, the videos, the model folder or the output is unusable.
    """
    names = [field.name for field in dataclasses.fields(FeatureOptions)]
    values = vars(args) | {"num_clips": args.clips, "num_crops": args.crops}
    options = FeatureOptions(**{name: values[name] for name in names})
    output = output_path(args.output)
    runner = make_runner(args.runner, args.beam_args)
    is_first, skipped = not jax.process_index(), Skipped()
    videos = collectives.raise_on_all_processes(_open, args, skipped)
    if is_first:
        if counts := str(skipped):
            print(f"skipped in folders: {counts}", file=sys.stderr)
        classes = f"{len(videos.labels)} classes" if videos.labels else "no labels"
        count = f"{len(videos.records)} video{'s' * (len(videos.records) != 1)}"
        print(f"{printable(args.input)}: {videos.kind}, {count}, {classes}", file=sys.stderr)
    table = features(videos, args.model, output, options, runner)
    if is_first:
        _print_summary(output, table)
    return SOME_BROKEN if table.about["failed"] else 0


def _open(args: argparse.Namespace, skipped: Skipped) -> InputVideos:
    """Open the videos; refuse URLs, and windows of videos that are not files."""
    if "://" in args.input and not is_remote(args.input):
        raise InputError(f"{args.input}: is a URL; download the videos and choose their folder")
    videos = open_input(Path(args.input), args.split, prefix=args.prefix, skipped=skipped)
    if args.window is not None and isinstance(videos.records, PackRecords):
        raise InputError(
            f"--window: {args.input} is a pack; choose a folder or list of video files"
        )
    return videos


def _print_summary(output: OutputPath, table: FeatureTable) -> None:
    """Print the failed videos, the shape of the features and the number of failed videos."""
    failed, num_videos = table.about["failed"], table.about["num_videos"]
    for video in failed:
        print(f"failed: {printable(video['error'])}", file=sys.stderr)
    rows = f"{len(table.ids)} videos"
    if table.starts is not None:
        rows = f"{len(table.ids)} windows of {len({*table.ids})} videos"
    num_labelled = int((table.labels != NO_LABEL).sum())
    shape = " × ".join(map(str, table.features.shape[1:]))
    print(
        f"{printable(output)}: {rows}, {shape} features each, {num_labelled} with a label",
        flush=True,
    )
    if failed:
        print(f"{len(failed)} of {num_videos} videos failed and are left out", file=sys.stderr)


def _init_processes(args: argparse.Namespace) -> None:
    """Join the other processes of this run. With a runner, this process runs alone.

    Raises:
        InputError: A runner is combined with options of processes, or joining them failed.
    """
    given = (args.coordinator, args.num_processes, args.process_id)
    if args.runner is None:
        setup.init_processes(*given)
        return
    if given != (None, None, None):
        raise InputError(
            "--runner cannot be combined with --coordinator, --num_processes or --process_id"
        )
    setup.init_processes(num_processes=1)  # a launcher may have started this process


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsers.features().parse_args(argv)
    try:
        setup.use_compilation_cache()
        _init_processes(args)
        with process_group.failing_together():
            return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.EXIT_CODE
