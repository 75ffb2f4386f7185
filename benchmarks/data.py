"""Compare the data pipeline with alternatives, on one thread, in alternating runs.

python benchmarks/data.py                     generated videos of 340×256, 10 s, 30 frames/s
python benchmarks/data.py --size 640x480      larger videos

A clip is 16 frames spread over a video, scaled to a short side of 256 px and cropped to 224 px, as
uint8. The compared programs ("sides") decode the same frames. For each side, the benchmark prints
clips per second of CPU time on one core, which depends little on other load, the median of the
paired ratios, and the ratio of the total times. Last, it prints the cost of each stage of a
training clip.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

import av
import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance, ImageOps

from jaxvid.data.clips.clip import (
    ClipSpec,
    autoaugment,
    load_eval_views,
    load_train_clip,
    sampling,
    transforms,
)
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.formats.packed_videos import PackedVideo
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.data.prepare import prepare

NUM_FRAMES, SHORT_SIDE, CROP = 16, 256, 224
SECONDS, FPS = 10, 30
SPEC = ClipSpec(num_frames=NUM_FRAMES, crop=CROP, short_side=SHORT_SIDE)
_TRAIN = dataclasses.replace(SPEC, train_crop="multiscale", flip_prob=0.5)
TRAIN_SPECS = {  # training clips of XViT on Kinetics, with and without AutoAugment
    "with AutoAugment": dataclasses.replace(_TRAIN, augment="autoaugment"),
    "multi-scale crop, flip": _TRAIN,
}


# ------------------------------------------------------------------ videos


def make_texture(rng: np.random.Generator, size: int, contrast: float) -> Image.Image:
    """Make a picture with a spectrum of about 1/f, like that of photographs."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    noise = np.fft.fft2(rng.standard_normal((3, size, size)), axes=(1, 2))
    planes = np.fft.ifft2(noise / np.maximum(frequency, 1 / size) ** 1.2, axes=(1, 2)).real
    planes /= planes.std(axis=(1, 2), keepdims=True)
    planes = planes[:1] + 0.3 * planes  # mostly grey, like photographs
    values = rng.uniform(90, 150, (3, 1, 1)) + contrast * planes
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_video(path: Path, width: int, height: int, seed: int) -> None:
    """Write a video of two moving objects, with camera shake, sensor noise and one cut."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    cut, shake = int(rng.integers(60, SECONDS * FPS - 60)), np.zeros(2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)  # x264's defaults: crf 23, keyint 250
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(SECONDS * FPS):
            if t in (0, cut):
                layers = [make_texture(rng, 2 * max(width, height), 40) for _ in range(3)]
                centres, speeds = rng.uniform(0.3, 0.7, (3, 2)), rng.uniform(-1, 1, (3, 2))
                radii = rng.uniform(0.1, 0.3, (3, 2)) * (width, height)
            shake = shake + rng.normal(0, 0.2, 2)
            frame = None
            for layer, centre, speed, radius in zip(layers, centres, speeds, radii, strict=True):
                # The first layer is the background, which drifts. The objects swing and turn.
                x, y = (centre + 0.2 * speed * np.sin(t / 20)) * (width, height)
                angle = 0.0 if frame is None else 0.5 * speed[0] * np.sin(t / 15)
                zoom = 1 + 0.05 * np.sin(t / 60)
                c, s = zoom * np.cos(angle), zoom * np.sin(angle)
                dx, dy = shake + (width / 2, height / 2) - np.array([x, y]) * (frame is not None)
                picture = np.asarray(
                    layer.transform(
                        (width, height), Image.Transform.AFFINE, (c, -s, dx, s, c, dy),
                        Image.Resampling.BILINEAR,
                    )
                )  # fmt: skip
                if frame is None:
                    frame = picture
                else:
                    inside = ((columns - x) / radius[0]) ** 2 + ((rows - y) / radius[1]) ** 2 < 1
                    frame = np.where(inside[..., None], picture, frame)
            noisy = frame + rng.normal(0, 2, frame.shape)
            image = av.VideoFrame.from_ndarray(np.clip(noisy, 0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


# ------------------------------------------------------------------ sides: path → clip


def finish(frames: list[np.ndarray]) -> np.ndarray:
    """Scale and crop frames to `(t, h, w, c)`; all sides share this function."""
    frames = transforms.resize_short_side(np.stack(frames), SHORT_SIDE)
    return np.ascontiguousarray(transforms.eval_crops(frames, CROP, 1)[0])


def clip_indices(length: int) -> list[int]:
    """Return the frame numbers of the clip, ascending."""
    return sampling.segment_indices(length, NUM_FRAMES).tolist()


def with_jaxvid(source: Path | PackedVideo) -> np.ndarray:
    """Load the clip of a video file or of a packed video with this project's pipeline."""
    return np.ascontiguousarray(load_eval_views(source, SPEC)["video"][0])


