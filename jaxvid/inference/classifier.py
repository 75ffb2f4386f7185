"""Classify video files with a model folder that is loaded and compiled once.

classifier = jaxvid.Classifier("runs/motion/model")
print(classifier.predict("clip.mp4").labels[0])
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import jax
import numpy as np
from jax.typing import DTypeLike
from scipy.special import softmax

from jaxvid.data.check import MAX_SECONDS, map_in_order
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.sliding_windows import gather_clips, plan_windows, prefetch, read_frames
from jaxvid.models import Params, family_of, merge_params, split_params
from jaxvid.progress import Progress
from jaxvid.storage.model_card import describe_assumed_labels
from jaxvid.storage.preprocessing import clip_shape, load_model_and_preprocessing, normalize
from jaxvid.weights.resolve import resolve_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted classes of a video.

    Attributes:
        video: Path of the file.
        labels: Names of the most likely classes, in descending order of probability.
        indices: Indices of these classes.
        probabilities: Probabilities of these classes. Those of all classes sum to 1.
        seconds: Wall time in seconds for decoding the video, plus the video's share of the time for
            computing its batch.
        padded: Whether the video is too short for a clip, so that frames are repeated.
        error: Decode error, or an empty string if the video was decoded. After a decode error, only
            `video` and `error` are set.
    """

    video: str
    labels: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    seconds: float = 0.0
    padded: bool = False
    error: str = ""

    def to_json(self) -> dict:
        """Return `{"video", "top": [{"label", "probability"}], "seconds", "padded"}`.

        If decoding failed: `{"video", "error"}`.
        """
        if self.error:
            return {"video": self.video, "error": self.error}
        pairs = zip(self.labels, self.probabilities, strict=True)
        return {
            "video": self.video,
            "top": [{"label": label, "probability": p} for label, p in pairs],
            "seconds": round(self.seconds, 4),
            "padded": self.padded,
        }


