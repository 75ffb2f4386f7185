"""Features of videos, or of sliding windows of videos, computed on all devices and processes."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxvid import progress
from jaxvid.data.protocols import VideoRecord
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.inference.feature_batches import NO_VIDEO, Rows, video_batches, window_batches
from jaxvid.models import Params, merge_params
from jaxvid.storage.eval_step import run_ahead
from jaxvid.storage.partial_results import PartialResults
from jaxvid.storage.preprocessing import Preprocessing, normalize

LAYERS = ("video", "frames")  # keys of the result of a network's `features`
Step = Callable[[Params, dict[str, jax.Array]], jax.Array]
# The columns of `Rows` as arrays, `error` as a list, and `features`, `(b, d)` or `(b, t, d)`.
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureProtocol:
    """Which features of a video are extracted.

    Attributes:
        preprocessing: Preprocessing and number of views. The features of all views are averaged.
        layer: `video` for one vector per clip, or `frames` for one vector per frame of the clip.
        dtype: Compute dtype, one of `precision.DTYPES`.
        window: Length of a window in seconds. None: features of whole videos.
        stride: Time between the starts of consecutive windows in seconds; None without windows.
    """

    preprocessing: Preprocessing
    layer: str = "video"
    dtype: str = "float32"
    window: float | None = None
    stride: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractedFeatures:
    """Features of `n` videos or windows that could be decoded, in the order of the videos.

    Attributes:
        values: `(n, d)` float32, or `(n, t, d)` for the layer `frames`.
        videos: `(n,)` index of the video of each row.
        padded: `(n,)` booleans: the video or window is too short for a clip, so that frames are
            repeated.
        starts: `(n,)` start of each window in seconds; zeros without windows.
        ends: `(n,)` end of each window in seconds; zeros without windows.
        errors: Index of each video that could not be decoded → the decode error.
    """

    values: np.ndarray
    videos: np.ndarray
    padded: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    errors: dict[int, str]


def extract_features(
    params: Params,
    records: Sequence[VideoRecord],
    protocol: FeatureProtocol,
    *,
    graphdef: nnx.GraphDef,
    batch_size: int,
    mesh: Mesh,
    unfinished: PartialResults,
) -> ExtractedFeatures:
    """Extract the features of all videos.

    Args:
        params: The network's weights.
        records: The videos. With `protocol.window`, they must be files.
        protocol: Which features are extracted.
        graphdef: The network's structure.
        batch_size: Videos or windows per batch, over all processes.
        mesh: Batches are sharded over it.
        unfinished: Stores the features of each batch; those of an interrupted run are reused.

    Raises:
        InputError: The features are not finite, or cannot be stored.
    """
    collector = _Collector(len(records), unfinished=unfinished)
    batches = extract_batches(
        params,
        records,
        protocol,
        step=make_feature_step(protocol, graphdef, mesh),
        batch_size=batch_size,
        mesh=mesh,
        todo=collector.unfinished_videos(),
    )
    with contextlib.closing(collector), contextlib.closing(batches):
        for batch in batches:
            collector.add(batch)
    return collector.results()


def extract_batches(
    params: Params,
    records: Sequence[VideoRecord],
    protocol: FeatureProtocol,
    *,
    step: Step,
    batch_size: int,
    mesh: Mesh,
    todo: dict[int, int],
) -> Iterator[Batch]:
    """Extract the features of videos batch by batch. All processes must call it.

    Args:
        params: As in `extract_features`.
        records: As in `extract_features`.
        protocol: As in `extract_features`.
        step: The result of `make_feature_step`.
        batch_size: As in `extract_features`.
        mesh: As in `extract_features`.
        todo: Index of each video to read → number of its rows that are finished.

    Yields:
        The rows of each batch, of all processes, without those that pad it.

    Raises:
        InputError: The features are not finite.
    """
    shard = sharding.batch_shard(mesh, batch_size)
    make_batches = video_batches
    if protocol.window is not None:
        times = {"window": protocol.window, "stride": protocol.stride}
        make_batches = functools.partial(window_batches, **times)
    batches = make_batches(
        records,
        protocol.preprocessing.spec,
        todo=todo,
        batch_size=batch_size // shard[1],
        shard=shard,
    )
    with contextlib.closing(batches):
        for features, rows in run_ahead(step, params, batches, mesh):
            batch = _join_columns(features, collectives.gather_columns(shard[0], rows))
            if len(batch["video"]):
                yield batch


def _join_columns(features: jax.Array, columns: Rows) -> Batch:
    """Return the rows of a batch with their features; wait for the device.

    Raises:
        InputError: The features are not finite.
    """
    used = [i for i, video in enumerate(columns["video"]) if video != NO_VIDEO]
    batch = {name: np.array(column)[used] for name, column in columns.items()}
    batch["error"] = batch["error"].tolist()
    is_decoded = np.array([not error for error in batch["error"]], bool)
    batch["features"] = np.asarray(features)[used]
    if not np.isfinite(batch["features"][is_decoded]).all():
        raise InputError(
            "the features are not finite, so the weights are damaged; choose another model "
            "folder, or retrain or reconvert the model"
        )
    batch["features"][~is_decoded] = 0
    return batch


def make_feature_step(protocol: FeatureProtocol, graphdef: nnx.GraphDef, mesh: Mesh) -> Step:
    """Make the jitted step that extracts features: `feature_step`. Its compilation is announced."""
    step = functools.partial(
        feature_step,
        graphdef=graphdef,
        mean=protocol.preprocessing.mean,
        std=protocol.preprocessing.std,
        layer=protocol.layer,
    )
    jitted = jax.jit(step, out_shardings=sharding.replicated(mesh))
    write_line = (lambda _: None) if jax.process_index() else progress.print_above_bar
    return progress.announce_compilation(jitted, "the network", write_line)


def feature_step(
    params: Params,
    batch: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    mean: float,
    std: float,
    layer: str,
) -> jax.Array:
    """Extract the features of a batch of videos, averaged over their views.

    Args:
        params: The network's weights.
        batch: `video`, `(b, v, t, h, w, c)` in uint8 or uint16; see `normalize`.
        graphdef: The network's structure.
        mean: As in `normalize`.
        std: As in `normalize`.
        layer: One of `LAYERS`.

    Returns:
        `(b, d)` float32, or `(b, t, d)` for the layer `frames`.
    """
    b, v, *clip = batch["video"].shape
    video = normalize(batch["video"].reshape(b * v, *clip), mean, std)
    features = merge_params(graphdef, params).features(video)[layer]  # (b·v d) or (b·v t d)
    features = features.reshape(b, v, *features.shape[1:])
    return features.astype(jnp.float32).mean(axis=1)


# ------------------------------------------------------------------ results


class _Collector:
    """Collects and stores the features batch by batch.

    Args:
        num_videos: Number of videos.
        unfinished: Stores the features of each batch.
    """

    def __init__(self, num_videos: int, *, unfinished: PartialResults):
        self._unfinished = unfinished
        self._batches, self._num_failed = [], 0
        self._num_rows = dict.fromkeys(range(num_videos), 0)  # of each video that is not finished
        for batch in unfinished.load():
            self._keep(batch)
        done = num_videos - len(self._num_rows)
        is_first = not jax.process_index()
        if is_first and unfinished.note:
            progress.print_above_bar(unfinished.note)
        if is_first and self._batches:
            progress.print_above_bar(f"{done} of {num_videos} videos were finished before")
        self._progress = progress.Progress(
            num_videos,
            title="extracting",
            unit="video",
            done=done,
            bar=is_first,
            write_line=progress.to_stderr if is_first else None,
        )

    def unfinished_videos(self) -> dict[int, int]:
        """Return the index of each video that is not finished → its number of finished rows."""
        return self._num_rows.copy()

    def add(self, batch: Batch) -> None:
        """Add a batch. All processes must call it.

        Raises:
            InputError: The batch cannot be stored.
        """
        collectives.raise_on_all_processes(self._unfinished.add, batch)
        self._keep(batch)
        note = f"{self._num_failed} failed" if self._num_failed else ""
        self._progress.advance(int(batch["last"].sum()), note)

    def _keep(self, batch: Batch) -> None:
        """Keep the rows of a batch, and count them."""
        self._batches.append(batch)
        self._num_failed += sum(bool(error) for error in batch["error"])
        for video, is_last in zip(batch["video"].tolist(), batch["last"], strict=True):
            self._num_rows[video] += 1
            if is_last:
                del self._num_rows[video]

    def close(self) -> None:
        """Close the progress bar."""
        self._progress.close()

    def results(self) -> ExtractedFeatures:
        """Return the features of all videos, in order."""
        if self._num_rows:
            raise RuntimeError(f"{len(self._num_rows)} videos are not finished")
        return join_batches(self._batches)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return the rows of all batches as one batch."""
    names = [name for name in batches[0] if name != "error"]
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in names}
    return {**columns, "error": [error for batch in batches for error in batch["error"]]}


def join_batches(batches: Sequence[Batch]) -> ExtractedFeatures:
    """Return the features of all videos in order, from batches with all their rows."""
    columns = concatenate(batches)
    pairs = zip(columns["video"].tolist(), columns["error"], strict=True)
    errors = {video: error for video, error in pairs if error}
    # The windows of a video are in order, because one process loads them one after the other.
    order = np.argsort(columns["video"], kind="stable")
    order = order[~np.isin(columns["video"][order], list(errors))]
    return ExtractedFeatures(
        values=columns["features"][order],
        videos=columns["video"][order],
        padded=columns["padded"][order],
        starts=columns["start"][order],
        ends=columns["end"][order],
        errors=errors,
    )
