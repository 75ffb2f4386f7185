"""Compare formats for the frames of packs: bytes, PSNR and CPU time of random access.

python benchmarks/pack_formats.py VIDEO...     the first 300 frames of each video
python benchmarks/pack_formats.py              a generated video

Each video is decoded and scaled down to a short side of 256 px, as `prepare` does. Every format
encodes the frames with several qualities. Its bytes and the CPU time of reading are interpolated to
the PSNR (RGB, over every fourth frame) of JPEG with quality 90 and 80.

The CPU time is that of decoding 16 frames with a random start and stride to RGB, on one thread,
from bytes in memory. The position of each frame's data is known: a frame of a video with short GOPs
is decoded from the last key frame on. Runs of a format alternate with runs of JPEG with quality 90.
"""

import argparse
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SVT_LOG"] = "1"  # only errors

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from PIL import AvifImagePlugin, Image, features

from benchmarks.data import write_video
from jaxvid.data.formats.pack_writer import shrink
from jaxvid.data.formats.video_reader import VideoFile

SHORT_SIDE, NUM_FRAMES = 256, 16
JPEG_QUALITIES = (90, 80)  # the references


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Encoded frames of a video.

    Attributes:
        num_bytes: Bytes per frame.
        read: Function that decodes frames `(h, w, c)`, by ascending frame numbers.
    """

    num_bytes: float
    read: Callable[[Sequence[int]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        encode: Function of frames and a quality.
        qualities: Qualities in ascending order of the PSNR.
    """

    encode: Callable[[list[np.ndarray], int], Encoded]
    qualities: tuple[int, ...]


# ------------------------------------------------------------------ one image per frame


def encode_images(
    frames: list[np.ndarray], quality: int, *, encode: Callable, decode: Callable
) -> Encoded:
    """Encode frames independently with `encode(frame, quality)`, to be read with `decode`."""
    images = [encode(frame, quality) for frame in frames]
    size = float(np.mean([len(image) for image in images]))
    return Encoded(size, lambda numbers: [decode(images[i]) for i in numbers])


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    """Encode a frame as packs do."""
    return simplejpeg.encode_jpeg(frame, quality, "RGB", "420")


def encode_webp(frame: np.ndarray, quality: int) -> np.ndarray:
    """Encode a frame with libwebp's default effort."""
    options = [cv2.IMWRITE_WEBP_QUALITY, quality]
    return cv2.imencode(".webp", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)[1]


def decode_webp(image: np.ndarray) -> np.ndarray:
    """Decode a frame."""
    return cv2.imdecode(image, cv2.IMREAD_COLOR_RGB)


def encode_avif(frame: np.ndarray, quality: int) -> bytes:
    """Encode a frame with 4:2:0 chroma."""
    file = io.BytesIO()
    options = {"subsampling": "4:2:0", "speed": 8, "max_threads": 1}
    Image.fromarray(frame).save(file, "AVIF", quality=quality, **options)
    return file.getvalue()


