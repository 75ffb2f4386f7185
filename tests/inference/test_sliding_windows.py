"""Sliding windows of long videos: planning, probabilities and outputs."""

import csv
import json
import os
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from PIL import Image

import jaxvid
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.clips.sampling import make_indices
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.synthetic_motion import render_scene
from jaxvid.inference import window_classification
from jaxvid.inference.class_timeline import ClassTimeline
from jaxvid.inference.sliding_windows import (
    ClipGatherer,
    max_held_frames,
    plan_windows,
    prefetch,
)
from jaxvid.predict import main
from jaxvid.storage.preprocessing import normalize


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory):
    """Return a folder with two videos of 30 s with changing scenes, at 8 and 25 fps."""
    folder = tmp_path_factory.mktemp("long")
    scenes = [render_scene(np.random.default_rng(i), i % 4) for i in range(10)]
    for fps in (8, 25):
        with av.open(str(folder / f"{fps}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width, stream.pix_fmt = 72, 72, "yuv420p"
            stream.codec_context.thread_count = 1
            stream.options = {"preset": "superfast"}
            for i in range(30 * fps):
                frame = scenes[i // (3 * fps)][i % 17]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return folder


def make_plan(path: Path, spec: ClipSpec, window: float, stride: float, *, align: bool):
    with VideoFile(path) as reader:
        return plan_windows(reader, spec, window, stride, align=align, name=str(path))


@pytest.mark.parametrize("sampling", ["segments", "dense_stride", "uniform_10s"])
def test_windows_are_sampled_like_whole_videos(long_videos, sampling):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling=sampling, sampling_rate=4)
    plan = make_plan(long_videos / "25.mp4", spec, 4.0, 3.0, align=False)
    assert plan.starts.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert plan.ends.tolist() == [4, 7, 10, 13, 16, 19, 22, 25, 28, 30]
    windows = zip(plan.starts, plan.ends, plan.indices, plan.padded, strict=True)
    for start, end, row, padded in windows:
        length = round(25 * (end - start))
        expected = make_indices(sampling, length, 8, sampling_rate=4, fps=25)
        np.testing.assert_array_equal(row, round(25 * start) + expected)
        assert padded == (sampling == "uniform_10s")  # a window of 4 s is shorter than 10 s
    assert plan.stride == 3


@pytest.mark.parametrize(
    ("fps", "requested", "stride", "max_frames"),
    [
        # Consecutive frames of a clip are 1.25 s apart: 10 or 31.25 frames of the video.
        (8, 2.5, 2.5, 8 + 2 * 8),
        (25, 2.5, 2.5, 8 + 2 * 8),
        (25, 2.4, 2.5, 8 + 2 * 8),
        (25, 0.3, 0.3125, 4 * (8 + 16)),
        (25, 0.2, 1.25 / 6, 6 * (8 + 16)),
        (25, 0.16, 0.15625, 8 * (8 + 16)),  # the nearest 1.25 / n
        (25, 30.0, 30.0, 8),
    ],
)
def test_aligned_windows_share_frames(long_videos, fps, requested, stride, max_frames):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling="uniform_10s")
    plan = make_plan(long_videos / f"{fps}.mp4", spec, 10.0, requested, align=True)
    assert plan.stride == pytest.approx(stride)
    assert len(np.unique(plan.indices)) <= max_frames
    first = make_indices("uniform_10s", 10 * fps, 8, sampling_rate=1, fps=fps)
    np.testing.assert_array_equal(plan.indices[0], first)
    # A frame number differs by at most one from that of the same window as a separate video.
    separate_indices = np.round(plan.starts * fps)[:, None] + first
    unpadded = ~plan.padded
    assert unpadded.sum() >= len(unpadded) - 1
    assert np.abs(plan.indices - separate_indices)[unpadded].max() <= 1
    assert (np.diff(plan.indices, axis=0) >= 0).all()
    # At 8 frames/s, the stride is 20 frames: the frame numbers relative to the start are the same
    # in all windows.
    plan = make_plan(long_videos / "8.mp4", spec, 10.0, 2.5, align=True)
    np.testing.assert_array_equal(
        plan.indices[:9], np.round(8 * plan.starts[:9, None]) + plan.indices[0]
    )


def test_aligned_windows_share_frames_of_segments(long_videos):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling="segments")
    plan = make_plan(long_videos / "8.mp4", spec, 65 / 8, 2.1, align=True)  # every 8th frame
    assert plan.stride == 2.0
    indices = plan.indices[~plan.padded]
    np.testing.assert_array_equal(indices[1][:6], indices[0][2:])


