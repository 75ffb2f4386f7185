"""Frames by index are the frames that decoding everything gives, bit by bit."""

import av
import numpy as np
import pytest

from jaxvid.data.decode import DecodeError, Video


def write_video(path, codec="libx264", frames=40, size=(48, 64), options=None, **settings):
    """A video of moving noise with B-frames and several key frames."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (size[0] * 2, size[1] * 2, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = options or {}
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for t in range(frames):
            image = np.ascontiguousarray(noise[t : t + size[0], t : t + size[1]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_everything(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def decode_all_of(path) -> np.ndarray:
    with Video(path) as video:
        return video.get_frames(np.arange(video.num_frames))


def cut_without_decoding(source, path, start: int):
    """Copies a video's packets from the `start`-th on: it begins between key frames."""
    with av.open(str(source)) as video, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(video.streams.video[0])
        for packet in [p for p in video.demux(video=0) if p.size][start:]:
            packet.stream = stream
            copy.mux(packet)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    closed, open_gops = {"bf": "3", "g": "12"}, {"bf": "3", "g": "12", "x264-params": "open-gop=1"}
    whole = write_video(folder / "whole.mkv", options=closed)
    return {
        "cut": cut_without_decoding(whole, folder / "cut.mkv", 5),
        "h264": write_video(folder / "h264.mp4", options=closed),
        "open_gops": write_video(folder / "open.mp4", options=open_gops),
        "one_gop": write_video(folder / "one.mp4", options={"bf": "3", "g": "250"}),
        "matroska": write_video(folder / "h264.mkv", options=closed),
        "mpeg4_avi": write_video(folder / "mpeg4.avi", codec="mpeg4", gop_size=10),
        "mpeg4_b_avi": write_video(folder / "b.avi", codec="mpeg4", gop_size=10, max_b_frames=2),
        "one_frame": write_video(folder / "frame.mp4", frames=1),
    }


@pytest.mark.parametrize(
    "name",
    ["h264", "cut", "open_gops", "one_gop", "matroska", "mpeg4_avi", "mpeg4_b_avi", "one_frame"],
)
def test_frames_by_index_are_exact(videos, name):
    expected = decode_everything(videos[name])
    rng = np.random.default_rng(0)
    with Video(videos[name]) as video:
        assert video.num_frames == len(expected)
        choices = [rng.integers(0, len(expected), 5) for _ in range(12)]  # repeats, any order
        choices += [np.arange(len(expected)), np.array([len(expected) - 1]), np.array([0, 0])]
        for indices in choices:
            np.testing.assert_array_equal(video.get_frames(indices), expected[indices])


def test_indices_outside_the_video_are_a_programming_error(videos):
    with Video(videos["h264"]) as video, pytest.raises(IndexError, match="outside 0..39"):
        video.get_frames(np.array([40]))


def test_bad_files_are_named_with_a_reason(videos, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = videos["matroska"].read_bytes()
    (tmp_path / "header.mkv").write_bytes(whole[:600])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reasons = {
        "missing.mp4": "does not exist",
        "text.mp4": "Invalid data",
        "empty.mp4": "Invalid data",
        "header.mkv": "",
        "sound.mp4": "no video stream",
    }
    for name, reason in reasons.items():
        with pytest.raises(DecodeError, match=f"{name}.*{reason}") as error:
            decode_all_of(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_truncated_video_gives_what_it_holds_or_an_error(videos, tmp_path):
    """Cut at every tenth: the frames that come are right, and no cut goes unnoticed."""
    whole, expected = videos["matroska"].read_bytes(), decode_everything(videos["matroska"])
    for tenth in range(1, 10):
        path = tmp_path / f"{tenth}.mkv"
        path.write_bytes(whole[: len(whole) * tenth // 10])
        try:
            with Video(path) as video:
                assert video.num_frames < len(expected)
                first = video.get_frames(np.array([0]))
        except DecodeError:
            continue
        np.testing.assert_array_equal(first[0], expected[0])
