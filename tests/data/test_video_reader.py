"""Frames read by index are bit-identical to those of decoding the whole file."""

import functools
import os
from fractions import Fraction

import av
import numpy as np
import pytest

from jaxvid.data import check
from jaxvid.data.folder_scan import VIDEO_SUFFIXES
from jaxvid.data.formats import video_reader
from jaxvid.data.formats.video_reader import DecodeError, VideoFile

VARIABLE_TIMES = np.arange(40) + np.arange(40) ** 2 // 20  # frame times, in 1/25 s


def write_video(
    path,
    codec="libx264",
    frames=40,
    size=(48, 64),
    options=None,
    times=None,
    turn=None,
    container_options=None,
    container=None,
    pix_fmt="yuv420p",
    **settings,
):
    """Write a video of moving noise at 25 frames/s.

    Args:
        path: The file.
        codec: FFmpeg's name of the encoder.
        frames: Number of frames.
        size: Height and width in pixels.
        options: Options of the encoder.
        times: Timestamp of each frame in 1/25 s.
        turn: Arguments of PyAV's `set_display_rotation`.
        container_options: Options of the container format.
        container: Container format; by default, that of the suffix of `path`.
        pix_fmt: Pixel format.
        **settings: Attributes of the codec context.

    Returns:
        `path`.
    """
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (size[0] * 2, size[1] * 2, 3), np.uint8)
    with av.open(str(path), "w", container, options=container_options) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.options = options or {}
        stream.codec_context.thread_count = 1  # libvpx may deadlock with several threads
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if turn:
            stream.set_display_rotation(*turn)
        for t in range(frames):
            image = np.ascontiguousarray(noise[t : t + size[0], t : t + size[1]])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[t]), Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


# Suffix of videos that a folder scan finds → arguments of `write_video` for such a file.
SUFFIX_OPTIONS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".m2ts", ".mts", ".f4v"), {}),
    ".qt": {"container": "mov"},
    ".webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    ".avi": {"codec": "mpeg4", "gop_size": 5},
    ".divx": {"codec": "mpeg4", "container": "avi"},
    ".gif": {"codec": "gif", "pix_fmt": "rgb8"},
    ".mpg": {"codec": "mpeg1video", "gop_size": 5},
    ".mpeg": {"codec": "mpeg2video", "gop_size": 5},
    ".m2v": {"codec": "mpeg2video", "gop_size": 5},
    ".vob": {"codec": "mpeg2video", "gop_size": 5},
    ".ts": {"codec": "mpeg2video", "gop_size": 5},
    ".wmv": {"codec": "wmv2", "gop_size": 5},
    ".asf": {"codec": "msmpeg4"},
    ".flv": {"codec": "flv", "gop_size": 5},
    ".ogv": {"codec": "libvpx"},
    ".mxf": {"codec": "mpeg2video", "gop_size": 5},
    ".rm": {"codec": "rv10"},
    ".rmvb": {"codec": "rv20", "container": "rm"},
    ".dv": {"codec": "dvvideo", "size": (576, 720)},
    ".nut": {"codec": "mpeg4"},
    ".y4m": {"codec": "wrapped_avframe"},
}


