"""Damaged video files yield frames or a `DecodeError`, in bounded time, without crashes."""

import collections
import concurrent.futures
import multiprocessing
import time
from pathlib import Path

import av
import numpy as np
import pytest

from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from tests.data.test_video_reader import SUFFIX_OPTIONS, decode_with_pyav, write_video

NUM_CASES = 10_000
MAX_SECONDS = 5.0  # per file; intact clips decode in milliseconds
CLIPS = {  # file name → arguments of `write_video`
    "h264.mp4": {"options": {"bf": "3", "g": "12"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264.mkv": {"options": {"bf": "3", "g": "12", "x264-params": "open-gop=1"}},
    "mpeg4.avi": {"codec": "mpeg4", "gop_size": 10, "max_b_frames": 2},
    "h264.mov": {"options": {"bf": "3", "g": "12"}, "turn": (90,)},
    "mpeg2.ts": {"codec": "mpeg2video", "gop_size": 10},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}, "frames": 15},
    # Containers and codecs that the files above do not cover.
    **{
        f"kind{suffix}": SUFFIX_OPTIONS[suffix]
        for suffix in (
            *(".gif", ".mpg", ".m2v", ".vob", ".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".mxf"),
            *(".rm", ".rmvb", ".nut", ".y4m"),
        )
    },
    "kind.dv": {**SUFFIX_OPTIONS[".dv"], "frames": 2},
}


@pytest.fixture(scope="module")
def h264(tmp_path_factory):
    """An intact video of 40 frames with key frames at 0, 12, 24 and 36."""
    return write_video(tmp_path_factory.mktemp("video") / "h264.mp4", **CLIPS["h264.mp4"])


def damage(source, path, position: int, kind: str):
    """Copy a video and damage one of its packets.

    Args:
        source: The intact MP4 file.
        path: The copy.
        position: Index of the packet.
        kind: `data` to overwrite half of the packet, starting at a third of its size; `length` to
            overwrite its first four bytes, which are the length of the encoded picture.

    Returns:
        `path`.
    """
    with av.open(str(source)) as video:
        packet = [p for p in video.demux(video=0) if p.size][position]
    data = bytearray(source.read_bytes())
    if kind == "data":
        start, size = packet.pos + packet.size // 3, packet.size // 2
    else:
        start, size = packet.pos, 4
    data[start : start + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)
    return path


# Packets 0 and 24 are key frames. In other packets only the length is damaged, because a decoder
# may accept any data as the picture of a frame that is not a key frame.
@pytest.mark.parametrize(
    ("position", "kind"), [(0, "data"), (5, "length"), (13, "length"), (24, "data"), (30, "length")]
)
def test_damage_affects_frames_up_to_the_next_key_frame(h264, tmp_path, position, kind):
    """Every frame is either bit-identical to the intact one or raises a DecodeError."""
    path = damage(h264, tmp_path / "bad.mp4", position, kind)
    expected, key_frame = decode_with_pyav(h264), position // 12 * 12
    errors = {}
    with VideoFile(path) as video:
        readable = video.count_readable()
        assert 28 <= readable < 40
        assert f"{40 - readable} of 40 frames are damaged" in video.oddities
        for i in range(40):
            try:
                np.testing.assert_array_equal(video.get_frames(np.array([i]))[0], expected[i])
            except DecodeError as error:
                errors[i] = str(error)
    assert key_frame <= min(errors) <= max(errors) < key_frame + 12
    for i, error in errors.items():
        assert f"frame {i} is damaged; {readable} of 40 can be read" in error


def test_truncated_videos_yield_their_frames_or_an_error(tmp_path):
    """Truncated videos have fewer frames, of which the first is intact, or raise a DecodeError."""
    source = write_video(tmp_path / "intact.mkv", options={"bf": "3", "g": "12"})
    data, expected = source.read_bytes(), decode_with_pyav(source)
    for tenth in range(1, 10):
        path = tmp_path / f"{tenth}.mkv"
        path.write_bytes(data[: len(data) * tenth // 10])
        try:
            with VideoFile(path) as video:
                assert video.num_frames < len(expected)
                first = video.get_frames(np.array([0]))
        except DecodeError:
            continue
        np.testing.assert_array_equal(first[0], expected[0])


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncate data, or damage them in one to four places.

    On average, at least half of the places are in the first 1000 bytes, which contain headers.
    """
    changed = np.frombuffer(data, np.uint8).copy()
    kind = rng.choice(["flip", "zero", "noise", "splice", "truncate", "delete"])
    for _ in range(rng.integers(1, 5)):
        if not len(changed):
            break
        limit = len(changed) if rng.random() < 0.5 else min(len(changed), 1000)
        start = int(rng.integers(limit))
        size = int(rng.choice([1, 4, 16, 256]))
        part = changed[start : start + size]
        if kind == "flip":
            part ^= (1 << rng.integers(0, 8, len(part))).astype(np.uint8)
        elif kind == "zero":
            part[:] = 0
        elif kind == "noise":
            part[:] = rng.integers(0, 256, len(part))
        elif kind == "splice":
            source = int(rng.integers(len(changed) - len(part) + 1))
            part[:] = changed[source : source + len(part)].copy()
        elif kind == "truncate":
            return changed[: rng.integers(len(changed))].tobytes()
        else:
            changed = np.delete(changed, slice(start, start + size))
    return changed.tobytes()


def run_case(folder: Path, case: int) -> tuple[str, float]:
    """Read a mutated file in a worker process; return its decode error or "", and the seconds."""
    rng = np.random.default_rng([3, case])
    source = folder / list(CLIPS)[case % len(CLIPS)]
    path = folder / f"{case}{source.suffix}"
    path.write_bytes(mutate(source.read_bytes(), rng))
    start = time.monotonic()
    try:
        with VideoFile(path, max_seconds=MAX_SECONDS) as video:
            indices = rng.integers(0, video.num_frames, 4)
            frames = video.get_frames(indices)
            assert frames.shape[0] == 4
            assert frames.dtype == np.uint8
            assert 0 < video.count_readable() <= video.num_frames
            assert video.times is None or (np.diff(video.times) >= 0).all()
        outcome = ""
    except DecodeError as error:
        outcome = str(error)
    seconds = time.monotonic() - start
    path.unlink()
    assert not outcome or outcome.startswith(str(path))
    assert "\n" not in outcome
    return outcome, seconds


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_mutated_files_yield_frames_or_a_decode_error(tmp_path):
    for name, settings in CLIPS.items():
        write_video(tmp_path / name, **settings)
    # If a worker process crashes, all cases that have not finished fail. The first of them is the
    # case that crashed, or is close to it.
    outcomes, failures, slowest = collections.Counter(), [], 0.0
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        jobs = {case: pool.submit(run_case, tmp_path, case) for case in range(NUM_CASES)}
        for case, job in jobs.items():
            try:
                outcome, seconds = job.result(timeout=60)
            except Exception as error:
                failures.append(f"case {case}: {error!r}")
                continue
            outcomes["DecodeError" if outcome else "frames"] += 1
            slowest = max(slowest, seconds)
    print(dict(outcomes), f"slowest {slowest:.1f} s")
    assert not failures, "\n".join(failures[:20])
    assert slowest < MAX_SECONDS + 5
    assert outcomes["frames"] > NUM_CASES / 10
    assert outcomes["DecodeError"] > NUM_CASES / 10