@pytest.mark.parametrize(
    ("name", "crops", "batch_size"),
    [("stam", 1, 1), pytest.param("stam", 3, 2, marks=pytest.mark.full), ("xvit", 1, 2)],
)
def test_window_probabilities_equal_the_model(folders, long_videos, name, crops, batch_size):
    """Windows equal separately computed clips. STAM shares frame features, XViT does not."""
    classifier = jaxvid.Classifier(folders / name, num_crops=crops, batch_size=batch_size)
    path = long_videos / "25.mp4"
    timeline = classifier.windows(path, 10.0, 2.5)
    plan = make_plan(path, classifier.spec, 10.0, 2.5, align=name == "stam")
    model = jaxvid.load_model(folders / name)
    with VideoFile(path) as reader:
        for row, probabilities in zip(plan.indices, timeline.probabilities, strict=True):
            frames = reader.get_frames(row)
            offsets = {1: (4,), 3: (0, 4, 8)}[crops]
            views = np.stack([frames[:, 4:68, left : left + 64] for left in offsets])
            logits = model(normalize(views, 0.5, 0.5)).mean(axis=0)
            np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-5)
    assert np.ptp(np.log(timeline.probabilities), axis=0).max() > 1e-2  # windows differ
    assert timeline.ends[-1] == 30


@pytest.mark.parametrize("spread", [0, 3, 40])
def test_the_number_of_held_frames_is_known_in_advance(spread):
    rng = np.random.default_rng(spread)
    starts = np.sort(rng.integers(0, 200, 20))[:, None]
    indices = np.maximum.accumulate(starts + np.sort(rng.integers(0, spread + 1, (20, 4))), axis=0)
    gatherer, held = ClipGatherer(indices), []
    for number in np.unique(indices):
        clips = gatherer.add(np.array([number]), np.array([[number]]))
        held.append(len(gatherer._held) + 1)  # before the clips are made
        assert all(clip.shape == (1, 4) for clip in clips)
    assert max_held_frames(indices) == max(held)


def test_frames_are_decoded_and_encoded_once_and_their_features_are_released(
    folders, long_videos, monkeypatch
):
    decoded, computed, held = [], [], []
    original = VideoFile.iter_frames

    def iter_frames(self, indices):
        decoded.extend(indices.tolist())
        return original(self, indices)

    monkeypatch.setattr(VideoFile, "iter_frames", iter_frames)
    classifier = jaxvid.Classifier(folders / "stam")
    features = window_classification._frame_features

    def count(network, chunks):
        for part, values in features(network, chunks):
            computed.extend(part.tolist())
            yield part, values

    monkeypatch.setattr(window_classification, "_frame_features", count)
    gather = window_classification.gather_clips

    def count_held(indices, items):
        generator = gather(indices, items)
        for clip in generator:
            held.append(len(generator.gi_frame.f_locals["gatherer"]._held))
            yield clip

    monkeypatch.setattr(window_classification, "gather_clips", count_held)
    timeline = classifier.windows(long_videos / "25.mp4", 10.0, 1.25)
    assert len(decoded) == len(set(decoded)) == len(computed) == len(set(computed)) == 24
    assert len(timeline.starts) * 8 > 4 * len(decoded)
    assert max(held) <= 2 * 8


def test_video_shorter_than_a_window_has_one_window(folders, clips):
    timeline = jaxvid.Classifier(folders / "stam").windows(clips[3], 10.0, 2.5)
    assert timeline.padded.tolist() == [True]
    whole = jaxvid.Classifier(folders / "stam").predict(clips[3], top_k=8)
    probabilities = np.sort(timeline.probabilities[0])[::-1]
    np.testing.assert_allclose(probabilities, whole.probabilities, rtol=1e-5)


@pytest.mark.parametrize("name", ["stam", "xvit"])
def test_decode_error_at_the_end_leaves_no_timeline(
    folders, long_videos, tmp_path, capsys, monkeypatch, name
):
    original = VideoFile.iter_frames

    def iter_frames(self, indices):
        yield from original(self, indices)
        raise DecodeError("x.mp4: frame 3 is damaged")

    monkeypatch.setattr(VideoFile, "iter_frames", iter_frames)
    arguments = [str(long_videos / "25.mp4"), "--model", str(folders / name)]
    arguments += ["--window", "10", "--stride", "2.5", "--output", str(tmp_path / "timeline")]
    assert main(arguments) == 3
    assert "failed: x.mp4: frame 3 is damaged" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


class FakeReader:
    """A stand-in for `VideoFile`, with or without frame rate and timestamps."""

    def __init__(self, num_frames=40, fps=None, times=None):
        self.num_frames, self.fps, self.times = num_frames, fps, times


