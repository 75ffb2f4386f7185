"""The events of `/v1/explain`, which the page and the report draw."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import numpy as np

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.clips.description import describe_sampling
from jaxvid.inference.attention_rollout import describe_attention
from jaxvid.inference.clip_frames import find_crop_box
from jaxvid.serving import decoder_tasks
from jaxvid.serving.samples import CLIP_SECONDS, is_demo
from jaxvid.serving.served_model import Event, ServedModel
from jaxvid.serving.service import Service
from jaxvid.serving.uploads import Upload

FRAMES_PER_SECOND = 4  # assumed for clips that span whole videos
WINDOWS_PER_CLIP = 4  # windows that start within the duration of a clip
MAX_WINDOWS = 120  # of a timeline whose stride is not given
TIMELINE_TOP_K = 20  # classes per window, from which the page draws curves
DIGITS = 5  # of attention


def clip_seconds(model: ServedModel) -> float:
    """Return the duration of a clip, or an estimate if clips span whole videos."""
    spec = model.spec
    if spec.sampling == "uniform_10s":
        return 10.0
    if spec.sampling == "dense_stride":
        return spec.num_frames * spec.sampling_rate / 30
    return CLIP_SECONDS if is_demo(model.labels) else spec.num_frames / FRAMES_PER_SECOND


async def explain(
    service: Service,
    model: ServedModel,
    upload: Upload,
    *,
    top_k: int,
    window: float | None,
    stride: float | None,
) -> AsyncGenerator[Event]:
    """Classify a video, and compute its frames, attention and timeline.

    Args:
        service: State of the server.
        model: The model.
        upload: The video.
        top_k: Number of classes of the prediction.
        window: Length of the timeline's windows in seconds; None: the duration of a clip.
        stride: Time between the starts of consecutive windows in seconds; None: see
            `choose_stride`. If both are None, videos shorter than `window` + `stride` have none.

    Yields:
        The events `prediction`, `info`, `frames` and, unless the engine lacks it, `attention`. For
        timelines, `plan` and one `window` per window. Finally `done`.

    Raises:
        DecodeError: The video cannot be decoded.
        RequestError: The video needs too much time, or has too many windows.
    """
    start = time.perf_counter()
    items = service.pool.run(decoder_tasks.frames, upload.fd, model.spec)
    async with contextlib.aclosing(items), service.reserve(model.spec):
        clip = await anext(items)
        decoded = time.perf_counter()
        probabilities = await model.probabilities(clip["video"])
        end = time.perf_counter()
        seconds = {"decode": decoded - start, "network": end - decoded, "total": end - start}
        yield "prediction", model.describe_prediction(clip, probabilities, top_k, seconds)
        # Exhausted, because closing a task before its end kills its process.
        [described] = [item async for item in items]
    info = described["info"]
    yield "info", info | {"bytes": sum(size for _, size in upload.parts)}
    size = info["height"], info["width"]
    frames = {"note": describe_frames(model.spec), "frames": described["frames"]}
    yield "frames", frames | {"crop_box": await asyncio.to_thread(find_crop_box, *size, model.spec)}
    if "attend" in model.engine.programs:
        yield "attention", await attend(model, clip)
    is_chosen = window is not None or stride is not None
    window = window or clip_seconds(model)
    stride = stride or choose_stride(window, info["seconds"])
    if is_chosen or (info["seconds"] or 0) >= window + stride:
        async for event in timeline(service, model, upload, window, stride):
            yield event
    yield "done", {}


def describe_frames(spec: ClipSpec) -> str:
    """Return a description of the frames that are shown."""
    parts = [f"{spec.num_frames} frames, {describe_sampling(spec)}."]
    if spec.num_clips > 1:
        parts.append(f"The network saw {spec.num_clips} clips; this is the first one.")
    others = f" and {spec.num_crops - 1} others" if spec.num_crops > 1 else ""
    parts.append(f"The network saw the outlined crop{others}, of {spec.crop} × {spec.crop} px.")
    return " ".join(parts)


def choose_stride(window: float, seconds: float | None) -> float:
    """Return the default stride of a timeline in seconds: at most `MAX_WINDOWS` windows.

    Args:
        window: Length of a window in seconds.
        seconds: Duration of the video; None: unknown.
    """
    return max(window / WINDOWS_PER_CLIP, (seconds or 0) / MAX_WINDOWS)


async def attend(model: ServedModel, clip: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compute the attention rollout on the centre crop of the first clip.

    Args:
        model: The model. Its engine has the program `attend`.
        clip: The result of `load_eval_views`.

    Returns:
        `patches` `(t, rows, columns)`, which sum to 1 in each frame, `weights` `(t,)` of frames,
        which sum to 1, and `notes`, sentences that explain them.
    """
    spec = model.spec
    [outputs] = await model.run("attend", [clip["video"][spec.num_crops // 2]])
    attention = describe_attention(outputs, spec, model.config)
    return {
        "patches": attention["patch_attention"].astype(float).round(DIGITS).tolist(),
        "weights": attention["frame_attention"].astype(float).round(DIGITS).tolist(),
        "notes": attention["notes"],
    }


async def timeline(
    service: Service, model: ServedModel, upload: Upload, window: float, stride: float
) -> AsyncGenerator[Event]:
    """Yield the events `plan` and `window` of a video; see `ServedModel.timeline`."""
    items = service.read_windows(model, upload, window, stride)
    async with contextlib.aclosing(items):
        async for name, data in model.timeline(items, window, TIMELINE_TOP_K):
            if name in ("plan", "window"):
                yield name, data