def decode_avif(image: bytes) -> np.ndarray:
    """Decode a frame."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


# ------------------------------------------------------------------ video with short GOPs


@dataclasses.dataclass(frozen=True)
class Packet:
    """A packet: its bytes, the number of its frame, and whether it is a key frame."""

    data: bytes
    frame: int
    is_key: bool


def encode_video(
    frames: list[np.ndarray],
    quality: int,
    *,
    codec: str,
    decoder: str,
    gop: int,
    options: dict[str, str],
) -> Encoded:
    """Encode frames as video with a constant rate factor.

    Args:
        frames: Frames `(h, w, c)` of even height and width.
        quality: The constant rate factor, negated.
        codec: Encoder.
        decoder: Decoder.
        gop: Frames from one key frame to the next one.
        options: Further options of the encoder.
    """
    h, w, _ = frames[0].shape
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = w, h, "yuv420p"
    encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, 30), Fraction(30), gop
    encoder.thread_count = 1
    encoder.options = {"crf": str(-quality), **options}
    encoder.flags |= av.codec.context.Flags.global_header
    packets = []
    for i, frame in enumerate([*frames, None]):
        image = None
        if frame is not None:
            image = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p")
            image.pts, image.time_base = i, encoder.time_base
        packets += [Packet(bytes(p), p.pts, p.is_keyframe) for p in encoder.encode(image)]
    if sum(packet.is_key for packet in packets) != -(-len(frames) // gop):
        raise RuntimeError(f"{codec}: does not write a key frame every {gop} frames")
    size = sum(len(packet.data) for packet in packets) / len(frames)
    return Encoded(size, VideoDecoder(packets, decoder, encoder.extradata))


class VideoDecoder:
    """Decodes frames of short GOPs.

    Args:
        packets: The packets, in decoding order. No frame depends on an earlier GOP.
        decoder: Name of the decoder.
        extradata: Header of the stream.
    """

    def __init__(self, packets: list[Packet], decoder: str, extradata: bytes | None):
        """Find the GOPs."""
        self._decoder, self._extradata = decoder, extradata
        starts = [i for i, packet in enumerate(packets) if packet.is_key]
        self._gops = [
            packets[a:b] for a, b in zip(starts, [*starts[1:], len(packets)], strict=True)
        ]
        self._gop_of = {packet.frame: g for g, gop in enumerate(self._gops) for packet in gop}

    def __call__(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """Decode frames `(h, w, c)`, by ascending frame numbers."""
        context = av.CodecContext.create(self._decoder, "r")
        context.thread_count = 1
        if self._extradata:
            context.extradata = self._extradata
        reformatter, decoded = VideoReformatter(), {}
        for g in dict.fromkeys(self._gop_of[i] for i in numbers):
            missing = {i for i in numbers if self._gop_of[i] == g}
            requested = frozenset(missing)
            for packet in self._gops[g]:
                context.skip_frame = "DEFAULT" if packet.frame in requested else "NONREF"
                missing.discard(packet.frame)
                self._decode(context, packet, reformatter, decoded)
                if not missing:
                    break
            self._decode(context, None, reformatter, decoded)
            context.flush_buffers()
        return [decoded[i] for i in numbers]

    def _decode(
        self,
        context: av.CodecContext,
        packet: Packet | None,
        reformatter: VideoReformatter,
        decoded: dict[int, np.ndarray],
    ) -> None:
        """Decode a packet, or drain the decoder; add the frames to `decoded`."""
        if packet is not None:
            data = av.Packet(packet.data)
            data.pts = packet.frame
        for frame in context.decode(None if packet is None else data):
            image = reformatter.reformat(frame, format="rgb24", threads=1)
            decoded[frame.pts] = image.to_ndarray()


# ------------------------------------------------------------------ comparison


def list_formats() -> dict[str, Format]:
    """Return the formats that the installed packages support."""

    def images(encode: Callable, decode: Callable, *qualities: int) -> Format:
        return Format(
            lambda frames, q: encode_images(frames, q, encode=encode, decode=decode), qualities
        )

    def video(codec: str, decoder: str, gop: int, *qualities: int, **options: str) -> Format:
        settings = {"codec": codec, "decoder": decoder, "gop": gop, "options": options}
        return Format(lambda frames, q: encode_video(frames, q, **settings), qualities)

    jpeg = images(encode_jpeg, simplejpeg.decode_jpeg, *sorted(JPEG_QUALITIES))
    formats = {"JPEG": jpeg, "WebP": images(encode_webp, decode_webp, 72, 86, 95)}
    if features.check("avif"):
        formats["AVIF"] = images(encode_avif, decode_avif, 55, 72, 90)
    if "libx264" in av.codecs_available:
        fixed = {"x264-params": "open-gop=0:scenecut=0"}
        for gop, tune in ((1, ""), (1, "fastdecode"), (8, ""), (12, ""), (15, "")):
            name = "H.264, all-intra" if gop == 1 else f"H.264, GOP {gop}"
            options = {**fixed, "tune": tune} if tune else fixed
            formats[f"{name}, {tune}".rstrip(", ")] = video(
                "libx264", "h264", gop, -22, -15, -7, **options
            )
    for codec, name in (("libsvtav1", "SVT-AV1"), ("libaom-av1", "libaom")):
        if {codec, "libdav1d"} <= av.codecs_available:
            speed = {"preset": "8"} if codec == "libsvtav1" else {"cpu-used": "6", "b": "0"}
            formats[f"AV1, all-intra ({name})"] = video(codec, "libdav1d", 1, -30, -18, -6, **speed)
    return formats


def load_frames(path: Path, count: int) -> list[np.ndarray]:
    """Return the first `count` frames of a video, as `prepare` scales them.

    Height and width are made even.
    """
    with VideoFile(path) as video:
        frames = video.iter_frames(np.arange(min(video.num_frames, count)))
        frames = [shrink(frame, SHORT_SIDE) for frame in frames]
    h, w, _ = frames[0].shape
    return [np.ascontiguousarray(frame[: h // 2 * 2, : w // 2 * 2]) for frame in frames]


def psnr(encoded: Encoded, frames: list[np.ndarray]) -> float:
    """Return the PSNR of every fourth frame in dB."""
    numbers = range(0, len(frames), 4)
    pairs = zip(encoded.read(numbers), (frames[i] for i in numbers), strict=True)
    error = np.mean([np.mean((a.astype(np.float32) - b) ** 2) for a, b in pairs])
    return float(10 * np.log10(255**2 / error))


def draw_numbers(rng: np.random.Generator, length: int) -> list[int]:
    """Draw the numbers of 16 frames: a random start and a random stride."""
    stride = int(rng.integers(1, (length - 1) // (NUM_FRAMES - 1), endpoint=True))
    start = int(rng.integers(0, length - (NUM_FRAMES - 1) * stride))
    return list(range(start, start + NUM_FRAMES * stride, stride))


def time_ratio(encoded: Encoded, reference: Encoded, length: int, rounds: int) -> float:
    """Return the speed of random access relative to `reference`, the median of paired runs."""
    ratios = []
    for seed in range(rounds):
        seconds = []
        for side in (encoded, reference):
            start = time.process_time()
            side.read(draw_numbers(np.random.default_rng(seed), length))
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios))


def compare(frames: list[np.ndarray], rounds: int) -> dict[tuple[str, int], tuple[float, float]]:
    """Compare all formats on a video.

    Returns:
        (format, JPEG quality) → at the PSNR of JPEG with this quality: bytes relative to this JPEG,
        and speed relative to JPEG with quality 90. NaN if the format does not reach this PSNR.
    """
    formats = list_formats()
    references = {q: formats["JPEG"].encode(frames, q) for q in JPEG_QUALITIES}
    targets = {q: psnr(encoded, frames) for q, encoded in references.items()}
    for q, encoded in references.items():
        print(f"  JPEG q{q}: {encoded.num_bytes / 1e3:.1f} kB/frame, {targets[q]:.2f} dB")
    results = {}
    for name, form in formats.items():
        rows = []
        for quality in form.qualities:
            encoded = form.encode(frames, quality)
            speed = time_ratio(encoded, references[90], len(frames), rounds)
            rows.append((psnr(encoded, frames), np.log(encoded.num_bytes), np.log(speed)))
        decibels, log_bytes, log_speeds = np.array(rows).T
        texts = [
            f"{d:.1f} dB {np.exp(b) / 1e3:.1f} kB {np.exp(s):.2f} ×"
            for d, b, s in zip(decibels, log_bytes, log_speeds, strict=True)
        ]
        print(f"  {name:26} {', '.join(texts)}", flush=True)
        outside = {"left": np.nan, "right": np.nan}
        for q, target in targets.items():
            size = np.exp(np.interp(target, decibels, log_bytes, **outside))
            speed = np.exp(np.interp(target, decibels, log_speeds, **outside))
            results[name, q] = size / references[q].num_bytes, speed
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("videos", nargs="*", type=Path, help="video files")
    parser.add_argument("--frames", type=int, default=300, help="frames per video")
    parser.add_argument("--rounds", type=int, default=7, help="runs per quality of a format")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with tempfile.TemporaryDirectory() as folder:
        if not args.videos:
            args.videos = [Path(folder) / "generated.mp4"]
            write_video(args.videos[0], 340, 256, seed=0)
        results = []
        for path in args.videos:
            frames = load_frames(path, args.frames)
            h, w, _ = frames[0].shape
            print(f"{path.name}: {len(frames)} frames of {w}×{h} px")
            if len(frames) < 2 * NUM_FRAMES:
                parser.error(f"{path}: has fewer than {2 * NUM_FRAMES} frames")
            results.append(compare(frames, args.rounds))
    print("\nat the PSNR of JPEG: bytes / bytes of JPEG, speed / speed of JPEG with quality 90")
    print("(medians over the videos)")
    for name, quality in results[0]:
        size, speed = np.median([result[name, quality] for result in results], axis=0)
        print(f"{name:26} JPEG q{quality}: {size:.2f} {speed:.2f}")


if __name__ == "__main__":
    main()