def test_windows_follow_timestamps():
    spec = ClipSpec(num_frames=4, crop=64, short_side=72)
    with pytest.raises(DecodeError, match="x.mp4: has neither a frame rate nor timestamps"):
        plan_windows(FakeReader(), spec, 1.0, 1.0, align=False, name="x.mp4")
    # 20 frames in 10 s, then 20 frames in 1 s.
    times = np.concatenate([np.arange(20) / 2, 10 + np.arange(20) / 20])
    for fps in (None, 39 / times[-1]):
        reader = FakeReader(fps=fps, times=times)
        plan = plan_windows(reader, spec, 2.0, 2.0, align=False, name="x.mp4")
        for start, end, row in zip(plan.starts, plan.ends, plan.indices, strict=True):
            assert start - 0.6 <= times[row[0]]
            assert times[row[-1]] <= end
        assert plan.indices[0].max() < 5
        assert plan.indices[-1].min() >= 19
    constant = plan_windows(FakeReader(fps=10.0), spec, 1.0, 1.0, align=False, name="x.mp4")
    assert constant.ends.tolist() == [1, 2, 3, 4]


def test_timeline_is_written_or_printed(folders, long_videos, tmp_path, capsys):
    video = str(long_videos / "25.mp4")
    arguments = [video, "--model", str(folders / "stam"), "--window", "10", "--stride", "2.4"]
    prefix = tmp_path / "new" / "timeline"
    assert main([*arguments, "--top_k", "3", "--output", str(prefix)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{prefix}.{kind}" for kind in ("csv", "json", "png")]
    assert "stride: 2.5 s instead of 2.4 s" in err
    document = json.loads(Path(f"{prefix}.json").read_text())
    rows = list(csv.DictReader(Path(f"{prefix}.csv").read_text().splitlines()))
    assert len(rows) == len(document["windows"]) == 9
    for row, window in zip(rows, document["windows"], strict=True):
        assert float(row["end"]) == window["end"]
        assert row["padded"] == str(int(window["padded"]))
        assert row["label_1"] == window["top"][0]["label"]
        assert float(row["probability_3"]) == pytest.approx(
            window["top"][2]["probability"], abs=1e-6
        )
    assert [*rows[0]][:3] == ["start", "end", "padded"]
    assert [window["start"] for window in document["windows"]] == [2.5 * i for i in range(9)]
    with Image.open(f"{prefix}.png") as picture:
        assert picture.size > (1000, 400)
    short = ClassTimeline(
        video="short.mp4",
        labels=["a", "b"],
        starts=np.zeros(1),
        ends=np.ones(1),
        padded=np.array([True]),
        stride=1.0,
        probabilities=np.full((1, 2), 0.5),
    )
    table = short.save(tmp_path / "short")[0].read_text()
    assert table.splitlines()[1] == "0.0,1.0,1,a,0.500000,b,0.500000"
    assert len(os.listdir(prefix.parent)) == 3
    assert main([*arguments, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    timeline = jaxvid.Classifier(folders / "stam").windows(video, 10, 2.5)
    assert printed[0] == {"video": video, **timeline.rows(5)[0]}
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_plot_shows_the_most_likely_classes(tmp_path):
    probabilities = np.full((6, 20), 0.01)
    probabilities[:4, 7], probabilities[4:, 3] = 0.8, 0.6
    probabilities[0, 11] = 0.15
    starts = np.arange(6) * 2.5
    timeline = ClassTimeline(
        video="v.mp4",
        labels=[f"class {i}" for i in range(20)],
        starts=starts,
        ends=starts + 10,
        padded=np.zeros(6, bool),
        stride=2.5,
        probabilities=probabilities,
    )
    axes, strip = timeline.draw().axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names[:3] == ["class 7", "class 3", "class 11"]
    assert len(names) == 6
    colours = [line.get_color() for line in axes.lines]
    strip_colours = [patch.get_facecolor() for patch in strip.patches]
    assert len(set(strip_colours[:4])) == 1
    assert len(set(strip_colours)) == 2
    assert len(set(colours)) == 6
    assert strip.get_xlim() == (0, 22.5)


def test_prefetch_stops_when_closed_and_raises_errors():
    taken = []

    def produce():
        for i in range(100):
            taken.append(i)
            yield i + 1

    ahead = prefetch(produce())
    assert [next(ahead), next(ahead)] == [1, 2]
    ahead.close()
    assert len(taken) <= 5
    assert list(prefetch(iter([1, 2, 3]))) == [1, 2, 3]

    def fail():
        yield 1
        raise DecodeError("damaged")

    with pytest.raises(DecodeError, match="damaged"):
        list(prefetch(fail()))
