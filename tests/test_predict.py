"""Videos to labels: the command, the class behind it, and the windows of a long video."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from PIL import Image

import jaxvid
from configs import motion as motion_config
from jaxvid import classifier as classifier_module
from jaxvid import evaluate, model_folder, steps
from jaxvid.class_timeline import ClassTimeline
from jaxvid.data.decode import DecodeError, Video
from jaxvid.data.motion import LABELS, render_scene
from jaxvid.data.pipeline import ClipSpec, load_eval_views
from jaxvid.data.sampling import make_indices
from jaxvid.errors import InputError
from jaxvid.predict import expand, main
from jaxvid.windows import plan_windows, prefetch

HOW = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
SIZES = {"width": 16, "depth": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders of tiny networks, with what training writes into them."""
    folder = tmp_path_factory.mktemp("models")
    how = evaluate.preprocessing(motion_config.get_config())
    assert how.items() >= HOW.items()
    for name, sampling in (("xvit", "segments"), ("stam", "rate")):
        model = jaxvid.create_model(f"{name}_tiny", **SIZES)
        how["sampling"] = sampling
        jaxvid.save_model(model, folder / name, preprocessing=how, labels=list(LABELS))
    return folder


@pytest.fixture
def damaged(models, tmp_path):
    """A copy of a model folder, to be spoiled."""
    return shutil.copytree(models / "xvit", tmp_path / "damaged")


@pytest.fixture(scope="module")
def clips(motion_folder):
    return sorted(map(str, (motion_folder / "val").glob("*.mp4")))


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory):
    """30 s of changing scenes, at rates that a clip's rate divides or not."""
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


def logits_of(folder: Path, clip: str, **views) -> np.ndarray:
    """The model's own answer, computed the plain way: `(v, num_classes)`."""
    how = model_folder.load_card(folder)["preprocessing"]
    spec = ClipSpec(**{k: how[k] for k in how if k not in ("mean", "std")}, **views)
    video = load_eval_views(clip, spec)["video"]
    return np.asarray(jaxvid.load_model(folder)(steps.normalize(video, how["mean"], how["std"])))


def softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits))


# ------------------------------------------------------------------ whole videos


def test_three_lines_of_python(models, clips):
    classifier = jaxvid.Classifier(models / "xvit")
    found = classifier.predict(clips[3], top_k=3)
    expected = softmax(logits_of(models / "xvit", clips[3])[0])
    order = np.argsort(-expected)
    assert found.labels == tuple(LABELS[i] for i in order[:3])
    np.testing.assert_allclose(found.probabilities, expected[order[:3]], rtol=1e-4)
    assert found.seconds > 0
    assert not found.padded
    assert len(classifier.predict(clips[3], top_k=100).labels) == 8


@pytest.mark.parametrize(("batch_size", "count"), [(1, 3), (4, 6), (4, 4)])
def test_batches_change_nothing_and_one_program_is_compiled(models, clips, batch_size, count):
    classifier = jaxvid.Classifier(models / "xvit", batch_size=batch_size)
    found = classifier.predict(clips[:count])
    assert [prediction.video for prediction in found] == clips[:count]
    for clip, prediction in zip(clips, found, strict=False):
        expected = softmax(logits_of(models / "xvit", clip)[0])
        assert prediction.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    assert len({prediction.probabilities for prediction in found}) == count
    assert len(classifier._programs) == 1


def test_broken_files_keep_their_place(models, clips, tmp_path):
    (tmp_path / "broken.mp4").write_text("hello")
    videos = [tmp_path / "broken.mp4", clips[0], tmp_path / "none.mp4", clips[1], clips[2]]
    classifier = jaxvid.Classifier(models / "xvit", batch_size=2)
    found = classifier.predict(videos)
    assert [bool(prediction.error) for prediction in found] == [True, False, True, False, False]
    assert "broken.mp4: cannot be decoded" in found[0].error
    assert found[2].to_json() == {"video": str(videos[2]), "error": found[2].error}
    with pytest.raises(DecodeError, match=r"none.mp4 does not exist"):
        classifier.predict(tmp_path / "none.mp4")


