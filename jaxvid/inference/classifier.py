"""Video files in, labels out: a model folder that is loaded once and compiled once.

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import jax
import numpy as np

from jaxvid.data.check import MAX_SECONDS, map_in_order
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.sliding_windows import gather_clips, plan_windows, prefetch, read_frames
from jaxvid.models import merge_params, split_params
from jaxvid.models.stam import STAM
from jaxvid.progress import Progress
from jaxvid.storage import eval_step
from jaxvid.storage.preprocessing import clip_shape, load_model_and_preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network says of a video.

    Attributes:
        video: The file.
        labels: The most likely classes, the likeliest first.
        probabilities: Theirs, in [0, 1]; of all classes together they are 1.
        seconds: Wall time: decoding, and the video's share of its batch's computation.
        padded: Whether the video is too short for its clip and repeats frames.
        error: Why it cannot be decoded, and then the rest is empty; empty: it can.
    """

    video: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    seconds: float = 0.0
    padded: bool = False
    error: str = ""

    def to_json(self) -> dict:
        """`{"video", "top": [{"label", "probability"}], "seconds", "padded"}`, or `error`."""
        if self.error:
            return {"video": self.video, "error": self.error}
        pairs = zip(self.labels, self.probabilities, strict=True)
        return {
            "video": self.video,
            "top": [{"label": label, "probability": p} for label, p in pairs],
            "seconds": round(self.seconds, 4),
            "padded": self.padded,
        }


