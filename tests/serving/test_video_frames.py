"""Frames of a video as pictures, and clips of live pictures."""

import base64
import functools
import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.jpeg_reader import JpegFrames
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.serving import decoder_tasks, video_frames
from jaxvid.serving.decoder_tasks import UploadedVideo
from jaxvid.serving.limits import Limits


def make_spec(**changes):
    fields = {"num_frames": 4, "crop": 16, "short_side": 18, "resize": "pil_bilinear"}
    return ClipSpec(**(fields | changes))


def decode(url):
    prefix = "data:image/jpeg;base64,"
    assert url.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix)))))


def test_frames_of_a_clip_are_those_that_the_network_saw(clips):
    spec = make_spec()
    indices = load_eval_views(clips[0], spec)["indices"][0]
    with VideoFile(clips[0]) as reader:
        described = video_frames.describe_clip(reader, indices, spec)
        frames = reader.get_frames(indices)
    info = described["info"]
    assert (info["width"], info["height"], info["frames"], info["fps"]) == (72, 72, 17, 15)
    assert info["seconds"] == pytest.approx(17 / 15)
    assert [frame["index"] for frame in described["frames"]] == indices.tolist()
    assert [frame["time"] for frame in described["frames"]] == pytest.approx(indices / 15)
    for frame, described_frame in zip(frames, described["frames"], strict=True):
        difference = abs(decode(described_frame["image"]).astype(int) - frame)
        assert difference.mean() < 5  # JPEG


def test_repeated_frames_are_described_each_time(clips):
    with VideoFile(clips[0]) as reader:
        described = video_frames.describe_clip(reader, np.array([2, 2, 5, 5]), make_spec())
    assert [frame["index"] for frame in described["frames"]] == [2, 2, 5, 5]


def test_pictures_are_scaled_down_only():
    large = np.zeros((300, 1000, 3), np.uint8)
    assert decode(video_frames.to_data_url(large)).shape == (96, 320, 3)
    assert decode(video_frames.to_data_url(large[:20, :30])).shape == (20, 30, 3)


def make_jpegs(levels, size=(24, 32)):
    pictures = [np.full((*size, 3), level, np.uint8) for level in levels]
    jpegs = [simplejpeg.encode_jpeg(picture, quality=95) for picture in pictures]
    return JpegFrames("video", len(jpegs), None, functools.partial(map, jpegs.__getitem__))


@pytest.mark.parametrize(
    ("levels", "expected", "padded"),
    [
        ([10, 20, 30, 40], [10, 20, 30, 40], False),
        ([10, 20, 30, 40, 50, 60, 70], [10, 30, 50, 70], False),
        ([10, 40], [10, 10, 40, 40], True),
        ([10], [10, 10, 10, 10], True),
    ],
)
def test_live_clips_have_the_length_of_the_network(levels, expected, padded):
    clip = video_frames.make_live_clip(make_jpegs(levels), make_spec(num_clips=2, num_crops=3))
    assert clip["video"].shape == (1, 4, 16, 16, 3)
    assert clip["video"].dtype == np.uint8
    np.testing.assert_allclose(clip["video"].mean(axis=(0, 2, 3, 4)), expected, atol=1)
    assert clip["padded"] == padded


def test_live_clips_are_the_centre_crop():
    picture = np.zeros((18, 60, 3), np.uint8)
    picture[:, 22:38] = 200  # the centre
    jpeg = simplejpeg.encode_jpeg(picture, quality=95)
    reader = JpegFrames("video", 4, None, lambda numbers: [jpeg] * len(numbers))
    clip = video_frames.make_live_clip(reader, make_spec(num_crops=3))
    assert clip["video"].mean() > 190


def test_live_pictures_of_different_sizes_are_refused():
    jpegs = [
        simplejpeg.encode_jpeg(np.zeros((side, side, 3), np.uint8)) for side in (16, 24, 16, 16)
    ]
    with pytest.raises(DecodeError):
        video_frames.make_live_clip(JpegFrames("v", 4, None, lambda _: jpegs), make_spec())


def test_live_pictures_above_the_limit_are_refused(tmp_path):
    jpeg = simplejpeg.encode_jpeg(np.zeros((16, 32, 3), np.uint8))
    (tmp_path / "pictures").write_bytes(jpeg)
    video = UploadedVideo(str(tmp_path / "pictures"), Limits(pixels=16 * 32 - 1), 10.0)
    with pytest.raises(DecodeError, match="with at most 511 pixels"):
        decoder_tasks.live_clip(video, make_spec(), [(0, len(jpeg))])