def test_frames_are_sampled_as_the_model_folder_says(models, clips):
    found = jaxvid.Classifier(models / "stam").predict(clips[3])
    assert found.padded  # 17 frames are no 10 s
    expected = softmax(logits_of(models / "stam", clips[3])[0])
    assert found.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)


def test_views_are_summed_and_the_folders_protocol_is_the_default(models, clips, tmp_path):
    expected = softmax(logits_of(models / "xvit", clips[3], num_clips=2, num_crops=3).mean(axis=0))
    given = jaxvid.Classifier(models / "xvit", num_clips=2, num_crops=3).predict(clips[3])
    assert given.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    assert given.labels[0] == LABELS[expected.argmax()]
    model = jaxvid.load_model(models / "xvit")
    how = {**HOW, "sampling": "segments", "num_clips": 2, "num_crops": 3}
    jaxvid.save_model(model, tmp_path / "m", preprocessing=how, labels=list(LABELS))
    known = jaxvid.Classifier(tmp_path / "m").predict(clips[3])
    assert known.probabilities == given.probabilities
    plain = jaxvid.Classifier(models / "xvit").predict(clips[3])
    assert plain.probabilities != given.probabilities


def test_impossible_numbers_are_refused(models, clips):
    for options, message in (
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"num_crops": 2}, "num_crops=2: there are 1, 3"),
        ({"num_clips": 4}, "num_clips=4: sampling='segments' gives 1 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            jaxvid.Classifier(models / "xvit", **options)
    with pytest.raises(InputError, match="top_k=0"):
        jaxvid.Classifier(models / "xvit").predict(clips[0], top_k=0)


# ------------------------------------------------------------------ the command


def test_inputs_are_files_folders_and_patterns(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "notes.txt", ".hidden.mp4", "d[1].mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    def names(*inputs):
        found, failures = expand([str(tmp_path / name) for name in inputs])
        videos = [str(Path(path).relative_to(tmp_path)) for path in found]
        return videos, [failure["error"].removeprefix(f"{tmp_path}/") for failure in failures]

    below = ["a.MKV", "b.mp4", "d[1].mp4", "sub/c.webm"]
    assert names(".") == (below, [])
    assert names("*.mp4") == (["b.mp4", "d[1].mp4"], [])
    assert names("**/*.webm", "notes.txt") == (["sub/c.webm", "notes.txt"], [])
    assert names("d[1].mp4", "b.mp4", ".") == (["d[1].mp4", "b.mp4", "a.MKV", "sub/c.webm"], [])
    assert names("s*") == (["sub/c.webm"], [])
    videos, failures = names("none.mp4", "empty", "*.avi")
    assert videos == ["none.mp4"]  # said by whoever opens it
    assert failures[0].startswith("empty: no video in it (.mp4, ")
    assert failures[1] == "*.avi: nothing matches this pattern"


def test_the_command_prints_and_counts_what_failed(models, clips, tmp_path, capsys):
    model = str(models / "xvit")
    assert main([clips[3], "--model", model, "--top_k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{clips[3]}  (0.")
    assert lines[0].endswith(" s)")
    assert len(lines) == 3
    bad = [str(tmp_path / name) for name in ("no.mp4", "empty", "x*.mp4")]
    (tmp_path / "empty").mkdir()
    assert main([*bad, *clips[:2], "--model", model]) == 3
    out, err = capsys.readouterr()
    assert sum(line.startswith(str(Path(clips[0]).parent)) for line in out.splitlines()) == 2
    *failed, last = err.splitlines()
    assert [line.startswith("failed: ") for line in failed] == [True] * 3
    assert last == "3 of 5 failed"
    assert main([str(models / f"{i}.mp4") for i in range(120)] + ["--model", model]) == 99


def test_json_is_printed_or_written(models, clips, tmp_path, capsys):
    broken = str(tmp_path / "no.mp4")
    arguments = [clips[0], broken, "--model", str(models / "xvit"), "--top_k", "2", "--json"]
    assert main(arguments) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["label"] in LABELS for entry in rows[0]["top"]] == [True, True]
    assert rows[0].keys() == {"video", "top", "seconds", "padded"}
    assert "no.mp4 does not exist" in rows[1]["error"]
    assert main([*arguments, str(tmp_path / "new" / "out.json")]) == 1
    assert capsys.readouterr().out.startswith(f"{clips[0]}  (")
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [row["video"] for row in written] == [clips[0], broken]
    assert written[0]["top"] == rows[0]["top"]
    assert os.listdir(tmp_path / "new") == ["out.json"]


def test_json_never_overwrites_a_video(models, clips, tmp_path, capsys):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"precious")
    assert main([clips[0], "--model", str(models / "xvit"), "--json", str(video)]) == 2
    assert "clip.mp4: the file to write must end in .json" in capsys.readouterr().err
    assert video.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top_k", "0"), "--top_k=0: must be at least 1"),
        (("--batch_size", "0"), "batch_size=0: must be at least 1"),
        (("--stride", "1"), "--stride needs --window"),
        (("--output", "x"), "--output needs --window"),
        (("--window", "1"), "--window needs --stride"),
        (("--window", "1", "--stride", "0"), "stride=0: must be a number of seconds above 0"),
        (("--window", "nan", "--stride", "1"), "window=nan: must be"),
        (("--window", "1", "--stride", "1", "--clips", "2"), "--clips does not go with --window"),
        (("--window", "1", "--stride", "1", "--json", "x.json"), "give --output PREFIX"),
        (("--window", "1", "--stride", "1", "--output", "/dev/null/x"), "cannot be written"),
    ],
)
def test_bad_options_are_one_line_and_status_2(models, clips, capsys, arguments, message):
    assert main([clips[0], "--model", str(models / "xvit"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_several_videos_have_no_windows_and_nothing_is_nothing(models, clips, tmp_path, capsys):
    windows = ("--window", "1", "--stride", "1")
    assert main([*clips[:2], "--model", str(models / "xvit"), *windows]) == 2
    assert "--window takes one video, not 2" in capsys.readouterr().err
    assert main([str(tmp_path), "--model", str(models / "xvit")]) == 2
    assert "no video in it" in capsys.readouterr().err


def test_the_program_as_it_is_called(models, clips, tmp_path):
    command = [sys.executable, "-m", "jaxvid.predict", f"{Path(clips[0]).parent}/0000[01].mp4"]
    command += [str(tmp_path / "no.mp4"), "--model", str(models / "xvit"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr.splitlines()[-1] == "1 of 3 failed"


# ------------------------------------------------------------------ bad videos


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_empty(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize("windows", [(), ("--window", "1", "--stride", "1")])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_audio, "no video stream in it"),
        (write_empty, "cannot be decoded"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "does not exist"),
    ],
)
def test_bad_videos_are_one_line(models, tmp_path, capsys, write, message, windows):
    path = tmp_path / "bad.mp4"
    write(path)
    assert main([str(path), "--model", str(models / "xvit"), *windows]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith(f"failed: {path}")
    assert message in first
    assert last == "1 of 1 failed"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_videos_and_folders_without_permission_are_one_line(models, clips, tmp_path, capsys):
    locked = Path(shutil.copy(clips[0], tmp_path / "locked.mp4"))
    locked.chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    assert main([str(tmp_path), clips[0], "--model", str(models / "xvit")]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(clips[0])
    assert "locked.mp4: cannot be decoded (Permission denied)" in err
    assert "closed: cannot be read (Permission denied)" in err


def test_what_cannot_be_listed_is_told(tmp_path, monkeypatch):
    """As without permission, for those whom the system lets read everything."""
    (tmp_path / "a.mp4").touch()

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/closed"))
        yield top, [], ["a.mp4"]

    monkeypatch.setattr(os, "walk", walk)
    videos, [failure] = expand([str(tmp_path)])
    assert videos == [str(tmp_path / "a.mp4")]
    assert failure["error"] == f"{tmp_path}/closed: cannot be read (Permission denied)"


# ------------------------------------------------------------------ bad model folders


def edit(folder: Path, **changes) -> None:
    card = json.loads((folder / "model.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            card[key].update(value)
        else:
            card[key] = value
    (folder / "model.json").write_text(json.dumps(card))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "is no model folder: .*model.json does not exist"),
        (lambda f: cut(f / "model.json"), "model.json cannot be read"),
        (lambda f: shutil.rmtree(f / "params"), "params is damaged: .* files are missing"),
        (lambda f: cut(largest(f / "params")), "params is damaged: 1 of "),
        (lambda f: largest(f / "params").unlink(), "params is damaged: 1 of "),
        (lambda f: edit(f, format_version=9), "has format version 9; this jaxvid reads 1: update"),
        (lambda f: edit(f, config={"width": 32}), "params does not fit the model: .*width|kernel"),
        (lambda f: edit(f, config={"num_classes": 9}, labels=None), r"\(16, 8\) in the folder"),
        (lambda f: edit(f, config={"gears": 5}), "model.json: .* has no option 'gears'"),
        (lambda f: edit(f, config={"heads": 3}), "model.json: .*width=16 does not divide"),
        (lambda f: edit(f, config=None), "model.json: .*export the model again"),
        (lambda f: edit(f, labels=["one"]), "labels has 1 entries for num_classes=8"),
        (lambda f: edit(f, labels="one"), "labels has 'one' entries for num_classes=8"),
        (lambda f: edit(f, preprocessing=None), "says nothing of preprocessing"),
        (lambda f: edit(f, preprocessing={"gears": 5}), "model.json: .*'gears'"),
        (lambda f: edit(f, preprocessing={"crop": 65}), "short_side=72|does not fit the network"),
        (lambda f: edit(f, preprocessing={"num_frames": 9}), "9 frames do not divide"),
        (lambda f: edit(f, preprocessing={"sampling": "x"}), "sampling='x': there are"),
    ],
)
def test_bad_model_folders_are_one_line(damaged, clips, capsys, spoil, message):
    spoil(damaged)
    assert main([clips[0], "--model", str(damaged)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert str(damaged) in err
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


def test_a_folder_without_mean_is_refused(damaged):
    card = json.loads((damaged / "model.json").read_text())
    del card["preprocessing"]["mean"]
    (damaged / "model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="preprocessing has no mean"):
        jaxvid.Classifier(damaged)


def test_weights_that_are_not_finite_are_no_prediction(clips, tmp_path, capsys):
    model = jaxvid.create_model("xvit_tiny", **SIZES)
    model.consensus.cls_token[...] = np.nan
    jaxvid.save_model(model, tmp_path / "nan", preprocessing=HOW)
    assert main([clips[0], "--model", str(tmp_path / "nan")]) == 2
    assert "logits that are not finite" in capsys.readouterr().err


# ------------------------------------------------------------------ windows of a long video


def make_plan(path: Path, spec: ClipSpec, window: float, stride: float, *, align: bool):
    with Video(path) as reader:
        return plan_windows(reader, spec, window, stride, align=align, name=str(path))


@pytest.mark.parametrize("sampling", ["segments", "dense", "rate"])
def test_windows_are_sampled_as_videos_of_their_own(long_videos, sampling):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling=sampling, sampling_rate=4)
    plan = make_plan(long_videos / "25.mp4", spec, 4.0, 3.0, align=False)
    assert plan.starts.tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert plan.ends.tolist() == [4, 7, 10, 13, 16, 19, 22, 25, 28, 30]
    for start, end, row, padded in zip(*map(list, (
        plan.starts, plan.ends, plan.indices, plan.padded)), strict=True):  # fmt: skip
        length = round(25 * (end - start))
        expected = make_indices(sampling, length, 8, sampling_rate=4, fps=25)
        np.testing.assert_array_equal(row, round(25 * start) + expected)
        assert padded == (sampling == "rate")  # 4 s are no 10
    assert plan.stride == 3


@pytest.mark.parametrize(
    ("fps", "asked", "stride", "most"),
    [
        # A clip's frames are 1.25 s apart: 10 or 31.25 frames.
        (8, 2.5, 2.5, 8 + 2 * 8),
        (25, 2.5, 2.5, 8 + 2 * 8),
        (25, 2.4, 2.5, 8 + 2 * 8),
        (25, 0.3, 0.3125, 4 * (8 + 16)),
        (25, 30.0, 30.0, 8),
    ],
)
def test_aligned_windows_share_their_frames(long_videos, fps, asked, stride, most):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling="rate")
    plan = make_plan(long_videos / f"{fps}.mp4", spec, 10.0, asked, align=True)
    assert plan.stride == pytest.approx(stride)
    assert len(np.unique(plan.indices)) <= most
    first = make_indices("rate", 10 * fps, 8, sampling_rate=1, fps=fps)
    np.testing.assert_array_equal(plan.indices[0], first)
    # No frame is further than one from where a video of the window's own has it.
    own = np.round(plan.starts * fps)[:, None] + first
    whole = ~plan.padded
    assert whole.sum() >= len(whole) - 1
    assert np.abs(plan.indices - own)[whole].max() <= 1
    assert (np.diff(plan.indices, axis=0) >= 0).all()
    plan = make_plan(long_videos / "8.mp4", spec, 10.0, 2.5, align=True)
    np.testing.assert_array_equal(
        plan.indices[:9], np.round(8 * plan.starts[:9, None]) + plan.indices[0]
    )


def test_aligned_segments_share_too(long_videos):
    spec = ClipSpec(num_frames=8, crop=64, short_side=72, sampling="segments")
    plan = make_plan(long_videos / "8.mp4", spec, 65 / 8, 2.1, align=True)  # a frame every 8
    assert plan.stride == 2.0
    whole = plan.indices[~plan.padded]
    np.testing.assert_array_equal(whole[1][:6], whole[0][2:])


@pytest.mark.parametrize(
    ("name", "crops", "batch_size"), [("stam", 1, 1), ("stam", 3, 2), ("xvit", 1, 2)]
)
def test_windows_are_the_models_answers(models, long_videos, name, crops, batch_size):
    """Shared or not, each window's probabilities are those of its frames, computed alone."""
    classifier = jaxvid.Classifier(models / name, num_crops=crops, batch_size=batch_size)
    path = long_videos / "25.mp4"
    timeline = classifier.windows(path, 10.0, 2.5)
    plan = make_plan(path, classifier.spec, 10.0, 2.5, align=name == "stam")
    model = jaxvid.load_model(models / name)
    with Video(path) as reader:
        for row, found in zip(plan.indices, timeline.probabilities, strict=True):
            frames = reader.get_frames(row)
            margin = {1: (4,), 3: (0, 4, 8)}[crops]
            views = np.stack([frames[:, 4:68, left : left + 64] for left in margin])
            logits = model(steps.normalize(views, 0.5, 0.5)).mean(axis=0)
            np.testing.assert_allclose(found, softmax(logits), rtol=1e-5)
    assert np.ptp(np.log(timeline.probabilities), axis=0).max() > 1e-2  # it does change
    assert timeline.ends[-1] == 30


def test_frames_are_decoded_and_computed_once_and_let_go(models, long_videos, monkeypatch):
    decoded, computed, held = [], [], []
    original = Video.iter_frames

    def iter_frames(self, indices):
        decoded.extend(indices.tolist())
        return original(self, indices)

    monkeypatch.setattr(Video, "iter_frames", iter_frames)
    classifier = jaxvid.Classifier(models / "stam")
    features = classifier._frame_features

    def count(chunks):
        for part, values in features(chunks):
            computed.extend(part.tolist())
            yield part, values

    monkeypatch.setattr(classifier, "_frame_features", count)
    gather = classifier_module.gather_clips

    def watch(indices, items):
        generator = gather(indices, items)
        for clip in generator:
            held.append(len(generator.gi_frame.f_locals["held"]))
            yield clip

    monkeypatch.setattr(classifier_module, "gather_clips", watch)
    timeline = classifier.windows(long_videos / "25.mp4", 10.0, 1.25)
    assert len(decoded) == len(set(decoded)) == len(computed) == len(set(computed)) == 24
    assert len(timeline.starts) * 8 > 4 * len(decoded)
    assert max(held) <= 2 * 8


def test_a_short_video_is_one_window(models, clips):
    timeline = jaxvid.Classifier(models / "stam").windows(clips[3], 10.0, 2.5)
    assert timeline.padded.tolist() == [True]
    whole = softmax(logits_of(models / "stam", clips[3])[0])
    np.testing.assert_allclose(timeline.probabilities[0], whole, atol=1e-5)


class NoClock:
    """A video whose file tells neither a rate nor timestamps, or an uneven pace."""

    def __init__(self, num_frames=40, fps=None, times=None):
        self.num_frames, self.fps, self.times = num_frames, fps, times


def test_time_is_that_of_the_timestamps():
    spec = ClipSpec(num_frames=4, crop=64, short_side=72)
    with pytest.raises(DecodeError, match="x.mp4: neither its frame rate nor timestamps are known"):
        plan_windows(NoClock(), spec, 1.0, 1.0, align=False, name="x.mp4")
    # 20 frames in 10 s, then 20 frames in 1 s.
    times = np.concatenate([np.arange(20) / 2, 10 + np.arange(20) / 20])
    for fps in (None, 39 / times[-1]):
        reader = NoClock(fps=fps, times=times)
        plan = plan_windows(reader, spec, 2.0, 2.0, align=False, name="x.mp4")
        for start, end, row in zip(plan.starts, plan.ends, plan.indices, strict=True):
            assert start - 0.6 <= times[row[0]]
            assert times[row[-1]] <= end
        assert plan.indices[0].max() < 5
        assert plan.indices[-1].min() >= 19
    known = plan_windows(NoClock(fps=10.0), spec, 1.0, 1.0, align=False, name="x.mp4")
    assert known.ends.tolist() == [1, 2, 3, 4]


def test_the_timeline_is_written_and_drawn(models, long_videos, tmp_path, capsys):
    video = str(long_videos / "25.mp4")
    arguments = [video, "--model", str(models / "stam"), "--window", "10", "--stride", "2.4"]
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
        assert row["label_1"] == window["top"][0]["label"]
        assert float(row["probability_3"]) == pytest.approx(
            window["top"][2]["probability"], abs=1e-6
        )
    assert [window["start"] for window in document["windows"]] == [2.5 * i for i in range(9)]
    with Image.open(f"{prefix}.png") as picture:
        assert picture.size > (1000, 400)
    assert len(os.listdir(prefix.parent)) == 3
    assert main([*arguments, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == {"video": video, **jaxvid.Classifier(models / "stam").windows(
        video, 10, 2.5).rows(5)[0]}  # fmt: skip
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_the_picture_has_the_classes_that_lead(tmp_path):
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
    found = [patch.get_facecolor() for patch in strip.patches]
    assert len(set(found[:4])) == 1
    assert len(set(found)) == 2
    assert len(set(colours)) == 6
    assert strip.get_xlim() == (0, 22.5)


def test_prefetching_stops_where_its_reader_does():
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
