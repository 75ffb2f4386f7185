"""A model that is served: its card, and its network behind batchers."""

import dataclasses
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import InputError
from jaxvid.inference.sliding_windows import ClipGatherer, WindowPlan
from jaxvid.models import ModelConfig
from jaxvid.progress import compiling
from jaxvid.serving import input_warnings
from jaxvid.serving.batcher import Batcher, NetworkThread
from jaxvid.serving.engine import Engine
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Settings
from jaxvid.storage.preprocessing import Preprocessing

Event = tuple[str, dict[str, Any]]  # name and data of a server-sent event

# Programs that are compiled for all sizes of batches; the others only for size 1.
BATCHED = ("score", "frame_features", "score_features")

# Measurement of the sizes of batches.
SLOWER = 1.1  # sizes above one that is slower per item by this factor are not measured
MAX_RUNS = 5  # per size
MEASURE_SECONDS = 1.0  # per size, after which no other run is started


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """Labels, config and preprocessing of a model.

    Attributes:
        labels: Class names, in the order of the logits.
        config: The model config.
        preprocessing: Preprocessing from the model card.
    """

    labels: list[str]
    config: ModelConfig
    preprocessing: Preprocessing


class ServedModel:
    """A model and its engine. `start` must be called before a video is classified.

    Args:
        name: Name of the model in requests.
        card: The contents of its `model.json`, or of the description of an exported file.
        description: Its labels, config and preprocessing.
        engine: Its network.

    Attributes:
        labels: Class names, in the order of the logits.
        config: The model config.
        preprocessing: Preprocessing from the model card.
        spec: Sampling, resize and crops of the clips.
        shares_frames: Whether windows share the features of frames.
        is_ready: Whether all programs are compiled.
    """

    def __init__(
        self,
        name: str,
        card: dict[str, Any],
        description: ModelDescription,
        engine: Engine,
    ):
        self.name, self.card, self.engine = name, card, engine
        self.labels, self.config = description.labels, description.config
        self.preprocessing, self.spec = description.preprocessing, description.preprocessing.spec
        self.shares_frames = "frame_features" in engine.programs
        self.is_ready = self._is_closing = False
        self._batchers: dict[str, Batcher] = {}

    # -------------------------------------------------------------- life cycle

    async def start(
        self,
        settings: Settings,
        thread: NetworkThread,
        observe: Callable[[str, int], None],
        in_progress: Callable[[], int],
    ) -> None:
        """Compile all programs.

        Args:
            settings: Sizes of batches.
            thread: Thread that runs the network.
            observe: Called with the name of the model and the number of items of each batch.
            in_progress: Returns the number of requests in progress.

        Raises:
            InputError: The outputs are not finite, because the weights are damaged.
        """
        for program, sizes in (await thread.call(self._warm_up, settings)).items():
            self._batchers[program] = Batcher(
                lambda batch, program=program: self.engine.run(program, batch),
                thread,
                sizes=sizes,
                max_wait=settings.max_wait if len(sizes) > 1 else 0,
                observe=lambda size: observe(self.name, size),
                in_progress=in_progress,
            )
        self._windows_per_group = max(1, settings.max_batch // self.spec.num_crops)
        self.is_ready = True

    def _warm_up(self, settings: Settings) -> dict[str, Sequence[int]]:
        """Compile each program; return the sizes of its batches."""
        sizes_of = {}
        with compiling(self.name):
            for program in self.engine.programs:
                sizes = settings.batch_sizes if program in BATCHED else (1,)
                measures = settings.measure_batches and len(sizes) > 1
                sizes_of[program] = self._warm_up_program(program, sizes, measures=measures)
        return sizes_of

    def _warm_up_program(
        self, program: str, sizes: Sequence[int], *, measures: bool
    ) -> Sequence[int]:
        """Compile a program for sizes of batches.

        Args:
            program: Name of the program.
            sizes: The sizes, ascending.
            measures: Whether to drop the sizes above the one with the shortest time per item.

        Returns:
            The sizes to use.
        """
        seconds = []  # per item
        for size in sizes:
            if self._is_closing:
                break
            self.engine.warm_up(program, size)
            if measures:
                seconds.append(_shortest_time(self.engine.warm_up, program, size) / size)
                if seconds[-1] > SLOWER * min(seconds):
                    break  # larger batches are slower still
        return sizes[: seconds.index(min(seconds)) + 1] if seconds else sizes

    async def close(self) -> None:
        """Stop the batchers."""
        self._is_closing = True
        for batcher in self._batchers.values():
            await batcher.close()

    def num_waiting(self) -> int:
        """Return the number of views, clips or frames that wait for the network."""
        return sum(map(len, self._batchers.values()))

    async def run(self, program: str, items: Sequence[np.ndarray]) -> list[Any]:
        """Return the output of a program of the engine for each item.

        Raises:
            RequestError: The engine does not have this program.
        """
        if program not in self.engine.programs:
            raise RequestError(
                400,
                f"model {self.name}: an ONNX file computes only classes; serve the model folder",
            )
        try:
            return await self._batchers[program].submit(items)
        except InputError as error:  # the weights are damaged
            raise RequestError(500, str(error)) from None

    # -------------------------------------------------------------- card

    def describe(self) -> dict[str, Any]:
        """Return the model card as it is sent to clients, without absolute paths."""
        provenance = {
            name: value
            for name, value in self.card["provenance"].items()
            if not (isinstance(value, str) and os.path.isabs(value))
        }
        return {
            "name": self.name,
            "network": self.card["name"],
            "labels": self.labels,
            "labels_source": self.card["labels_source"],
            "activation": self.card["activation"],
            "preprocessing": self.preprocessing.to_json(),
            "protocol": {
                "num_clips": self.spec.num_clips,
                "num_crops": self.spec.num_crops,
                "views": self.preprocessing.num_views,
            },
            "provenance": provenance,
        }

    def spec_for(self, views: int | None) -> ClipSpec:
        """Return the specification of clips with another number of views.

        Args:
            views: Number of views. A multiple of the model card's crops has these crops; another
                number has one crop per clip. None: from the model card.

        Raises:
            InputError: The sampling does not allow this number of clips.
        """
        if views is None:
            return self.spec
        crops = self.spec.num_crops if views % self.spec.num_crops == 0 else 1
        return dataclasses.replace(self.spec, num_clips=views // crops, num_crops=crops)

    def top(self, probabilities: np.ndarray, top_k: int) -> list[dict[str, Any]]:
        """Return `{"label", "index", "probability"}` of the most likely classes.

        Args:
            probabilities: `(classes,)`.
            top_k: Number of classes. If the model has fewer classes, all are returned.
        """
        order = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
        return [
            {"label": self.labels[i], "index": i, "probability": float(probabilities[i])}
            for i in order
        ]

    def describe_prediction(
        self,
        clip: Mapping[str, np.ndarray],
        probabilities: np.ndarray,
        top_k: int,
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the response to a request for a prediction.

        Args:
            clip: The result of `load_eval_views`.
            probabilities: `(classes,)`.
            top_k: Number of classes.
            seconds: Duration of each stage of the request.
        """
        return {
            "model": self.name,
            "top": self.top(probabilities, top_k),
            "padded": bool(clip["padded"]),
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "warnings": input_warnings.describe(clip),
        }

    # -------------------------------------------------------------- inference

    async def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Classify a video from its views.

        Args:
            views: Pixels `(v, t, h, w, c)`: `video` of `load_eval_views`.

        Returns:
            `(classes,)` float64.
        """
        logits = await self.run("score", list(views[:, None]))  # one item (1, t, h, w, c) per view
        return self.engine.probabilities(np.sum(logits, axis=0), len(views))

    async def features(self, views: np.ndarray) -> np.ndarray:
        """Return the features `(d,)` float32 of a video, averaged over its views.

        Args:
            views: Pixels `(v, t, h, w, c)`.
        """
        outputs = await self.run("embed", list(views[:, None]))
        return np.mean([output["video"] for output in outputs], axis=0)

    async def timeline(
        self, items: AsyncIterator[Any], window: float, top_k: int
    ) -> AsyncIterator[Event]:
        """Classify sliding windows of a video as its frames arrive.

        Args:
            items: Items of the task `decoder_tasks.windows`.
            window: Length of a window in seconds.
            top_k: Number of classes per window.

        Yields:
            The events `plan`, `window` for each window, `progress`, and finally `done`.
        """
        start, plan = time.monotonic(), WindowPlan(**await anext(items))
        gatherer, done, total = ClipGatherer(plan.indices), 0, len(plan.indices)
        yield (
            "plan",
            {
                "model": self.name,
                "windows": total,
                "window": window,
                "stride": round(plan.stride, 6),
                "seconds": round(float(plan.ends[-1]), 3),
            },
        )
        async for item in items:
            values = item["crops"]
            values = await self._encode_frames(values) if self.shares_frames else values
            clips = gatherer.add(item["numbers"], values)
            while group := list(itertools.islice(clips, self._windows_per_group)):
                for probabilities in await self._score_windows(group):
                    yield "window", self._describe_window(plan, done, probabilities, top_k)
                    done += 1
            seconds = round(time.monotonic() - start, 3)
            yield "progress", {"done": done, "total": total, "seconds": seconds}
        yield "done", {"windows": total, "seconds": round(time.monotonic() - start, 3)}

    async def _encode_frames(self, crops: np.ndarray) -> np.ndarray:
        """Map the crops of frames `(t, m, h, w, c)` to their features `(t, m, d)`."""
        features = await self.run("frame_features", list(crops.swapaxes(0, 1)))
        return np.stack(features, axis=1)

    async def _score_windows(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """Classify windows.

        Args:
            clips: Crops `(m, t, h, w, c)`, or features `(m, t, d)`, of each window.

        Returns:
            Probabilities `(windows, classes)`.
        """
        num_crops = len(clips[0])
        items = [crop[None] for clip in clips for crop in clip]
        logits = await self.run("score_features" if self.shares_frames else "score", items)
        logits = np.stack(logits).reshape(len(clips), num_crops, -1).sum(axis=1)
        return self.engine.probabilities(logits, num_crops)

    def _describe_window(
        self, plan: WindowPlan, i: int, probabilities: np.ndarray, top_k: int
    ) -> dict[str, Any]:
        """Return the event of window `i`, with times in seconds."""
        return {
            "start": round(float(plan.starts[i]), 3),
            "end": round(float(plan.ends[i]), 3),
            "padded": bool(plan.padded[i]),
            "top": self.top(probabilities, top_k),
        }


def _shortest_time(function: Callable[..., None], *arguments: Any) -> float:
    """Return the shortest wall time in seconds of up to `MAX_RUNS` calls of a function."""
    seconds = []
    while len(seconds) < MAX_RUNS and sum(seconds) < MEASURE_SECONDS:
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