def decode_with_pyav(path) -> np.ndarray:
    """Return all frames that FFmpeg decodes, as the reference for `VideoFile`."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def read_all_frames(path) -> np.ndarray:
    """Return all frames of a `VideoFile`."""
    with VideoFile(path) as video:
        return video.get_frames(np.arange(video.num_frames))


def drop_first_packets(source, path, count: int):
    """Copy a video without its first `count` packets, so that it does not start at a key frame."""
    with av.open(str(source)) as video, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(video.streams.video[0])
        for packet in [p for p in video.demux(video=0) if p.size][count:]:
            packet.stream = stream
            copy.mux(packet)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Name → video file."""
    folder = tmp_path_factory.mktemp("videos")
    closed, open_gops = {"bf": "3", "g": "12"}, {"bf": "3", "g": "12", "x264-params": "open-gop=1"}
    uncut = write_video(folder / "uncut.mkv", options=closed)
    open_mkv = write_video(folder / "open.mkv", options=open_gops)
    return {
        "av1": write_video(folder / "av1.mkv", "libsvtav1", frames=20, options={"preset": "12"}),
        "cut": drop_first_packets(uncut, folder / "cut.mkv", 5),
        "h264": write_video(folder / "h264.mp4", options=closed),
        "hevc": write_video(
            folder / "hevc.mp4", "libx265", options={"x265-params": "log-level=0:keyint=12"}
        ),
        "mpeg2": write_video(folder / "mpeg2.ts", "mpeg2video", gop_size=12, max_b_frames=2),
        "interlaced": write_video(
            folder / "interlaced.mp4", options={**closed, "x264-params": "tff=1"}
        ),
        "open_cut": drop_first_packets(open_mkv, folder / "open_cut.mkv", 5),
        "open_mkv": open_mkv,
        "open_gops": write_video(folder / "open.mp4", options=open_gops),
        "one_gop": write_video(folder / "one.mp4", options={"bf": "3", "g": "250"}),
        "matroska": write_video(folder / "h264.mkv", options=closed),
        "mpeg4_avi": write_video(folder / "mpeg4.avi", codec="mpeg4", gop_size=10),
        "mpeg4_b_avi": write_video(folder / "b.avi", codec="mpeg4", gop_size=10, max_b_frames=2),
        "one_frame": write_video(folder / "frame.mp4", frames=1),
        "vfr": write_video(folder / "vfr.mp4", options=closed, times=VARIABLE_TIMES),
        "vp8": write_video(
            folder / "vp8.webm", "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"}
        ),
        "vp9": write_video(folder / "vp9.webm", "libvpx-vp9", frames=20, options={"cpu-used": "8"}),
    }


# Names of `videos` of which all frames can be decoded.
EXACT = (
    "h264 cut open_gops one_gop matroska mpeg4_avi mpeg4_b_avi one_frame vfr av1 hevc mpeg2 vp8 "
    "vp9 interlaced"
)


@pytest.mark.parametrize("max_bytes", [video_reader.MAX_PACKET_BYTES, 0])
@pytest.mark.parametrize("name", EXACT.split())
def test_frames_by_index_are_exact(videos, name, max_bytes, monkeypatch):
    monkeypatch.setattr(video_reader, "MAX_PACKET_BYTES", max_bytes)  # 0: no packet cache
    expected = decode_with_pyav(videos[name])
    rng = np.random.default_rng(0)
    with VideoFile(videos[name]) as video:
        assert video.num_frames == len(expected) == video.count_readable()
        choices = [rng.integers(0, len(expected), 5) for _ in range(12)]  # unsorted, repeated
        choices += [np.arange(len(expected)), np.array([len(expected) - 1]), np.array([0, 0])]
        for indices in choices:
            np.testing.assert_array_equal(video.get_frames(indices), expected[indices])


def outcome(frames) -> np.ndarray | str:
    """Return the frames that a function yields, or its decode error."""
    try:
        return np.stack(list(frames()))
    except DecodeError as error:
        return str(error)


