"""Classify videos with a model folder that is loaded and compiled once.

classifier = jaxvid.Classifier("runs/motion/model")
print(classifier("clip.mp4"))
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from jaxvid.data.check import map_in_order
from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.inference.attention_rollout import AttentionRollout, make_rollout
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.clip_frames import read_clip
from jaxvid.inference.compiled_network import CompiledNetwork, Function
from jaxvid.inference.inputs import Source, VideoInput, is_single, make_input, make_inputs
from jaxvid.inference.results import Features, Prediction, ResultList
from jaxvid.inference.window_classification import classify_windows
from jaxvid.models import make_model_config
from jaxvid.storage.dtype_choice import AUTO, choose_dtype
from jaxvid.storage.model_card import describe_assumed_labels, load_card
from jaxvid.storage.preprocessing import clip_shape, load_model_and_preprocessing
from jaxvid.weights.resolve import resolve_model

ATTENTION_TOP_K = 3  # number of classes in AttentionRollout.top


@functools.cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Classifier:
    """Classify videos on the first device.

    A video is a path, an http or https URL, bytes, a file object opened in binary mode, or an array
    of RGB frames `(t, h, w, 3)` uint8. Every method that takes a video also takes a list of them,
    and then returns a `ResultList`.

    The argument `fps` is the frame rate of arrays. If it is None, clips are sampled as at
    30 frames/s. All frames of a file, passed as an array with the rate of the file, give the same
    clips as the file. There is one exception: an array has no timestamps, so that files with a
    variable frame rate give other clips if the preprocessing has `by_time`, and other windows.
    `segments` sampling without `by_time` does not depend on the frame rate.

    Args:
        folder: Model folder, or another name of a model; see `resolve_model`.
        batch_size: Videos per batch. A partial batch is padded and costs as much as a full one.
        num_clips: Clips per video; None: from the model card.
        num_crops: Crops per clip, 1 or 3; None: from the model card.
        num_threads: Decoder threads; None: one per CPU core.
        dtype: Compute dtype, one of `precision.DTYPES`, like the config field `eval.dtype`; or
            `auto`: the faster of float32 and bfloat16, measured once per network and machine.

    Attributes:
        labels: Class names, in the order of the logits.
        config: The model config.
        preprocessing: Preprocessing from the model card, with `num_clips` and `num_crops`.
        spec: Sampling, resize and crops of the clips.
        batch_size: Number of videos per batch. It may be changed.
        network: The network on the device.

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
        if dtype == AUTO:
            choice = choose_dtype(make_model_config(**load_card(folder)["config"]), train=False)
            print(choice, file=sys.stderr)
            dtype = choice.dtype
        card, model, preprocessing = load_model_and_preprocessing(folder, dtype)
        if warning := describe_assumed_labels(card, folder):
            _warn_once(warning)
        self.preprocessing = preprocessing.with_views(num_clips, num_crops)
        self.spec = self.preprocessing.spec
        self.labels, self.config = card["labels"], model.config
        self.batch_size, self._num_threads = batch_size, num_threads or os.cpu_count()
        self.network = CompiledNetwork(model, preprocessing, card["activation"])

    def __call__(
        self, videos: Source | Iterable[Source], top_k: int = 5, *, fps: float | None = None
    ) -> Prediction | ResultList:
        """Classify one video or several; see `predict`."""
        return self.predict(videos, top_k, fps=fps)

    # -------------------------------------------------------------- whole videos

    def predict(
        self, videos: Source | Iterable[Source], top_k: int = 5, *, fps: float | None = None
    ) -> Prediction | ResultList:
        """Classify one video or several.

        Args:
            videos: A video, or several.
            top_k: Number of classes to return. If the model has fewer classes, all are returned.
            fps: Frame rate of arrays; None: unknown.

        Returns:
            A prediction if `videos` is one video; otherwise a list of predictions in the order of
            the videos. In a list, videos that cannot be decoded have `error` set.

        Raises:
            DecodeError: `videos` is one video, and it cannot be decoded.
            InputError: A value has a wrong type or shape, `top_k` is below 1, or the logits are not
                finite.
        """
        return _one_or_all(lambda inputs: self.stream(inputs, top_k), videos, fps)

    def stream(
        self, videos: Iterable[Source], top_k: int = 5, *, fps: float | None = None
    ) -> Iterator[Prediction]:
        """Classify several videos, batch by batch, while threads decode the next ones.

        Args:
            videos: The videos.
            top_k: Number of classes to return. If the model has fewer classes, all are returned.
            fps: Frame rate of arrays; None: unknown.

        Yields:
            The prediction of each video, in order. Videos that cannot be decoded have `error` set.

        Raises:
            InputError: A value has a wrong type or shape, `top_k` is below 1, or the logits are not
                finite.
        """
        if top_k < 1:
            raise InputError(f"top_k={top_k}: must be at least 1")
        num_views = self.spec.num_clips * self.spec.num_crops
        for name, example in self._run_videos(self.network.score, make_inputs(videos, fps)):
            if "error" in example:
                yield Prediction(video=name, error=example["error"])
                continue
            probabilities = self.network.probabilities(example["output"], num_views)
            top = np.argsort(-probabilities, kind="stable")[:top_k]
            yield Prediction(
                video=name,
                labels=tuple(self.labels[i] for i in top),
                indices=tuple(map(int, top)),
                probabilities=tuple(float(probabilities[i]) for i in top),
                seconds=example["seconds"],
                padded=bool(example["padded"]),
            )

    def features(
        self, videos: Source | Iterable[Source], *, fps: float | None = None
    ) -> Features | ResultList:
        """Compute the features of one video or several, averaged over the views.

        Args:
            videos: A video, or several.
            fps: Frame rate of arrays; None: unknown.

        Returns:
            The features if `videos` is one video; otherwise a list in the order of the videos, in
            which videos that cannot be decoded have `error` set.

        Raises:
            DecodeError: `videos` is one video, and it cannot be decoded.
            InputError: A value has a wrong type or shape, or the features are not finite.
        """
        return _one_or_all(self._stream_features, videos, fps)

    def _stream_features(self, inputs: Iterable[VideoInput]) -> Iterator[Features]:
        """Yield the features of each video, in order."""
        for name, example in self._run_videos(self.network.embed, inputs):
            if "error" in example:
                yield Features(video=name, error=example["error"])
                continue
            arrays = example["output"]
            yield Features(video=name, vector=arrays["video"], frames=arrays["frames"])

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
        return self.network.run(self.network.score, views, self.batch_size)

    def _run_videos(
        self, function: Function, inputs: Iterable[VideoInput]
    ) -> Iterator[tuple[str, dict]]:
        """Apply a function to the views of each video.

        Yields:
            The name of each video and the results of `_load`, in order. `output` is the result of
            the function; `seconds` includes the video's share of the time for its batch.
        """
        views = self.spec.num_clips * self.spec.num_crops
        shape = (self.batch_size, *clip_shape(self.spec, views))
        self.network.compile(function, shape, self.spec.eval_dtype)
        group = []  # videos of the next batch, and videos between them that cannot be decoded
        for loaded in map_in_order(self._load, inputs, self._num_threads):
            group.append(loaded)
            if sum("video" in example for _, example in group) == self.batch_size:
                yield from self._run_group(function, group)
                group = []
        yield from self._run_group(function, group)

    def _load(self, video: VideoInput) -> tuple[str, dict]:
        """Decode a video; return its name, and the result of `load_eval_views` or `{"error"}`.

        `seconds`, the wall time of reading and decoding, is added to the result.
        """
        cv2.setNumThreads(0)  # videos are already decoded in parallel
        start = time.perf_counter()
        try:
            with video:
                example = load_eval_views(video, self.spec)
        except DecodeError as error:
            example = {"error": str(error)}
        return video.id, {**example, "seconds": time.perf_counter() - start}

    def _run_group(
        self, function: Function, group: list[tuple[str, dict]]
    ) -> Iterator[tuple[str, dict]]:
        """Apply a function to the decoded videos of a group; see `_run_videos`."""
        decoded = [example for _, example in group if "video" in example]
        if decoded:
            start = time.perf_counter()
            views = np.stack([example["video"] for example in decoded])
            outputs = self.network.run(function, views, self.batch_size)
            share = (time.perf_counter() - start) / len(decoded)
            for i, example in enumerate(decoded):
                example["output"] = jax.tree.map(lambda x, i=i: x[i], outputs)
                example["seconds"] += share
        yield from group

    # -------------------------------------------------------------- windows of a long video

    def windows(
        self,
        video: Source | Iterable[Source],
        window: float,
        stride: float,
        *,
        fps: float | None = None,
    ) -> ClassTimeline | ResultList:
        """Classify sliding windows of a video, each like a separate video.

        Every needed frame is decoded once, in one pass. Memory does not grow with the length of
        the video. If the network computes each frame's features independently, the features are
        computed once and used by all windows that contain the frame. The stride is then adjusted so
        that windows share frames (see `plan_windows`).

        Args:
            video: A video with a frame rate or timestamps, or several.
            window: Length of a window in seconds. `uniform_10s` sampling uses only the first 10 s
                of a window.
            stride: Time between the starts of consecutive windows in seconds. A stride shorter than
                a frame is replaced by the duration of a frame. If the stride is changed, the new
                value is printed to stderr.
            fps: Frame rate of arrays, which they need.

        Returns:
            The probabilities of all classes over time, from one clip per window with all crops; a
            list of them if `video` is a list.

        Raises:
            DecodeError: A video cannot be decoded, or has neither frame rate nor timestamps.
            InputError: A value has a wrong type or shape, `window` or `stride` is not above 0, or
                the logits are not finite.
        """
        classify = functools.partial(
            classify_windows,
            self.network,
            spec=self.spec,
            labels=self.labels,
            window=window,
            stride=stride,
            batch_size=self.batch_size,
        )
        return _one_or_all(lambda inputs: map(classify, inputs), video, fps)

    # -------------------------------------------------------------- attention

    def attention(
        self,
        video: Source | Iterable[Source],
        *,
        clip: int = 0,
        num_clips: int = 3,
        fps: float | None = None,
    ) -> AttentionRollout | ResultList:
        """Compute the attention rollout on the centre crop of a clip.

        Args:
            video: A video, or several.
            clip: Index of the clip. Clip 0 is the first one that `predict` classifies.
            num_clips: Number of clips, which are spread over the video as in evaluation.
            fps: Frame rate of arrays; None: unknown.

        Returns:
            The attention to patches and frames; a list of them if `video` is a list.

        Raises:
            DecodeError: A video cannot be decoded.
            InputError: A value has a wrong type or shape, `clip` is out of range, or the logits are
                not finite.
        """
        if not 0 <= clip < num_clips:
            raise InputError(f"clip={clip}: must be 0 to {num_clips - 1} (num_clips={num_clips})")
        # Clip 0 is the same for any num_clips. If it is requested, decode no other clips.
        views = {"num_clips": num_clips if clip else 1, "num_crops": 1}
        spec = dataclasses.replace(self.spec, **views)
        attend = functools.partial(self._attend, clip=clip, spec=spec)
        return _one_or_all(lambda inputs: map(attend, inputs), video, fps)

    def _attend(self, video: VideoInput, *, clip: int, spec: ClipSpec) -> AttentionRollout:
        """Compute the attention rollout for a clip of one video; see `attention`."""
        with video:
            views = load_eval_views(video, spec)
            frames = read_clip(video, views["indices"][clip], spec)
        outputs = self.network.apply(self.network.attend, views["video"][clip : clip + 1])
        probabilities = self.network.probabilities(outputs.pop("logits"))
        order = np.argsort(-probabilities)[:ATTENTION_TOP_K]
        top = [(self.labels[i], float(probabilities[i])) for i in order]
        return make_rollout(frames, outputs, top, spec, self.config)


def _one_or_all(
    function: Callable[[Iterable[VideoInput]], Iterator[Any]],
    videos: Source | Iterable[Source],
    fps: float | None,
) -> Any:
    """Apply a function to one video or several.

    Args:
        function: Maps several videos to their results.
        videos: A video, or several.
        fps: Frame rate of arrays; None: unknown.

    Returns:
        One result if `videos` is one video, otherwise a `ResultList`.

    Raises:
        DecodeError: `videos` is one video, and its result is an error.
        InputError: A value has a wrong type or shape, or `fps` is given, but there is no array.
    """
    if not is_single(videos):
        inputs = list(make_inputs(videos, fps))
        if fps is not None and not any(video.is_array for video in inputs):
            raise InputError(f"fps={fps}: is only for arrays of frames; the list has none")
        return ResultList(function(inputs))
    [result] = function([make_input(videos, fps)])
    if error := getattr(result, "error", ""):
        raise DecodeError(error)
    return result