def train_clip(records: dict, paths: list[Path], spec: ClipSpec, i: int) -> np.ndarray:
    """Load the i-th augmented training clip."""
    return load_train_clip(records[paths[i % len(paths)]], np.random.default_rng(i), spec)["video"]


def xvit_views(record: PackedVideo, *, exact: bool) -> np.ndarray:
    """Load XViT's three test crops `(v t h w c)`, unrounded as uint16 or rounded to uint8."""
    views = np.empty((3, NUM_FRAMES, CROP, CROP, 3), np.uint16 if exact else np.uint8)
    with record.open() as reader:
        for t, frame in reader.enumerate_frames(clip_indices(reader.num_frames)):
            frame = transforms.resize_bilinear(frame[None], CROP, exact=exact)
            for v, crop in enumerate(transforms.eval_crops(frame, CROP, 3)):
                views[v, t] = crop[0]
    return views


def jpegs_of(video: PackedVideo) -> list[bytes]:
    """Return the JPEG pictures of the frames in a packed video's clip."""
    size = video.listed.frames_per_record
    positions = [divmod(i, size) for i in clip_indices(video.listed.num_frames)]
    records = video.records.read([video.listed.record + n for n, _ in positions])
    return [values["frames"][i] for (_, i), values in zip(positions, records, strict=True)]


def with_pyav(path: Path) -> np.ndarray:
    """Decode the video with PyAV from its start to the last frame of the clip."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        indices = clip_indices(stream.frames)
        frames = []
        for i, frame in enumerate(container.decode(stream)):
            if i in indices:
                frames.append(frame.to_ndarray(format="rgb24"))
            if i == indices[-1]:
                break
    return finish(frames)


def with_opencv(path: Path) -> np.ndarray:
    """Decode with OpenCV from the start of the video, and convert only the frames of the clip."""
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    indices = clip_indices(int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
    frames = []
    for i in range(indices[-1] + 1):
        video.grab()
        if i in indices:
            frames.append(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
    video.release()
    return finish(frames)


def make_with_torch(paths: list[Path]) -> Callable[[Path], np.ndarray]:
    """Return a function that loads a clip with a torch DataLoader and PyAV in this process."""
    import torch

    torch.set_num_threads(1)

    class Videos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int):
            return torch.from_numpy(with_pyav(paths[index]))

    def load(path: Path) -> np.ndarray:
        subset = torch.utils.data.Subset(Videos(), [paths.index(path)])
        return next(iter(torch.utils.data.DataLoader(subset)))[0].numpy()

    return load


# ------------------------------------------------------------------ augmentation

RESAMPLING = {  # interpolation mode of OpenCV → of Pillow
    cv2.INTER_NEAREST: Image.Resampling.NEAREST,
    cv2.INTER_LINEAR: Image.Resampling.BILINEAR,
    cv2.INTER_CUBIC: Image.Resampling.BICUBIC,
}


def warp(image: Image.Image, matrix: tuple, mode: int) -> Image.Image:
    """Apply an affine transform with Pillow; fill pixels from outside the image with grey."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, RESAMPLING[mode], fillcolor=(128,) * 3
    )