@pytest.mark.parametrize("max_bytes", [video_reader.MAX_PACKET_BYTES, 0])
@pytest.mark.parametrize("name", [*EXACT.split(), "open_cut"])
def test_sequential_frames_equal_frames_by_index(videos, name, max_bytes, monkeypatch):
    monkeypatch.setattr(video_reader, "MAX_PACKET_BYTES", max_bytes)
    with VideoFile(videos[name]) as video:
        for first, step in ((0, 1), (video.num_frames // 3, 4)):
            indices = np.arange(first, video.num_frames, step)
            frames, expected = (
                outcome(functools.partial(read, indices))
                for read in (video.iter_frames, video.get_frames)
            )
            np.testing.assert_array_equal(frames, expected)


@pytest.mark.parametrize("name", ["h264", "one_gop", "open_mkv", "mpeg4_avi", "mpeg4_b_avi"])
def test_damage_is_detected_sequentially_and_by_index(videos, name, tmp_path):
    intact, rng, num_broken = videos[name].read_bytes(), np.random.default_rng(0), 0
    path = tmp_path / videos[name].name
    for _ in range(20):
        data = bytearray(intact)
        start = int(rng.integers(len(data) // 8, len(data) * 3 // 4))
        data[start : start + 200] = rng.bytes(200)
        path.write_bytes(data)
        try:
            with VideoFile(path) as video, VideoFile(path) as other:
                indices = np.arange(video.num_frames)
                frames = outcome(functools.partial(video.iter_frames, indices))
                expected = outcome(functools.partial(other.get_frames, indices))
                assert video.count_readable() == other.count_readable()
                assert video.oddities == other.oddities
        except DecodeError:  # the file cannot be opened
            continue
        num_broken += isinstance(frames, str)
        np.testing.assert_array_equal(frames, expected)
    assert num_broken > 0  # 5 to 19 of 20; encoders differ between machines


def test_sequential_decoding_is_single_pass_and_bounded_in_time(videos, monkeypatch):
    with VideoFile(videos["mpeg4_b_avi"]) as video:
        assert video.times is None
        starts, packets_from = [], video._packets_from

        def log_and_start(*args):
            starts.append(args)
            return packets_from(*args)

        monkeypatch.setattr(video, "_packets_from", log_and_start)
        monkeypatch.setattr(check, "CHUNK_BYTES", 5 * 48 * 64 * 3)  # five frames
        lengths = [len(chunk) for chunk in check.iter_frames(video, np.arange(40))]
        assert lengths == [5] * 8
        assert len(starts) == 1
        frames = video.iter_frames(np.arange(40))
        next(frames)
        video._seconds_left = 0
        with pytest.raises(DecodeError, match="longer than 60 s"):
            list(frames)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_all_listed_suffixes_are_decoded_exactly(suffix, tmp_path, monkeypatch):
    path = write_video(tmp_path / f"video{suffix}", frames=12, **SUFFIX_OPTIONS[suffix])
    expected = decode_with_pyav(path)
    assert len(expected) == 12
    for max_bytes in (video_reader.MAX_PACKET_BYTES, 0):
        monkeypatch.setattr(video_reader, "MAX_PACKET_BYTES", max_bytes)
        with VideoFile(path) as video:
            assert video.num_frames == 12 == video.count_readable()
            for indices in (np.arange(12), np.array([11, 3, 3, 0])):
                np.testing.assert_array_equal(video.get_frames(indices), expected[indices])


def test_indices_outside_of_the_video_raise_an_index_error(videos):
    with VideoFile(videos["h264"]) as video, pytest.raises(IndexError, match="outside 0..39"):
        video.get_frames(np.array([40]))


def test_decode_errors_name_the_file_and_the_reason(videos, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "header.mkv").write_bytes(videos["matroska"].read_bytes()[:600])
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
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
        "audio.mp4": "no video stream",
    }
    for name, reason in reasons.items():
        with pytest.raises(DecodeError, match=f"{name}.*{reason}") as error:
            read_all_frames(tmp_path / name)
        assert "\n" not in str(error.value)


def test_frames_by_index_are_read_without_decoding_the_whole_file(videos, monkeypatch):
    """Without this test, tests of random access might compare sequential decoding with itself."""
    monkeypatch.setattr(VideoFile, "_decode_all", None)
    for name in ("h264", "one_gop", "matroska", "vfr", "hevc", "av1"):
        with VideoFile(videos[name]) as video:
            assert len(video.get_frames(np.array([3, 9, 19]))) == 3


def test_frames_whose_reference_frames_were_cut_off_are_damaged(videos):
    """Only frames that are shown before the first key frame are damaged."""
    with VideoFile(videos["open_cut"]) as video:
        damaged = video.num_frames - video.count_readable()
        assert 0 < damaged <= 3
        with pytest.raises(DecodeError, match="frame 0 is damaged; "):
            video.get_frames(np.array([0]))
        rest = video.get_frames(np.arange(damaged, video.num_frames))
    expected = decode_with_pyav(videos["open_mkv"])
    np.testing.assert_array_equal(rest, expected[-len(rest) :])


def test_frame_times_and_frame_rate(videos, tmp_path):
    with VideoFile(videos["h264"]) as video:
        np.testing.assert_allclose(video.times, np.arange(40) / 25)
        assert (video.fps, video.oddities) == (25, [])
    with VideoFile(videos["vfr"]) as video:
        np.testing.assert_allclose(video.times, VARIABLE_TIMES / 25)
        assert "variable frame rate" in video.oddities
    with VideoFile(videos["matroska"]) as video:
        np.testing.assert_allclose(video.times, np.arange(40) / 25)
        assert video.oddities == []  # Matroska headers do not contain the number of frames
    with VideoFile(videos["mpeg4_b_avi"]) as video:
        assert (video.times is None) == ("no usable timestamps" in video.oddities)
        assert video.fps == 25
    with VideoFile(write_video(tmp_path / "slow.mp4", times=np.arange(40) * 40_000)) as video:
        assert video.fps is None


@pytest.mark.parametrize(
    ("turn", "filters", "oddity"),
    [
        ((-90,), "transpose=clock", "rotated by 90°"),
        ((90,), "transpose=cclock", "rotated by 270°"),
        ((180,), "hflip,vflip", "rotated by 180°"),
        ((0, True), "hflip", "mirrored"),
        ((0, False, True), "vflip", "mirrored"),
        ((30,), "null", None),
    ],
)
def test_the_display_matrix_is_applied(tmp_path, turn, filters, oddity):
    """The reference is the result of the filters that `ffmpeg` inserts for such a file."""
    path = write_video(tmp_path / "turned.mp4", frames=3, turn=turn)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).reformat(format="rgb24")
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=64, height=48, format="rgb24", time_base=frame.time_base),
        *(graph.add(*f.split("=")) for f in filters.split(",")),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    with VideoFile(path) as video:
        np.testing.assert_array_equal(
            video.get_frames(np.array([0]))[0], graph.pull().to_ndarray(format="rgb24")
        )
        assert video.oddities == ([oddity] if oddity else [])


def write_colour(path, yuv, pix_fmt, options, size=(48, 64), codec="libx264", full=False):
    """Write three frames of one colour; `yuv` is its 8-bit value for all pixel formats."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.color_range = 2 if full else 0  # full range or untagged
        for _ in range(3):
            frame = av.VideoFrame(size[1], size[0], pix_fmt)
            for plane, value in zip(frame.planes, yuv, strict=True):
                if "10" in pix_fmt:  # 10 bits in two bytes
                    samples = np.full(plane.buffer_size // 2, 4 * value, "<u2")
                else:
                    samples = np.full(plane.buffer_size, value, np.uint8)
                plane.update(samples.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def yuv_to_rgb(yuv, matrix, full):
    """Convert an 8-bit colour to RGB by the definitions of ITU-R BT.601 or BT.709."""
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[matrix]
    y, cb, cr = yuv[0], yuv[1] - 128, yuv[2] - 128
    if not full:
        y, cb, cr = (y - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
    r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    return np.clip([r, (y - kr * r - kb * b) / (1 - kr - kb), b], 0, 255)


@pytest.mark.parametrize("yuv", [(81, 90, 200), (145, 54, 80), (120, 200, 110), (235, 128, 128)])
@pytest.mark.parametrize(
    ("tags", "matrix", "full", "pix_fmt"),
    [
        ("", "bt601", False, "yuv420p"),
        ("colormatrix=bt709", "bt709", False, "yuv420p"),
        ("colormatrix=smpte170m", "bt601", False, "yuv420p"),
        ("colormatrix=bt470bg", "bt601", False, "yuv420p"),
        ("colormatrix=bt709", "bt709", True, "yuv420p"),
        ("", "bt601", True, "yuv420p"),
        ("", "bt601", True, "yuvj420p"),
        ("colormatrix=bt709", "bt709", False, "yuv420p10le"),
        ("colormatrix=bt709", "bt709", True, "yuv420p10le"),
        ("colormatrix=YCgCo", "bt601", False, "yuv420p"),  # swscale has no such matrix
    ],
)
def test_colors_are_converted_as_tagged(tmp_path, yuv, tags, matrix, full, pix_fmt):
    options = {"qp": "1", "x264-params": tags}
    path = write_colour(tmp_path / "colour.mp4", yuv, pix_fmt, options, full=full)
    frames = read_all_frames(path)
    expected = np.broadcast_to(yuv_to_rgb(yuv, matrix, full), frames.shape)
    np.testing.assert_allclose(frames, expected, atol=3)


@pytest.mark.parametrize("full", [False, True])
def test_bt601_ignores_the_matrix_of_the_file(tmp_path, full):
    yuv, options = (81, 90, 200), {"qp": "1", "x264-params": "colormatrix=bt709"}
    path = write_colour(tmp_path / "colour.mp4", yuv, "yuv420p", options, full=full)
    with VideoFile(path) as video:
        video.color_matrix = "bt601"
        frames = video.get_frames(np.arange(video.num_frames))
        in_order = np.stack(list(video.iter_frames(np.arange(video.num_frames))))
    np.testing.assert_array_equal(frames, in_order)
    expected = np.broadcast_to(yuv_to_rgb(yuv, "bt601", full), frames.shape)
    np.testing.assert_allclose(frames, expected, atol=3)
    assert abs(frames - yuv_to_rgb(yuv, "bt709", full)).max() > 10


def test_frames_with_odd_height_and_width(tmp_path):
    yuv = (120, 200, 110)
    frames = read_all_frames(
        write_colour(tmp_path / "odd.avi", yuv, "yuv420p", {"qscale": "1"}, (49, 65), "mpeg4")
    )
    assert frames.shape == (3, 49, 65, 3)
    expected = np.broadcast_to(yuv_to_rgb(yuv, "bt601", False), frames.shape)
    np.testing.assert_allclose(frames, expected, atol=3)


def test_sizes_lengths_and_time_are_bounded(videos, tmp_path, monkeypatch):
    (tmp_path / "huge.mp4").write_bytes(b"YUV4MPEG2 W100000 H100000 F25:1\nFRAME\n" + bytes(99))
    with pytest.raises(DecodeError, match=r"huge.mp4"):
        VideoFile(tmp_path / "huge.mp4")
    with pytest.raises(DecodeError, match="longer than 0 s"):
        VideoFile(videos["h264"], max_seconds=0)
    with VideoFile(videos["h264"]) as video:
        video._seconds_left = 0
        with pytest.raises(DecodeError, match="longer than 60 s"):
            video.count_readable()
    monkeypatch.setattr(video_reader, "MAX_FRAMES", 39)
    with pytest.raises(DecodeError, match="more than 39 frames"):
        VideoFile(videos["h264"])
    with pytest.raises(DecodeError, match="64×48 is too large"):
        VideoFile(videos["h264"], max_pixels=48 * 64 - 1)


def test_files_that_are_not_regular_are_refused(videos, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "locked.mp4").write_bytes(videos["h264"].read_bytes())
    (tmp_path / "locked.mp4").chmod(0)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{videos['h264']}'\n")
    reasons = {
        "pipe.mp4": "not a regular file",
        "folder.mp4": "not a regular file",
        "loop.mp4": "symbolic links",
        "null\0.mp4": "null",
        "list.mp4": "Invalid",
    }
    if os.geteuid():  # root may read every file
        reasons["locked.mp4"] = "denied"
    for name, reason in reasons.items():
        with pytest.raises(DecodeError, match=reason):
            VideoFile(tmp_path / name)
    with pytest.raises(DecodeError, match="not a regular file"):
        VideoFile("/dev/zero")


def test_file_names_are_not_parsed_as_urls(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "a|b %03d.mp4", "-"):
        (tmp_path / name).write_bytes(videos["h264"].read_bytes())
        assert len(read_all_frames(name)) == 40