class Classifier:
    """Classifies video files on the first device.

    Args:
        folder: A model folder.
        batch_size: Videos that are computed together; a batch that is not full costs as much.
        num_clips: Clips of a video; None: as many as the model was tested with.
        num_crops: Crops of a clip, 1 or 3; None: likewise.
        num_threads: Threads that decode; None: one per CPU core.
        dtype: Of the computation, `float32` or `bfloat16`, as `eval.dtype`.

    Attributes:
        labels: Names of all classes, in order.
        config: The network's config.
        spec: How clips are made.
        batch_size: As given; may be changed.

    Raises:
        InputError: The folder is unusable, or a number is impossible.
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
        card, model, preprocessing = load_model_and_preprocessing(folder, dtype)
        views = {"num_clips": num_clips, "num_crops": num_crops}
        given = {name: value for name, value in views.items() if value is not None}
        self.spec = dataclasses.replace(preprocessing.spec, **given)
        self.labels, self.config = card["labels"], model.config
        self.batch_size, self._num_threads = batch_size, num_threads or os.cpu_count()
        self._normalize = functools.partial(
            eval_step.normalize, mean=preprocessing.mean, std=preprocessing.std
        )
        self._shares_frames = isinstance(model, STAM)
        self._graphdef, self._params = split_params(model)
        self._programs = {}  # (function, shape and dtype of its input) → compiled

    # -------------------------------------------------------------- whole videos

    def predict(
        self, videos: str | Path | Sequence[str | Path], top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Classifies a video, or several.

        Args:
            videos: A file, or a sequence of files.
            top_k: How many classes to name; at most all.

        Returns:
            A prediction, or one for each file in their order; those that cannot be decoded have
            `error`.

        Raises:
            DecodeError: One file was asked for, and it cannot be decoded.
            InputError: `top_k` is below 1.
        """
        if not isinstance(videos, str | Path):
            return list(self.stream(videos, top_k))
        [prediction] = self.stream([videos], top_k)
        if prediction.error:
            raise DecodeError(prediction.error)
        return prediction

    def stream(self, videos: Sequence[str | Path], top_k: int = 5) -> Iterator[Prediction]:
        """As `predict` of several, batch by batch; threads decode the next ones meanwhile."""
        if top_k < 1:
            raise InputError(f"top_k={top_k}: must be at least 1")
        views = self.spec.num_clips * self.spec.num_crops
        self._compile(
            self._score, (self.batch_size, *clip_shape(self.spec, views)), self.spec.eval_dtype
        )
        group = []  # up to a full batch, and those between that cannot be decoded
        for loaded in map_in_order(self._load, videos, self._num_threads):
            group.append(loaded)
            if sum("video" in example for _, example in group) == self.batch_size:
                yield from self._predict_group(group, top_k)
                group = []
        yield from self._predict_group(group, top_k)

    def scores(self, views: np.ndarray) -> np.ndarray:
        """Classifies views of videos.

        Args:
            views: `(b, v, t, h, w, c)`, as `load_eval_views` makes them of `spec`.

        Returns:
            `(b, num_classes)` float32: the sums of the views' logits.

        Raises:
            InputError: They are not finite: the weights are damaged.
        """
        return self._run(self._score, views)

    def _load(self, video: str | Path) -> tuple[str, dict]:
        """A video's name, and its views or its `error`; and the seconds that decoding took."""
        cv2.setNumThreads(0)  # videos are decoded in parallel, not the parts of a frame
        start = time.perf_counter()
        try:
            example = load_eval_views(video, self.spec)
        except DecodeError as error:
            example = {"error": str(error)}
        return str(video), {**example, "seconds": time.perf_counter() - start}

    def _predict_group(self, group: list[tuple[str, dict]], top_k: int) -> Iterator[Prediction]:
        good = [example for _, example in group if "video" in example]
        start = time.perf_counter()
        rows = iter(self.scores(np.stack([e["video"] for e in good])) if good else ())
        share = (time.perf_counter() - start) / max(len(good), 1)
        num_views = self.spec.num_clips * self.spec.num_crops
        for video, example in group:
            if "error" in example:
                yield Prediction(video=video, error=example["error"])
                continue
            probabilities = softmax(next(rows) / num_views)
            top = np.argsort(-probabilities, kind="stable")[:top_k]
            yield Prediction(
                video=video,
                labels=tuple(self.labels[i] for i in top),
                probabilities=tuple(float(probabilities[i]) for i in top),
                seconds=example["seconds"] + share,
                padded=bool(example["padded"]),
            )

    # -------------------------------------------------------------- windows of a long video

    def windows(self, video: str | Path, window: float, stride: float) -> ClassTimeline:
        """Classifies each of many windows of a video as a video of its own.

        Every needed frame is decoded once, in one pass; memory does not grow with the length. Of a
        STAM, whose frames do not see each other, the features of a frame are computed once, too,
        for all windows that show it; the stride is fitted to its sampling (see `plan_windows`).

        Args:
            video: A file with a known frame rate, or with timestamps.
            window: Seconds of a window; STAM looks at the first 10 of each.
            stride: Seconds from one window's start to the next one's; if another is used, that is
                told on stderr.

        Returns:
            The probabilities of all classes over time: one clip of `spec`'s crops a window.

        Raises:
            DecodeError: The file cannot be decoded or has neither rate nor timestamps.
            InputError: `window` or `stride` is not above 0.
        """
        cv2.setNumThreads(0)
        shares = self._shares_frames
        with VideoFile(video, max_seconds=MAX_SECONDS) as reader:
            plan = plan_windows(reader, self.spec, window, stride, align=shares, name=str(video))
            if abs(plan.stride - stride) > 1e-6 * stride:
                why = "so that windows share frames" if shares else "a frame of the video"
                told = f"stride: {plan.stride:g} s instead of {stride:g} s, {why}"
                print(told, file=sys.stderr, flush=True)
            needed = np.unique(plan.indices)
            size = min(self.batch_size * self.spec.num_frames, len(needed))
            # A thread decodes: it ends before the reader is closed.
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
            probabilities=softmax(scores / self.spec.num_crops),
        )

    def score_windows(
        self, indices: np.ndarray, frames: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Classifies windows, as their frames come.

        Args:
            indices: `(windows, t)` frames of each.
            frames: Those of all windows, as `windows.read_frames` gives them.

        Returns:
            `(windows, num_classes)` float32: the sums of the crops' logits.

        Raises:
            InputError: They are not finite: the weights are damaged.
        """
        classify = self._score_features if self._shares_frames else self._score
        items = self._frame_features(frames) if self._shares_frames else frames
        clips = gather_clips(indices, items)  # of each window (m t ...)
        progress = Progress(len(indices), title="classifying", unit="window")
        scores = []
        with contextlib.closing(progress):
            while batch := list(itertools.islice(clips, self.batch_size)):
                scores.append(self._run(classify, np.stack(batch)))
                progress.advance(len(batch))
        collections.deque(items, maxlen=0)
        return np.concatenate(scores)

    def _frame_features(
        self, chunks: Iterator[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Replaces the crops of frames by their features `(j, m, d)`."""
        for part, crops in chunks:
            video = crops.swapaxes(0, 1)  # (m j h w c)
            program = self._compile(self._features, video.shape, video.dtype)
            yield part, np.asarray(program(self._params, video)).swapaxes(0, 1)

    # -------------------------------------------------------------- on the device

    def _score(self, params, views: jax.Array) -> jax.Array:
        """`(b, v, t, h, w, c)` pixels → the sums of the views' logits `(b, num_classes)`."""
        b, v, *clip = views.shape
        video = self._normalize(views.reshape(b * v, *clip))
        return merge_params(self._graphdef, params)(video).reshape(b, v, -1).sum(axis=1)

    def _features(self, params, video: jax.Array) -> jax.Array:
        """A STAM's `(b, t, h, w, c)` pixels → the frames' features `(b, t, d)`."""
        return merge_params(self._graphdef, params).frame_features(self._normalize(video))

    def _score_features(self, params, features: jax.Array) -> jax.Array:
        """`(b, v, t, d)` → the sums of the views' logits `(b, num_classes)`."""
        model, (b, v, t, d) = merge_params(self._graphdef, params), features.shape
        logits = model.head(model.video_features(features.reshape(b * v, t, d)))
        return logits.reshape(b, v, -1).sum(axis=1)

    def _compile(self, function, shape: tuple[int, ...], dtype):
        """The program of a function of weights and an array; each is compiled once."""
        key = (function.__name__, shape, np.dtype(dtype))
        if key not in self._programs:
            lowered = jax.jit(function).lower(self._params, jax.ShapeDtypeStruct(shape, dtype))
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def _run(self, function, inputs: np.ndarray) -> np.ndarray:
        """Calls a function that gives logits on `batch_size` rows at a time, the last ones padded.

        Raises:
            InputError: Logits are not finite.
        """
        size, rows = self.batch_size, []
        program = self._compile(function, (size, *inputs.shape[1:]), inputs.dtype)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            full = np.zeros((size, *part.shape[1:]), part.dtype)
            full[: len(part)] = part
            rows.append(np.asarray(program(self._params, full))[: len(part)])
        logits = np.concatenate(rows)
        if not np.isfinite(logits).all():
            raise InputError(
                "the network gives logits that are not finite: its weights are damaged"
            )
        return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