PILLOW = {  # AutoAugment operations for one frame, with Pillow
    "autocontrast": ImageOps.autocontrast,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda image, bits: image.point(
        [i & 0xFF00 >> bits & 255 for i in range(256)] * 3  # keeps the `bits` highest bits
    ),
    "rotate": lambda image, degrees, mode: image.rotate(
        degrees, RESAMPLING[mode], fillcolor=(128,) * 3
    ),
    "shear_x": lambda image, factor, mode: warp(image, (1, factor, 0, 0, 1, 0), mode),
    "shear_y": lambda image, factor, mode: warp(image, (1, 0, 0, factor, 1, 0), mode),
    "solarize": ImageOps.solarize,
    "solarize_add": lambda image, addition: image.point(
        [min(i + addition, 255) if i < 128 else i for i in range(256)] * 3
    ),
    "translate_y": lambda image, share, mode: warp(
        image, (1, 0, 0, 0, 1, share * image.size[1]), mode
    ),
}


def pillow_autoaugment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply the operations of `autoaugment.autoaugment` with Pillow, frame by frame."""
    sub_policy = autoaugment.AUTOAUGMENT_V0[rng.integers(len(autoaugment.AUTOAUGMENT_V0))]
    for name, probability, level in sub_policy:
        if rng.random() < probability:
            arguments = autoaugment.OPERATIONS[name][1](level, rng)
            images = (PILLOW[name](Image.fromarray(frame), *arguments) for frame in frames)
            frames = np.stack([np.asarray(image) for image in images])
    return frames


# ------------------------------------------------------------------ measurements


def cpu_seconds(call: Callable) -> float:
    """Return the CPU time of a call in seconds, summed over all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(title: str, sides: dict[str, Callable], rounds: list) -> None:
    """Run all sides in turn on each item of `rounds`; print rates and paired ratios."""
    for side in sides.values():  # warm-up
        side(rounds[0])
    times = np.array(
        [[cpu_seconds(functools.partial(s, item)) for s in sides.values()] for item in rounds]
    )  # (rounds sides)
    print(f"\n{title}: {len(rounds)} rounds")
    for side, column in zip(sides, times.T, strict=True):
        ratios = column / times[:, 0]
        line = f"{side:32} {1 / np.median(column):7.1f} clips/s {np.median(column) * 1e3:7.1f} ms"
        if side != next(iter(sides)):
            line += f"   first side is {np.median(ratios):.2f} × as fast"
            line += f" ({ratios.min():.2f} to {ratios.max():.2f})"
            line += f", {column.sum() / times[:, 0].sum():.2f} × in total"
        print(line)


class TimedVideo(VideoFile):
    """A video file that measures the CPU time of the conversion to RGB."""

    rgb_seconds = 0.0

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        start = time.process_time()
        image = super()._to_rgb(frame)
        self.rgb_seconds += time.process_time() - start
        return image


