"""Loading of clips from videos: frame sampling, resizing, augmentation and cropping."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxvid.data.clips import autoaugment, sampling, transforms
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.rgb import COLOR_MATRICES
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.data.protocols import VideoReader, VideoRecord
from jaxvid.data.records import Record
from jaxvid.errors import InputError, check_option, short_repr

# Upper bounds, far above useful values. Larger values would exhaust the memory.
MAX_SIZES = {
    "num_frames": 4096,
    "crop": 8192,
    "short_side": 16384,
    "sampling_rate": 10**6,
    "num_clips": 1000,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Frame sampling and sizes of the evaluation views of a video.

    Attributes:
        num_frames: Frames per clip.
        crop: Height and width of a clip in pixels.
        short_side: Shorter side of the resized frames before the crop, in pixels.
        sampling: `segments`, `dense_stride` or `uniform_10s`; see `sampling.make_indices`.
        sampling_rate: For `dense_stride`: distance between two sampled frames at 30 frames/s.
        by_time: Whether videos with a variable frame rate are sampled by time instead of frame
            number.
        resize: `pil_bilinear` (antialiased, as Pillow) or `torch_bilinear` (not antialiased).
        color_matrix: Conversion of decoded video to RGB: `tagged` (by the matrix in the file) or
            `bt601` (always BT.601). It has no effect on packs and HDF5 files, whose frames
            are JPEG images.
        num_clips: Number of clips per video.
        num_crops: Number of crops per clip, 1 or 3.
    """

    num_frames: int
    crop: int
    short_side: int
    sampling: str = "segments"
    sampling_rate: int = 16
    by_time: bool = False
    resize: str = "pil_bilinear"
    color_matrix: str = "tagged"
    num_clips: int = 1
    num_crops: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipSpec(ViewSpec):
    """A `ViewSpec` with the augmentation of training clips.

    Attributes:
        train_crop: `random` (a random position after resizing to a random short side) or
            `multiscale` (XViT on Kinetics).
        train_short_side: Bounds, both included, of the short side in pixels that is drawn before a
            `random` crop; (0, 0) if no such crop is made.
        flip_prob: Probability of mirroring a training clip left to right.
        augment: Empty (none), `autoaugment` (v0) or `randaugment`, applied to the frames before
            they are resized and cropped.
        randaugment_layers: Number of operations of `randaugment`.
        randaugment_magnitude: Magnitude of `randaugment`, 0 to 10.
    """

    train_crop: str = "random"
    train_short_side: tuple[int, int] = (0, 0)
    flip_prob: float = 0.0
    augment: str = ""
    randaugment_layers: int = 2
    randaugment_magnitude: int = 9

    def __post_init__(self):
        for name, limit in MAX_SIZES.items():
            if not 0 < getattr(self, name) <= limit:
                raise InputError(f"{name}={short_repr(getattr(self, name))}: must be 1 to {limit}")
        options = {
            "sampling": sampling.SAMPLINGS,
            "resize": ("pil_bilinear", "torch_bilinear"),
            "color_matrix": COLOR_MATRICES,
            "num_crops": transforms.NUM_CROPS,
            "train_crop": ("random", "multiscale"),
            "augment": ("", "autoaugment", "randaugment"),
        }
        for name, valid in options.items():
            check_option(name, getattr(self, name), valid)
        max_clips = sampling.max_views(self.sampling) or self.num_clips
        if not 1 <= self.num_clips <= max_clips:
            raise InputError(
                f"num_clips={self.num_clips}: must be 1 to {max(max_clips, 1)} with sampling="
                f"{self.sampling!r}"
            )
        # The config has one field `short_side` for evaluation and the lower bound of training.
        for side in (self.short_side, self.train_short_side[0] or self.crop):
            if side < self.crop:
                raise InputError(
                    f"short_side={side} is smaller than the crop of {self.crop} px; increase it"
                )

    @property
    def clip_shape(self) -> tuple[int, ...]:
        """Shape `(t, h, w, c)` of a clip."""
        return self.num_frames, self.crop, self.crop, 3

    @property
    def views_shape(self) -> tuple[int, ...]:
        """Shape `(v, t, h, w, c)` of the evaluation views of a video."""
        return self.num_clips * self.num_crops, *self.clip_shape

    @property
    def eval_dtype(self) -> type[np.unsignedinteger]:
        """Pixel type of evaluation views: uint8, or uint16 in 1 / `FRACTIONS` grey levels."""
        return np.uint16 if self.resize == "torch_bilinear" else np.uint8

    def describe_mirroring(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Return a warning if mirrored clips of one class look like another class.

        Args:
            labels: Class names. Two classes are mirror images of each other if their names differ
                only in the words left and right.
        """
        swap, names = {"left": "right", "right": "left"}, {label.lower() for label in labels}
        for label in labels if self.flip_prob else ():
            words = re.split(r"\b(left|right)\b", label.lower())
            mirrored = "".join(swap.get(word, word) for word in words)
            if mirrored != label.lower() and mirrored in names:
                return (
                    f"data.flip_prob={self.flip_prob:g}: mirrored clips of {label!r} look like "
                    f"{mirrored!r}; to distinguish them, set --config.data.flip_prob=0",
                )
        return ()


def load_train_clip(
    record: VideoRecord,
    rng: np.random.Generator,
    spec: ClipSpec,
    out: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Decode and augment one training clip.

    Args:
        record: The video.
        rng: Generator of all random choices.
        spec: Sampling, sizes and augmentation.
        out: C-contiguous array that receives `video`; by default, a new array.

    Returns:
        A dict of `video` `(t, crop, crop, c)` uint8; `indices` `(t,)`, its frame numbers; `padded`,
        whether the video is so short that frames are repeated.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    with _open(record, spec) as reader:
        indices = clip_frames(reader, spec, rng)
        if out is None:
            out = np.empty(spec.clip_shape, np.uint8)
        if spec.augment:
            frames = enumerate(_augment(reader.get_frames(indices), rng, spec))
        else:
            frames = _enumerate_frames(reader, indices)
        _crop_frames(frames, rng, spec, out)
        padded = _is_padded(reader, spec)
    return {
        "video": out,
        "indices": indices.astype(np.int32),
        "padded": np.bool_(padded),
    }


def _augment(frames: np.ndarray, rng: np.random.Generator, spec: ClipSpec) -> np.ndarray:
    """Augment frames `(t, h, w, c)` as `spec.augment` says."""
    if spec.augment == "autoaugment":
        return autoaugment.autoaugment(frames, rng)
    layers, magnitude = spec.randaugment_layers, spec.randaugment_magnitude
    return autoaugment.randaugment(frames, rng, num_layers=layers, magnitude=magnitude)


def _crop_frames(
    frames: Iterable[tuple[int, np.ndarray]],
    rng: np.random.Generator,
    spec: ClipSpec,
    out: np.ndarray,
) -> None:
    """Resize, crop and mirror the frames of a training clip, one at a time.

    Args:
        frames: Positions in the clip and frames `(h, w, c)`.
        rng: Generator that draws the size and position of the crop, and whether it is mirrored.
        spec: Sizes and augmentation.
        out: `(t, crop, crop, c)`, receives the clip.
    """
    draw, short_side, window, is_mirrored = transforms.draw_multi_scale_crop, 0, None, False
    if spec.train_crop == "random":
        draw = transforms.draw_random_crop
        short_side = int(rng.integers(*spec.train_short_side, endpoint=True))
    for t, frame in frames:
        if short_side:
            frame = _resize(frame[None], short_side, spec, exact=False)[0]
        if window is None:
            window = draw(*frame.shape[:2], spec.crop, rng)
            is_mirrored = spec.flip_prob > 0 and rng.random() < spec.flip_prob
        crop, target = frame[window], out[t]
        if crop.shape != target.shape:
            transforms.resize(crop[None], spec.crop, spec.crop, out=target[None])
        else:
            target[:] = crop
        if is_mirrored:
            transforms.mirror(target)


def load_eval_views(
    video: VideoRecord | str | Path, spec: ClipSpec, out: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Decode a video and return all its evaluation views.

    The crops of a clip are cut from the same decoded and resized frames.

    Args:
        video: The video.
        spec: Sampling and sizes.
        out: C-contiguous array that receives `video`; by default, a new array.

    Returns:
        A dict of `video` `(v, t, crop, crop, c)` of `spec.eval_dtype`, with `v = num_clips ·
        num_crops` views, in which the crops of a clip are adjacent; `indices` `(num_clips, t)`, the
        frame numbers of the clips; `padded`, whether the video is so short that frames are
        repeated; `released`, whether STAM's released evaluation counts the video.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    record = Record(Path(video), 0) if isinstance(video, str | Path) else video
    with _open(record, spec) as reader:
        indices = clip_frames(reader, spec, None).reshape(spec.num_clips, spec.num_frames)
        if out is None:
            out = np.empty(spec.views_shape, spec.eval_dtype)
        for i, frame in _enumerate_frames(reader, indices.reshape(-1)):
            clip, t = divmod(i, spec.num_frames)
            frame = resize_eval_frames(frame[None], spec)
            for crop_index, crop in enumerate(cut_eval_crops(frame, spec)):
                out[clip * spec.num_crops + crop_index, t] = crop[0]
        padded = _is_padded(reader, spec)
        length, fps = reader.num_frames, reader.fps
    return {
        "video": out,
        "indices": indices.astype(np.int32),
        "padded": np.bool_(padded),
        "released": np.bool_(sampling.in_released_subset(length, spec.num_frames, fps=fps)),
    }


def clip_frames(reader: VideoReader, spec: ClipSpec, rng: np.random.Generator | None) -> np.ndarray:
    """Return the numbers of the frames that a clip is made of.

    Args:
        reader: The video.
        spec: Frame sampling of the clip.
        rng: Generator as in `load_train_clip`; None: the frames of all evaluation views.

    Returns:
        `(t,)` in training, `(num_clips · t,)` in evaluation.
    """
    if rng is not None:
        return _indices(reader, spec, rng=rng)
    views = [_indices(reader, spec, view=view) for view in range(spec.num_clips)]
    return np.concatenate(views)


def resize_eval_frames(frames: np.ndarray, spec: ClipSpec) -> np.ndarray:
    """Resize frames `(t, h, w, c)` uint8 for evaluation, exactly as the original programs do.

    Returns:
        `(t, h, w, c)` of `spec.eval_dtype` with a shorter side of `spec.short_side` pixels.
    """
    return _resize(frames, spec.short_side, spec, exact=True)


def _resize(frames: np.ndarray, short_side: int, spec: ClipSpec, *, exact: bool) -> np.ndarray:
    """Resize frames `(t, h, w, c)` to a short side of `short_side` pixels by `spec.resize`."""
    if spec.resize == "torch_bilinear":
        return transforms.resize_bilinear(frames, short_side, exact=exact)
    return transforms.resize_short_side(frames, short_side, exact=exact)


def cut_eval_crops(frames: np.ndarray, spec: ClipSpec) -> list[np.ndarray]:
    """Cut `spec.num_crops` crops `(t, crop, crop, c)` from resized frames `(t, h, w, c)`."""
    # XViT's program rounds half a pixel up. STAM's program uses torchvision, which rounds to even.
    rounding = "up" if spec.resize == "torch_bilinear" else "even"
    return transforms.eval_crops(frames, spec.crop, spec.num_crops, rounding=rounding)


def set_color_matrix(reader: VideoReader, spec: ClipSpec) -> None:
    """Make a reader convert decoded frames to RGB as `spec.color_matrix` says."""
    if isinstance(reader, VideoFile):  # other readers return RGB frames without conversion
        reader.color_matrix = spec.color_matrix


def _open(record: VideoRecord, spec: ClipSpec) -> VideoReader:
    reader = record.open()
    set_color_matrix(reader, spec)
    return reader


def _enumerate_frames(reader: VideoReader, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield positions in `indices` and their frames `(h, w, c)`, in any order.

    JPEG frames are decoded one at a time. Other readers decode all frames first.
    """
    if isinstance(reader, JpegFrames):
        return reader.enumerate_frames(indices)
    if isinstance(reader, VideoFile):
        return enumerate(reader.list_frames(indices))
    return enumerate(reader.get_frames(indices))


def _indices(
    reader: VideoReader,
    spec: ClipSpec,
    *,
    rng: np.random.Generator | None = None,
    view: int = 0,
) -> np.ndarray:
    """Return the frame numbers `(t,)` of a clip, for evaluation if `rng` is None."""
    length, times = _length(reader, spec)
    indices = sampling.make_indices(
        spec.sampling,
        length,
        spec.num_frames,
        sampling_rate=spec.sampling_rate,
        fps=reader.fps,
        rng=rng,
        view=(view, spec.num_clips),
    )
    return indices if times is None else sampling.frames_at_times(indices, times, reader.fps)


def _length(reader: VideoReader, spec: ClipSpec) -> tuple[int, np.ndarray | None]:
    """Return the number of frames to sample from, and their times.

    If frames are sampled by number, the times are None. Otherwise, the number of frames is the one
    that the video would have at a constant frame rate.
    """
    if not spec.by_time or reader.times is None or not reader.fps:
        return reader.num_frames, None
    return max(1, round(reader.times[-1] * reader.fps) + 1), reader.times


def _is_padded(reader: VideoReader, spec: ClipSpec) -> bool:
    length, _ = _length(reader, spec)
    rates = {"sampling_rate": spec.sampling_rate, "fps": reader.fps}
    return sampling.is_padded(spec.sampling, length, spec.num_frames, **rates)
