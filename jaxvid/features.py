"""Extract features of videos: the command `jaxvid features`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.features", "; run the same command to continue")

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxvid import parsers, remote_folder
from jaxvid.atomic import OutputPath, output_path
from jaxvid.data import fingerprints
from jaxvid.data.check import SOME_BROKEN
from jaxvid.data.folder_scan import Skipped
from jaxvid.data.formats.pack_reader import PackRecords, read_color_matrix
from jaxvid.data.input_videos import InputVideos, open_input
from jaxvid.data.records import NO_LABEL
from jaxvid.distributed import collectives, process_group, setup, sharding
from jaxvid.errors import InputError, check_option, printable
from jaxvid.inference.feature_extraction import (
    LAYERS,
    ExtractedFeatures,
    FeatureProtocol,
    extract_features,
)
from jaxvid.locks import LockedError, locked
from jaxvid.models import ModelConfig, Params, make_model_config
from jaxvid.object_store import is_remote
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.feature_file import (
    FORMAT_VERSION,
    FeatureTable,
    check_feature_file,
    save_features,
)
from jaxvid.storage.partial_results import PartialResults
from jaxvid.storage.preprocessing import check_fit, read_preprocessing
from jaxvid.training import run_metadata
from jaxvid.weights.resolve import resolve_model

DEVICE_VIEWS = 8  # views per batch and device, summed over the videos


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Options of the extraction.

    Attributes:
        layer: `video` for one vector per video or window, or `frames` for one vector per frame of
            the clip.
        num_clips: Clips per video; None: from the model card. With windows, it must be None.
        num_crops: Crops per clip, 1 or 3; None: from the model card.
        dtype: Compute dtype, one of `precision.DTYPES`.
        window: Length of a window in seconds. None: features of whole videos.
        stride: Time between the starts of consecutive windows in seconds; None without windows.
        batch_size: Videos or windows per batch, over all devices; None: 8 views per device.

    Raises:
        InputError: Options are out of range or cannot be combined.
    """

    layer: str = "video"
    num_clips: int | None = None
    num_crops: int | None = None
    dtype: str = "float32"
    window: float | None = None
    stride: float | None = None
    batch_size: int | None = None

    def __post_init__(self):
        check_option("--layer", self.layer, LAYERS)
        if self.window is None and self.stride is not None:
            raise InputError("--stride needs --window SECONDS")
        if self.window is not None and self.stride is None:
            raise InputError("--window needs --stride SECONDS, the time between starts of windows")
        if self.window is not None and self.num_clips is not None:
            raise InputError("--clips cannot be combined with --window: every window is one clip")
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name}={value:g}: must be a number of seconds above 0")


def features(
    videos: InputVideos, folder: str | Path, output: OutputPath, options: FeatureOptions
) -> FeatureTable:
    """Extract the features of videos on all devices, and write them to a file.

    An interrupted extraction is resumed when it is started again with the same arguments. If the
    output is in an object store, only on the same machine.

    Args:
        videos: The videos.
        folder: Model folder, or another name of a model; see `resolve_model`.
        output: File to write; its suffix is the format.
        options: Options of the extraction.

    Returns:
        The contents of the file.

    Raises:
        InputError: The model folder is unusable, an option is invalid, no video can be decoded, the
            file cannot be written, or another run is writing it.
    """
    collectives.raise_on_all_processes(check_feature_file, "--output", output)
    mesh = sharding.make_mesh(sharding.MeshShape())
    run_metadata.check_same_videos(fingerprints.describe_videos(videos.records))
    network = _load_network(folder, options, mesh)
    _warn_of_color_matrix(videos, network.protocol)
    local = remote_folder.local_folder(str(output))  # unfinished results are stored beside it
    with contextlib.ExitStack() as stack:
        collectives.raise_on_all_processes(_lock, stack, output, local)
        staging = local.with_name(f".{local.name}.unfinished")
        unfinished = PartialResults(staging, _resume_key(network, videos))
        extracted = extract_features(
            network.params,
            videos.records,
            network.protocol,
            graphdef=network.graphdef,
            batch_size=_choose_batch_size(options, network.protocol, len(videos.records)),
            mesh=mesh,
            unfinished=unfinished,
        )
        if not len(extracted.values):
            unfinished.remove()
            first = printable(next(iter(extracted.errors.values())))
            raise InputError(
                f"none of {len(videos.records)} videos can be decoded; the first error: {first}"
            )
        table = _make_table(extracted, videos, network)
        collectives.raise_on_all_processes(_save, output, table)
        unfinished.remove()
    return table


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


# ------------------------------------------------------------------ the network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The network of a model folder, and which features it computes.

    Attributes:
        name: Name of the model in its card.
        config: The model config.
        graphdef: The network's structure.
        params: The weights, on all devices.
        sha256: SHA-256 of the weights.
        protocol: Which features are extracted.
    """

    name: str
    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    sha256: str
    protocol: FeatureProtocol


def _load_network(folder: str | Path, options: FeatureOptions, mesh: Mesh) -> Network:
    """Load a model folder; all processes must call it.

    Raises:
        InputError: The folder is unusable, or the number of views is invalid.
    """
    folder = collectives.raise_on_all_processes(resolve_model, folder)
    card = model_card.load_card(folder)
    path = Path(folder) / model_card.CARD_NAME
    preprocessing = read_preprocessing(card, path)
    num_clips = options.num_clips if options.window is None else 1
    preprocessing = preprocessing.with_views(num_clips, options.num_crops)
    config = make_model_config(**card["config"] | {"dtype": options.dtype})
    graphdef, abstract_params = model_folder.abstract_sharded_model(config, mesh)
    check_fit(graphdef, abstract_params, preprocessing, path)
    params = model_folder.load_params(folder, abstract_params)
    return Network(
        name=card["name"],
        config=config,
        graphdef=graphdef,
        params=params,
        sha256=model_folder.fingerprint(params),
        protocol=FeatureProtocol(
            preprocessing=preprocessing,
            layer=options.layer,
            dtype=options.dtype,
            window=options.window,
            stride=options.stride,
        ),
    )


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
    is_first, skipped = not jax.process_index(), Skipped()
    videos = collectives.raise_on_all_processes(_open, args, skipped)
    if is_first:
        if counts := str(skipped):
            print(f"skipped in folders: {counts}", file=sys.stderr)
        classes = f"{len(videos.labels)} classes" if videos.labels else "no labels"
        count = f"{len(videos.records)} video{'s' * (len(videos.records) != 1)}"
        print(f"{printable(args.input)}: {videos.kind}, {count}, {classes}", file=sys.stderr)
    table = features(videos, args.model, output, options)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parsers.features().parse_args(argv)
    try:
        setup.use_compilation_cache()
        setup.init_processes(args.coordinator, args.num_processes, args.process_id)
        with process_group.failing_together():
            return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.EXIT_CODE