@functools.cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Classifier:
    """Classify video files on the first device.

    Args:
        folder: Model folder, or another name of a model; see `resolve_model`.
        batch_size: Videos per batch. A partial batch is padded and costs as much as a full one.
        num_clips: Clips per video; None: from the model card.
        num_crops: Crops per clip, 1 or 3; None: from the model card.
        num_threads: Decoder threads; None: one per CPU core.
        dtype: Compute dtype, one of `precision.DTYPES`, like the config field `eval.dtype`.

    Attributes:
        labels: Class names, in the order of the logits.
        config: The model config.
        spec: Sampling, resize and crops of the clips.
        batch_size: Number of videos per batch. It may be changed.

    Raises:
        InputError: The folder is unusable, or a value is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int = 1,
        num_clips: int | None = None,
        num_crops: int | None = None,
        num_threads: int | None = None,
        dtype: str = "float32",
    ):
        for name, value in (("batch_size", batch_size), ("num_threads", num_threads)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        setup.use_compilation_cache()
        folder = resolve_model(folder)
        card, model, preprocessing = load_model_and_preprocessing(folder, dtype)
        if warning := describe_assumed_labels(card, folder):
            _warn_once(warning)
        views = {"num_clips": num_clips, "num_crops": num_crops}
        overrides = {name: value for name, value in views.items() if value is not None}
        self.spec = dataclasses.replace(preprocessing.spec, **overrides)
        self.labels, self.config = card["labels"], model.config
        self.batch_size, self._num_threads = batch_size, num_threads or os.cpu_count()
        self._normalize = functools.partial(
            normalize, mean=preprocessing.mean, std=preprocessing.std
        )
        self._shares_frames = family_of(model.config).shares_frames
        self._graphdef, self._params = split_params(model)
        self._programs = {}  # (function name, shape and dtype of its input) → compiled program

    # -------------------------------------------------------------- whole videos

    def predict(
        self, videos: str | Path | Sequence[str | Path], top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Classify one video or several.

        Args:
            videos: A file, or a sequence of files.
            top_k: Number of classes to return. If the model has fewer classes, all are returned.

        Returns:
            A prediction if `videos` is one file; otherwise a list of predictions in the order of
            the files. In a list, files that cannot be decoded have `error` set.

        Raises:
            DecodeError: `videos` is one file, and it cannot be decoded.
            InputError: `top_k` is below 1, or the logits are not finite.
        """
        if not isinstance(videos, str | Path):
            return list(self.stream(videos, top_k))
        [prediction] = self.stream([videos], top_k)
        if prediction.error:
            raise DecodeError(prediction.error)
        return prediction

    def stream(self, videos: Sequence[str | Path], top_k: int = 5) -> Iterator[Prediction]:
        """Classify several videos, batch by batch, while threads decode the next ones.

        Args:
            videos: Files.
            top_k: Number of classes to return. If the model has fewer classes, all are returned.

        Yields:
            The prediction of each file, in order. Files that cannot be decoded have `error` set.

        Raises:
            InputError: `top_k` is below 1, or the logits are not finite.
        """
        if top_k < 1:
            raise InputError(f"top_k={top_k}: must be at least 1")
        views = self.spec.num_clips * self.spec.num_crops
        self._compile(
            self._score, (self.batch_size, *clip_shape(self.spec, views)), self.spec.eval_dtype
        )
        group = []  # videos of the next batch, and videos between them that cannot be decoded
        for loaded in map_in_order(self._load, videos, self._num_threads):
            group.append(loaded)
            if sum("video" in example for _, example in group) == self.batch_size:
                yield from self._predict_group(group, top_k)
                group = []
        yield from self._predict_group(group, top_k)

    def scores(self, views: np.ndarray) -> np.ndarray:
        """Classify videos from all their views.

        Args:
            views: Pixels `(b, v, t, h, w, c)`: the `video` arrays that `load_eval_views` returns
                for `spec`.

        Returns:
            `(b, num_classes)` float32: logits, summed over the views.

        Raises:
            InputError: The logits are not finite, because the weights are damaged.
        """
        return self._run(self._score, views)

    def _load(self, video: str | Path) -> tuple[str, dict]:
        """Decode a video; return its path, and the result of `load_eval_views` or `{"error"}`.

        `seconds`, the wall time of decoding, is added to the result.
        """
        cv2.setNumThreads(0)  # videos are already decoded in parallel
        start = time.perf_counter()
        try:
            example = load_eval_views(video, self.spec)
        except DecodeError as error:
            example = {"error": str(error)}
        return str(video), {**example, "seconds": time.perf_counter() - start}

    def _predict_group(self, group: list[tuple[str, dict]], top_k: int) -> Iterator[Prediction]:
        """Classify the decoded videos of a group; yield predictions for all its videos in order."""
        decoded = [example["video"] for _, example in group if "video" in example]
        start = time.perf_counter()
        scores = iter(self.scores(np.stack(decoded)) if decoded else ())
        share = (time.perf_counter() - start) / max(len(decoded), 1)
        num_views = self.spec.num_clips * self.spec.num_crops
        for video, example in group:
            if "error" in example:
                yield Prediction(video=video, error=example["error"])
                continue
            probabilities = softmax(next(scores).astype(np.float64) / num_views)
            top = np.argsort(-probabilities, kind="stable")[:top_k]
            yield Prediction(
                video=video,
                labels=tuple(self.labels[i] for i in top),
                indices=tuple(map(int, top)),
                probabilities=tuple(float(probabilities[i]) for i in top),
                seconds=example["seconds"] + share,
                padded=bool(example["padded"]),
            )

    # -------------------------------------------------------------- windows of a long video

    def windows(self, video: str | Path, window: float, stride: float) -> ClassTimeline:
        """Classify sliding windows of a video, each like a separate video.

        Every needed frame is decoded once, in one pass. Memory does not grow with the length of
        the video. If the network computes each frame's features independently, the features are
        computed once and used by all windows that contain the frame. The stride is then adjusted so
        that windows share frames (see `plan_windows`).

        Args:
            video: Video file with a frame rate or timestamps.
            window: Length of a window in seconds. `uniform_10s` sampling uses only the first 10 s
                of a window.
            stride: Time between the starts of consecutive windows in seconds. A stride shorter than
                a frame is replaced by the duration of a frame. If the stride is changed, the new
                value is printed to stderr.

        Returns:
            The probabilities of all classes over time, from one clip per window with all crops.

        Raises:
            DecodeError: The file cannot be decoded, or has neither frame rate nor timestamps.
            InputError: `window` or `stride` is not above 0, or the logits are not finite.
        """
        cv2.setNumThreads(0)  # decoding and classification already run in parallel
        shares_frames = self._shares_frames
        with VideoFile(video, max_seconds=MAX_SECONDS) as reader:
            plan = plan_windows(
                reader, self.spec, window, stride, align=shares_frames, name=str(video)
            )
            if abs(plan.stride - stride) > 1e-6 * stride:
                reason = (
                    "so that windows share frames" if shares_frames else "the duration of one frame"
                )
                message = f"stride: {plan.stride:g} s instead of {stride:g} s, {reason}"
                print(message, file=sys.stderr, flush=True)
            needed = np.unique(plan.indices)
            size = min(self.batch_size * self.spec.num_frames, len(needed))
            # The decoding thread must end before the reader is closed.
            frames = prefetch(read_frames(reader, needed, self.spec, size))
            with contextlib.closing(frames):
                scores = self.score_windows(plan.indices, frames)
        return ClassTimeline(
            video=str(video),
            labels=self.labels,
            starts=plan.starts,
            ends=plan.ends,
            padded=plan.padded,
            stride=plan.stride,
            probabilities=softmax(scores.astype(np.float64) / self.spec.num_crops, axis=-1),
        )

    def score_windows(
        self, indices: np.ndarray, frames: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Classify windows as their frames arrive; return their logits, summed over the crops.

        Args:
            indices: Frame numbers of each window `(windows, t)`.
            frames: The frames of all windows, from `sliding_windows.read_frames`.

        Returns:
            `(windows, num_classes)` float32: logits, summed over the crops.

        Raises:
            DecodeError: A frame is damaged.
            InputError: The logits are not finite, because the weights are damaged.
        """
        classify = self._score_features if self._shares_frames else self._score
        items = self._frame_features(frames) if self._shares_frames else frames
        clips = gather_clips(indices, items)  # (m t ...) per window
        progress = Progress(len(indices), title="classifying", unit="window")
        scores = []
        with contextlib.closing(progress):
            while batch := list(itertools.islice(clips, self.batch_size)):
                scores.append(self._run(classify, np.stack(batch)))
                progress.advance(len(batch))
        collections.deque(items, maxlen=0)  # `read_frames` may report damage only at its end
        return np.concatenate(scores)

    def _frame_features(
        self, chunks: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Compute the features of frames.

        Args:
            chunks: Frame numbers `(i,)` and crops of the frames `(j, m, h, w, c)`, from
                `read_frames`.

        Yields:
            For each chunk, the same frame numbers and the features `(j, m, d)` of its crops.
        """
        for numbers, crops in chunks:
            video = crops.swapaxes(0, 1)  # (m j h w c)
            program = self._compile(self._features, video.shape, video.dtype)
            yield numbers, np.asarray(program(self._params, video)).swapaxes(0, 1)

    # -------------------------------------------------------------- on the device

    def _score(self, params: Params, views: jax.Array) -> jax.Array:
        """Map pixels `(b, v, t, h, w, c)` to logits `(b, num_classes)`, summed over the views."""
        b, v, *clip = views.shape
        video = self._normalize(views.reshape(b * v, *clip))
        return merge_params(self._graphdef, params)(video).reshape(b, v, -1).sum(axis=1)

    def _features(self, params: Params, video: jax.Array) -> jax.Array:
        """Map pixels `(b, t, h, w, c)` to the features of each frame `(b, t, d)`."""
        return merge_params(self._graphdef, params).frame_features(self._normalize(video))

    def _score_features(self, params: Params, features: jax.Array) -> jax.Array:
        """Map features `(b, v, t, d)` to logits `(b, num_classes)`, summed over the views."""
        model, (b, v, t, d) = merge_params(self._graphdef, params), features.shape
        logits = model.classify(features.reshape(b * v, t, d))
        return logits.reshape(b, v, -1).sum(axis=1)

    def _compile(
        self,
        function: Callable[[Params, jax.Array], jax.Array],
        shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> jax.stages.Compiled:
        """Compile a function of weights and one array, once per shape and dtype."""
        key = (function.__name__, shape, np.dtype(dtype))
        if key not in self._programs:
            lowered = jax.jit(function).lower(self._params, jax.ShapeDtypeStruct(shape, dtype))
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _run(
        self, function: Callable[[Params, jax.Array], jax.Array], inputs: np.ndarray
    ) -> np.ndarray:
        """Map inputs to logits in batches of `batch_size`; the last batch is padded with zeros.

        Raises:
            InputError: The logits are not finite.
        """
        size, outputs = self.batch_size, []
        program = self._compile(function, (size, *inputs.shape[1:]), inputs.dtype)
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            outputs.append(np.asarray(program(self._params, padded))[: len(batch)])
        logits = np.concatenate(outputs)
        if not np.isfinite(logits).all():
            raise InputError(
                "the logits are not finite, so the weights are damaged; retrain or reconvert the "
                "model"
            )
        return logits
