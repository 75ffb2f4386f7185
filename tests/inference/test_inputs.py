"""Kinds of videos that a classifier accepts, and the messages for those that it refuses."""

import io
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxvid
from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.errors import InputError
from jaxvid.inference import download, inputs
from jaxvid.inference.inputs import VideoInput, make_input, make_inputs
from tests.video_server import serve


@pytest.fixture(scope="module")
def content(clips):
    """Return the bytes of a clip."""
    return Path(clips[3]).read_bytes()


@pytest.fixture(scope="module")
def server(content):
    with serve(content) as server:
        yield server


@pytest.fixture(scope="module")
def frames(clips):
    """Return all frames of the clip, and its frame rate."""
    with VideoFile(clips[3]) as reader:
        return reader.get_frames(range(reader.num_frames)), reader.fps


@pytest.fixture(scope="module")
def classifier(folders):
    return jaxvid.Classifier(folders / "xvit")


# ------------------------------------------------------------------ every kind of input


def test_all_kinds_of_input_give_the_same_prediction(classifier, clips, content, server, frames):
    expected = classifier.predict(clips[3])
    assert expected.video == clips[3]
    with open(clips[3], "rb") as file:
        videos = [
            (clips[3], Path(clips[3])),
            (f"{server.url}/clip.mp4", f"{server.url}/clip.mp4"),
            ("<bytes 2>", content),
            ("<bytes 3>", memoryview(content)),
            ("<file object 4>", io.BytesIO(content)),
            (clips[3], file),
            ("<array 6>", frames[0]),
        ]
        predictions = classifier([video for _, video in videos])
    assert {prediction.probabilities for prediction in predictions} == {expected.probabilities}
    assert [prediction.video for prediction in predictions] == [name for name, _ in videos]
    assert classifier(content).probabilities == expected.probabilities
    assert classifier(frames[0], top_k=2).labels == expected.labels[:2]


@pytest.mark.parametrize(
    ("options", "needs_fps"),
    [
        ({"sampling": "segments", "num_clips": 3, "num_crops": 3}, False),
        ({"sampling": "uniform_10s", "num_clips": 2}, True),
        ({"sampling": "dense_stride", "sampling_rate": 2, "resize": "torch_bilinear"}, True),
    ],
)
def test_clips_of_an_array_are_bit_identical_to_those_of_the_file(
    clips, frames, options, needs_fps
):
    spec = ClipSpec(num_frames=16, crop=64, short_side=72, **options)
    expected = load_eval_views(clips[3], spec)
    video, fps = frames
    with make_input(video, fps if needs_fps else None) as array:
        views = load_eval_views(array, spec)
    for name, value in expected.items():
        np.testing.assert_array_equal(views[name], value, err_msg=name)
    if needs_fps:
        with make_input(video) as array:  # sampled as at 30 frames/s
            other = load_eval_views(array, spec)["indices"]
        assert (other != expected["indices"]).any()


def test_features_windows_and_attention_accept_every_kind(classifier, clips, content, frames):
    video, fps = frames
    features = classifier.features([clips[3], content, b"no video"])
    np.testing.assert_array_equal(features[0].vector, features[1].vector)
    assert (features[0].vector.shape, features[0].frames.shape) == ((16,), (8, 16))
    assert "cannot be decoded" in features[2].error
    with pytest.raises(DecodeError, match="<bytes>: cannot be decoded"):
        classifier.features(b"no video")
    timeline = classifier.windows(clips[3], 1.0, 0.5)
    others = classifier.windows([video, video], 1.0, 0.5, fps=fps)
    for other in (classifier.windows(content, 1.0, 0.5), *others):
        np.testing.assert_array_equal(other.probabilities, timeline.probabilities)
        np.testing.assert_array_equal(other.ends, timeline.ends)
    rollout, of_array = classifier.attention(clips[3]), classifier.attention(video, fps=fps)
    np.testing.assert_array_equal(of_array.patch_attention, rollout.patch_attention)
    np.testing.assert_array_equal(of_array.frames, rollout.frames)
    assert (rollout.name, of_array.name) == (Path(clips[3]).name, "<array>")
    assert classifier.attention([video])[0].times is None
    with pytest.raises(InputError, match="<array>: windows in seconds need the frame rate .* fps"):
        classifier.windows(video, 1.0, 0.5)