def print_stages(paths: list[Path], rounds: int) -> None:
    """Print the CPU time of each stage of a training clip."""
    rows = []
    batch = np.empty((8, NUM_FRAMES, CROP, CROP, 3), np.uint8)
    for i in range(rounds + 1):
        rng = np.random.default_rng(i)
        marks = [time.process_time()]
        with TimedVideo(paths[i % len(paths)]) as video:
            marks.append(time.process_time())
            frames = video.get_frames(np.array(clip_indices(video.num_frames)))
        marks.append(time.process_time())
        augmented = autoaugment.autoaugment(frames, rng)
        marks.append(time.process_time())
        resized = transforms.resize_short_side(augmented, SHORT_SIDE + 32)
        marks.append(time.process_time())
        clip = resized[:, *transforms.draw_random_crop(*resized.shape[1:3], CROP, rng)]
        marks.append(time.process_time())
        batch[i % 8] = clip
        marks.append(time.process_time())
        scan, decode, *rest = np.diff(marks)
        rows.append([scan, decode - video.rgb_seconds, video.rgb_seconds, *rest])
    names = (
        "open and scan", "seek and decode", "to RGB", "AutoAugment", f"resize to {SHORT_SIDE + 32}",
        "crop", "copy into the batch",
    )  # fmt: skip
    print("\nstages of a training clip, ms (median and mean)")
    for name, column in zip(names, np.array(rows[1:]).T, strict=True):  # the first row is a warm-up
        print(f"{name:24} {np.median(column) * 1e3:7.2f} {column.mean() * 1e3:7.2f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", default="340x256", help="size of the videos in pixels")
    parser.add_argument("--videos", type=int, default=6, help="number of videos")
    parser.add_argument("--rounds", type=int, default=24,
                        help="rounds per comparison; training clips: 3 times as many")  # fmt: skip
    parser.add_argument("--frames_per_record", type=int, default=Settings.frames_per_record,
                        help="frames per record of the pack")  # fmt: skip
    args = parser.parse_args()
    width, height = (int(n) for n in args.size.split("x"))
    cv2.setNumThreads(1)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = [folder / f"{i}.mp4" for i in range(args.videos)]
        for i, path in enumerate(paths):
            write_video(path, width, height, seed=i)
        rate = np.mean([path.stat().st_size for path in paths]) * 8e-6 / SECONDS
        print(f"{len(paths)} videos, H.264 {args.size}, {SECONDS} s, {rate:.2f} Mbit/s")
        rounds = [paths[i % len(paths)] for i in range(args.rounds)]

        sides = {"jaxvid": with_jaxvid, "PyAV, sequential": with_pyav, "OpenCV": with_opencv}
        try:
            sides["torch DataLoader, PyAV"] = make_with_torch(paths)
        except ImportError:
            print("torch is not installed; its DataLoader is not measured")
        expected = with_pyav(paths[0])
        for name, side in sides.items():
            difference = np.abs(side(paths[0]).astype(int) - expected).max()
            print(f"{name}: differs from sequential PyAV by at most {difference} grey levels")
        compare("mp4", sides, rounds)

        (folder / "labels.txt").write_text("only\n")
        (folder / "train.csv").write_text("".join(f"{path.name} 0\n" for path in paths))
        with contextlib.redirect_stderr(io.StringIO()):
            settings = Settings(frames_per_record=args.frames_per_record)
            prepare([folder / "train.csv"], folder / "pack", settings, workers=1)
        pack = PackRecords(str(folder / "pack"), "train")
        records = {path: pack[i] for i, path in enumerate(paths)}
        jpegs = {path: jpegs_of(record) for path, record in records.items()}
        sides = {
            "jaxvid, pack of JPEG frames": lambda path: with_jaxvid(records[path]),
            "JPEG decoding alone": lambda path: [simplejpeg.decode_jpeg(j) for j in jpegs[path]],
            **sides,
        }
        compare("pack", sides, rounds)

        sides = {
            f"jaxvid, {name}": functools.partial(train_clip, records, paths, spec)
            for name, spec in TRAIN_SPECS.items()
        }
        compare("training clips from a pack", sides, list(range(3 * args.rounds)))

        sides = {
            f"XViT's test crops, {name}": functools.partial(
                lambda exact, path: xvit_views(records[path], exact=exact), exact
            )
            for name, exact in (("unrounded", True), ("rounded", False))
        }
        compare("evaluation views from a pack", sides, rounds)
        for name, side in sides.items():
            print(f"{name}: {side(rounds[0]).nbytes / 1e6:.1f} MB per video")

        with VideoFile(paths[0]) as video:
            frames = video.get_frames(np.array(clip_indices(video.num_frames)))
        make_rng = np.random.default_rng
        sides = {
            "jaxvid AutoAugment": lambda i: autoaugment.autoaugment(frames, make_rng(i)),
            "Pillow, frame by frame": lambda i: pillow_autoaugment(frames, make_rng(i)),
        }
        compare("AutoAugment of 16 frames", sides, list(range(3 * args.rounds)))
        print_stages(paths, args.rounds)


if __name__ == "__main__":
    main()
