"""Bodies of hostile requests: files that are not videos, and videos that exhaust a decoder."""

import gzip
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data.test_video_fuzz import mutate

# Each refers to another file or server, which a decoder must not open.
PLAYLISTS = {
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile 'file:///etc/passwd'\n",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


def make_files(clip: bytes, folder: Path) -> dict[str, bytes]:
    """Return the name and the contents of files that are larger, longer or other than they seem.

    Args:
        clip: A valid video.
        folder: Folder for temporary files.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("video.mp4", bytes(10**7))
    return {
        **PLAYLISTS,
        "gzip": gzip.compress(clip),
        "zip": archive.getvalue(),
        "text": b"not a video\n" * 100,
        "zeros": bytes(10**5),
        "noise": np.random.default_rng(0).bytes(10**5),
        "y4m header": b"YUV4MPEG2 W100000 H100000 F25:1 C420jpeg\nFRAME\n",
        "long": write_sparse_video(folder / "long.mkv"),
        "many frames": make_gif(1, 20_000),
        "large frames": make_gif(5900, 2),
        "too large frames": make_gif(6100, 1),
    }


def write_sparse_video(path: Path) -> bytes:
    """Return a video of two frames that are 100 days apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        packets = [*stream.encode(frame), *stream.encode(frame), *stream.encode()]
        for i, packet in enumerate(packets):
            packet.pts = packet.dts = i * round(100 * 86_400 / packet.time_base)
            container.mux(packet)
    return path.read_bytes()


def make_gif(size: int, num_frames: int) -> bytes:
    """Return an animation of square black frames, which takes about a byte per 1000 pixels."""
    file = io.BytesIO()
    Image.new("P", (size, size)).save(file, "GIF", duration=10)
    data = file.getvalue()
    start = 13 + (3 << (data[10] & 7) + 1)  # end of the header and of the global palette
    return data[:start] + data[start:-1] * num_frames + data[-1:]


def make_jpeg(size: int, declared: int) -> bytes:
    """Return a square black picture whose header declares another size."""
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "JPEG")
    frame_header = b"\xff\xc0\x00\x11\x08"  # followed by the height and the width
    sizes = size.to_bytes(2) * 2, declared.to_bytes(2) * 2
    return file.getvalue().replace(*(frame_header + pair for pair in sizes))


def make_mutant(clips: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Return a damaged copy of a video."""
    return mutate(clips[rng.integers(len(clips))], rng) or b"\0"


def make_form(fields: Mapping[str, bytes], *, end: bytes = b"--XX--\r\n", extra: str = "") -> bytes:
    """Return the body of a form with the boundary XX.

    Args:
        fields: Name and value of each field.
        end: The closing boundary.
        extra: Header lines of each part, each of which ends with a line break.
    """
    parts = [
        f'--XX\r\nContent-Disposition: form-data; name="{name}"\r\n{extra}\r\n'.encode()
        + value
        + b"\r\n"
        for name, value in fields.items()
    ]
    return b"".join(parts) + end