def test_features_equal_those_of_the_network(folders, clips):
    model = jaxvid.load_model(folders / "stam")
    views = jaxvid.make_transform(model, num_crops=3)(clips[3])
    expected = jax.jit(model.features)(views)
    features = jaxvid.Classifier(folders / "stam", num_crops=3).features(clips[3])
    np.testing.assert_allclose(features.vector, expected["video"].mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(features.frames, expected["frames"].mean(axis=0), atol=2e-5)


# ------------------------------------------------------------------ temporary copies


def test_a_url_is_downloaded_once_and_the_copy_is_deleted(server):
    url = f"{server.url}/a film, ä.mp4?key=[1]&b=c%20d"
    del server.requests[:]
    with VideoInput(url) as video:
        for _ in range(2):
            with video, video.open() as reader:
                assert reader.num_frames == 17
        copy = os.readlink(f"/proc/self/fd/{video._copy.fileno()}")
        assert not os.path.exists(copy)  # nothing is left behind if the process is killed
    assert server.requests == ["/a%20film,%20%C3%A4.mp4?key=[1]&b=c%20d"]
    assert video._copy is None


def test_redirects_and_unknown_sizes_are_accepted(server):
    for name in ("moved.mp4", "unknown_size.mp4"):
        with VideoInput(f"{server.url}/{name}") as video, video.open() as reader:
            assert reader.num_frames == 17


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing.mp4", r"cannot be downloaded \(HTTP 404 Not Found\); check the address"),
        ("/page", r"\(it is a web page\); use the address of the video file itself"),
        ("/cut.mp4", r"the connection was closed after \d+ of \d+ bytes\); try again"),
        ("/stalled.mp4", r"\(no data for 0.2 s\)"),
    ],
)
def test_download_errors_name_the_url(server, monkeypatch, path, message):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    with (
        VideoInput(f"{server.url}{path}") as video,
        pytest.raises(DecodeError, match=f"^{re.escape(server.url)}{path}: .*{message}"),
        video.open(),
    ):
        pass


def test_unreachable_and_invalid_addresses_are_decode_errors():
    for url, message in (
        ("http://127.0.0.1:9/a.mp4", "Connection refused"),
        ("http://[::1/a.mp4", "Invalid IPv6 URL"),
        ("http:///a.mp4", "no host given"),
    ):
        with VideoInput(url) as video, pytest.raises(DecodeError, match=message):
            video.open()


def test_sizes_are_limited(server, content, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 1000)
    sources = [f"{server.url}/clip.mp4", f"{server.url}/unknown_size.mp4", io.BytesIO(content)]
    for source in sources:
        with VideoInput(source) as video, pytest.raises(DecodeError, match="larger than|more than"):
            video.open()


FRAMES = np.zeros((2, 8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (
            FRAMES / 255,
            r"<array>: expected uint8 pixels .* float64; convert values in \[0, 1\]",
        ),
        (FRAMES.astype(int), "got int64; use frames.astype"),
        (FRAMES[0], r"got shape \(8, 9, 3\); join frames with numpy.stack"),
        (FRAMES[None], r"pass several videos as a list, e.g. list\(videos\)"),
        (FRAMES.transpose(0, 3, 1, 2), r"use frames.transpose\(0, 2, 3, 1\)"),
        (FRAMES.transpose(3, 0, 1, 2), r"use frames.transpose\(1, 2, 3, 0\)"),
        (FRAMES[..., :1], r"repeat the grey values with frames.repeat\(3, axis=-1\)"),
        (np.zeros((2, 8, 9, 4), np.uint8), r"drop the alpha channel"),
        (FRAMES[:0], "pass at least one frame"),
        ([FRAMES[0], FRAMES[1]], r"video 0 of the list: <array 0>: expected frames"),
        ([FRAMES, None], "video 1 of the list: None: expected a path, URL, bytes, .*got NoneType"),
        (5, "5: expected a path, URL, bytes, binary file object or array"),
        (b"", "<bytes>: is empty"),
        ("ftp://host/a.mp4", "expected one of gs://, s3://, .*; download it and pass the path"),
        (Path("https://host/a.mp4"), "https:/host/a.mp4: expected // after the colon; pass a URL"),
        (io.StringIO("text"), "<file object>: is opened in text mode; open it with mode 'rb'"),
    ],
)
def test_unusable_values_are_refused_with_the_fix(classifier, video, message):
    with pytest.raises(InputError, match=message):
        classifier(video)


def test_unusable_file_objects_are_decode_errors(clips, content):
    written = io.BytesIO()
    written.write(content)
    closed = io.BytesIO(content)
    closed.close()
    for source, message in ((written, r"no data .* call seek\(0\)"), (closed, "closed file")):
        with VideoInput(source) as video, pytest.raises(DecodeError, match=message):
            video.open()
    with (
        open(clips[3], encoding="utf-8") as file,
        VideoInput(file) as video,
        pytest.raises(InputError, match=f"^{clips[3]}: is opened in text mode"),
    ):
        video.open()


def test_frame_rates_are_checked(classifier, clips):
    for fps in (0, -1, 1e9, float("nan")):
        with pytest.raises(InputError, match="must be 0.01 to 1000 frames per second"):
            VideoInput(FRAMES, fps=fps)
    with pytest.raises(InputError, match="fps=25: is only for arrays of frames; omit it for"):
        make_input(clips[0], 25)
    with pytest.raises(InputError, match="fps=25: .* the list has none"):
        classifier([clips[0]], fps=25)
    assert [video.id for video in make_inputs([clips[0], FRAMES], 25)] == [clips[0], "<array 1>"]
    with pytest.raises(InputError, match="expected one video, got a list"):
        make_input([clips[0]])


def test_paths_in_arrays_and_generators_are_several_videos(classifier, clips):
    expected = classifier.predict(clips[:2])
    for videos in (np.array(clips[:2]), (clip for clip in clips[:2])):
        assert [p.probabilities for p in classifier(videos)] == [p.probabilities for p in expected]
