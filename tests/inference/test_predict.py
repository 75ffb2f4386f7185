"""Prediction: the Classifier class and the command line."""

import csv
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import jax
import numpy as np
import pytest

import jaxvid
from configs import motion as motion_config
from jaxvid import progress
from jaxvid.data.clips.clip import ClipSpec, load_eval_views
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from jaxvid.inference.compiled_network import CompiledNetwork
from jaxvid.predict import expand, main, predict
from jaxvid.storage import model_card
from jaxvid.storage.preprocessing import normalize
from jaxvid.train import train
from tests.conftest import shrunk_config
from tests.video_server import serve

PREPROCESSING = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}


def logits_of(folder: Path, clip: str, **views) -> np.ndarray:
    """Compute the logits `(v, num_classes)` of a clip without `Classifier`."""
    fields = dict(model_card.load_card(folder)["preprocessing"])
    mean, std = fields.pop("mean"), fields.pop("std")
    video = load_eval_views(clip, ClipSpec(**fields, **views))["video"]
    return np.asarray(_jitted(folder)(normalize(video, mean, std)))


@functools.cache
def _jitted(folder: Path):
    return jax.jit(jaxvid.load_model(folder))


def softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits))


# ------------------------------------------------------------------ whole videos


def test_prediction_equals_the_model(folders, clips):
    classifier = jaxvid.Classifier(folders / "xvit")
    prediction = classifier.predict(clips[3], top_k=3)
    expected = softmax(logits_of(folders / "xvit", clips[3])[0])
    order = np.argsort(-expected)
    assert prediction.labels == tuple(LABELS[i] for i in order[:3])
    np.testing.assert_allclose(prediction.probabilities, expected[order[:3]], rtol=1e-4)
    assert prediction.seconds > 0
    assert not prediction.padded
    assert len(classifier.predict(clips[3], top_k=100).labels) == 8


@pytest.mark.parametrize(("batch_size", "count"), [(1, 3), (4, 6), (4, 4)])
def test_batch_size_does_not_change_predictions_and_one_program_is_compiled(
    folders, clips, batch_size, count
):
    classifier = jaxvid.Classifier(folders / "xvit", batch_size=batch_size)
    predictions = classifier.predict(clips[:count])
    assert [prediction.video for prediction in predictions] == clips[:count]
    for clip, prediction in zip(clips, predictions, strict=False):
        expected = softmax(logits_of(folders / "xvit", clip)[0])
        assert prediction.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    assert len({prediction.probabilities for prediction in predictions}) == count
    assert len(classifier.network._programs) == 1


def test_scores_of_a_partial_batch(folders):
    views = np.zeros((3, 1, 8, 64, 64, 3), np.uint8)
    assert jaxvid.Classifier(folders / "xvit", batch_size=2).scores(views).shape == (3, 8)


def test_errors_of_undecodable_files_are_returned_in_input_order(folders, clips, tmp_path):
    (tmp_path / "broken.mp4").write_text("hello")
    videos = [tmp_path / "broken.mp4", clips[0], tmp_path / "none.mp4", clips[1], clips[2]]
    classifier = jaxvid.Classifier(folders / "xvit", batch_size=2)
    predictions = classifier.predict(videos)
    assert [bool(prediction.error) for prediction in predictions] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert "broken.mp4: cannot be decoded" in predictions[0].error
    assert predictions[2].to_json() == {"video": str(videos[2]), "error": predictions[2].error}
    with pytest.raises(DecodeError, match=r"none.mp4 does not exist"):
        classifier.predict(tmp_path / "none.mp4")


def test_sampling_comes_from_the_model_card(folders, clips):
    prediction = jaxvid.Classifier(folders / "stam").predict(clips[3])
    assert prediction.padded  # the 17 frames last less than 10 s
    expected = softmax(logits_of(folders / "stam", clips[3])[0])
    assert prediction.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)


def test_the_normalisation_may_differ_between_channels(folders, clips, tmp_path):
    folder = shutil.copytree(folders / "xvit", tmp_path / "model")
    card = json.loads((folder / "model.json").read_text())
    card["preprocessing"] |= {"mean": [0.1, 0.3, 0.6], "std": [0.2, 0.2, 0.3]}
    (folder / "model.json").write_text(json.dumps(card))
    prediction = jaxvid.Classifier(folder).predict(clips[3])
    expected = softmax(logits_of(folder, clips[3])[0])
    assert prediction.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    other = jaxvid.Classifier(folders / "xvit").predict(clips[3])
    assert prediction.probabilities[0] != pytest.approx(other.probabilities[0], rel=1e-3)


def test_logits_of_views_are_averaged_and_views_default_to_the_model_card(folders, clips, tmp_path):
    views = {"num_clips": 2, "num_crops": 3}
    expected = softmax(logits_of(folders / "xvit", clips[3], **views).mean(axis=0))
    overridden = jaxvid.Classifier(folders / "xvit", **views).predict(clips[3])
    assert overridden.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    assert overridden.labels[0] == LABELS[expected.argmax()]
    model = jaxvid.load_model(folders / "xvit")
    preprocessing = {**PREPROCESSING, "sampling": "segments", **views}
    jaxvid.save_model(model, tmp_path / "m", preprocessing=preprocessing, labels=list(LABELS))
    from_card = jaxvid.Classifier(tmp_path / "m").predict(clips[3])
    assert from_card.probabilities == overridden.probabilities
    one_view = jaxvid.Classifier(folders / "xvit").predict(clips[3])
    assert one_view.probabilities != overridden.probabilities


def test_preprocessing_of_a_training_config_is_read(folders, clips, tmp_path):
    preprocessing = resolve(motion_config.get_config()).preprocessing.to_json()
    assert preprocessing.items() >= PREPROCESSING.items()
    model = jaxvid.load_model(folders / "xvit")
    jaxvid.save_model(model, tmp_path / "m", preprocessing=preprocessing)
    prediction = jaxvid.Classifier(tmp_path / "m").predict(clips[3])
    expected = jaxvid.Classifier(folders / "xvit").predict(clips[3])
    assert prediction.probabilities == expected.probabilities
    assert prediction.labels == tuple(str(LABELS.index(label)) for label in expected.labels)


def test_predictions_equal_those_of_the_evaluation(motion_folder, clips, tmp_path):
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.eval.update(num_crops=3, num_clips=2, short_side=80)
    train(config.lock(), tmp_path / "run")
    with (tmp_path / "run" / "eval_videos.csv").open(newline="") as file:
        rows = {Path(row["id"]).name: row for row in csv.DictReader(file)}
    predictions = list(predict(clips, tmp_path / "run" / "model"))
    assert len(predictions) == len(rows) == 24
    for video in predictions:
        row = rows[Path(video["video"]).name]
        expected = json.loads(row["probabilities"])
        assert [entry["probability"] for entry in video["top"]] == pytest.approx(expected, abs=1e-4)
        assert video["top"][0]["label"] == row["prediction"]
    [fewer] = predict(clips[:1], tmp_path / "run" / "model", num_clips=1, num_crops=1)
    assert fewer["top"][0]["probability"] != predictions[0]["top"][0]["probability"]


@pytest.mark.parametrize(
    ("views", "count", "size"),
    [((1, 1), 12, 8), ((1, 3), 12, 2), ((3, 3), 12, 1), ((1, 1), 3, 3), ((1, 3), 1, 1)],
)
def test_default_batch_has_at_most_8_views_or_one_video(
    folders, clips, monkeypatch, views, count, size
):
    shapes = []

    def run(self, function, inputs, size):
        shapes.append((size, *inputs.shape[:2]))
        return np.zeros((len(inputs), 8))

    monkeypatch.setattr(CompiledNetwork, "run", run)
    monkeypatch.setattr(CompiledNetwork, "compile", lambda *_: None)
    options = dict(zip(("num_clips", "num_crops"), views, strict=True))
    assert len(list(predict(clips[:count], folders / "xvit", **options))) == count
    assert {(b, v) for b, _, v in shapes} == {(size, views[0] * views[1])}
    assert max(rows for _, rows, _ in shapes) == size


def test_slow_compilations_are_announced(folders, clips, monkeypatch, capsys):
    monkeypatch.setattr(progress, "COMPILE_SECONDS", 0)
    classifier = jaxvid.Classifier(folders / "xvit")
    classifier(clips[:2])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "compiling the network…"
    assert second.startswith("compiled in ")
    classifier(clips[2])  # with the same program
    assert capsys.readouterr().err == ""


def test_out_of_range_values_are_refused(folders, clips):
    for options, message in (
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"num_crops": 2}, "num_crops=2: must be one of 1, 3"),
        ({"num_clips": 4}, "num_clips=4: must be 1 to 3 with sampling='segments'"),
    ):
        with pytest.raises(InputError, match=message):
            jaxvid.Classifier(folders / "xvit", **options)
    with pytest.raises(InputError, match="top_k=0"):
        jaxvid.Classifier(folders / "xvit").predict(clips[0], top_k=0)


# ------------------------------------------------------------------ command line


def test_inputs_expand_to_video_files(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "notes.txt", ".hidden.mp4", "d[1].mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()

    def names(*inputs):
        paths, failures = expand([str(tmp_path / name) for name in inputs])
        videos = [str(Path(path).relative_to(tmp_path)) for path in paths]
        return videos, [failure["error"].removeprefix(f"{tmp_path}/") for failure in failures]

    all_videos = ["a.MKV", "b.mp4", "d[1].mp4", "sub/c.webm"]
    assert names(".") == (all_videos, [])
    assert names("*.mp4") == (["b.mp4", "d[1].mp4"], [])
    assert names("**/*.webm", "notes.txt") == (["sub/c.webm", "notes.txt"], [])
    assert names("d[1].mp4", "b.mp4", ".") == (["d[1].mp4", "b.mp4", "a.MKV", "sub/c.webm"], [])
    assert names("s*") == (["sub/c.webm"], [])
    videos, failures = names("none.mp4", "empty", "*.avi")
    assert videos == ["none.mp4"]  # opening it reports the error
    assert failures[0].startswith("empty: contains no videos (.mp4, ")
    assert failures[1] == "*.avi: no file matches this pattern"


def test_failures_are_printed_and_counted(folders, clips, tmp_path, capsys):
    model = str(folders / "xvit")
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


def test_json_is_printed_or_written_to_a_file(folders, clips, tmp_path, capsys):
    broken = str(tmp_path / "no.mp4")
    arguments = [clips[0], broken, "--model", str(folders / "xvit"), "--top_k", "2", "--json"]
    assert main(arguments) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == {"failed": 1, "total": 2}
    assert [entry["label"] in LABELS for entry in rows[0]["top"]] == [True, True]
    assert rows[0].keys() == {"video", "top", "seconds", "padded"}
    assert "no.mp4 does not exist" in rows[1]["error"]
    assert main([*arguments, str(tmp_path / "new" / "out.json")]) == 3
    assert capsys.readouterr().out.startswith(f"{clips[0]}  (")
    report = json.loads((tmp_path / "new" / "out.json").read_text())
    assert (report["failed"], report["total"]) == (1, 2)
    written = report["videos"]
    assert [row["video"] for row in written] == [clips[0], broken]
    assert written[0]["top"] == rows[0]["top"]
    assert os.listdir(tmp_path / "new") == ["out.json"]


def test_json_option_refuses_to_overwrite_a_video(folders, clips, tmp_path, capsys):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"content")
    assert main([clips[0], "--model", str(folders / "xvit"), "--json", str(video)]) == 2
    assert "clip.mp4: the output file must end in .json" in capsys.readouterr().err
    assert video.read_bytes() == b"content"


def test_file_names_with_invalid_utf8_are_preserved(folders, clips, tmp_path, capsys):
    video = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    shutil.copy(clips[0], video)
    model = ["--model", str(folders / "stam")]
    assert main([clips[1], video, *model, "--json", str(tmp_path / "out.json")]) == 0
    assert "caf\\udce9.mp4  (" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["videos"]
    assert [row["video"] for row in written] == [clips[1], video]
    assert main([video, *model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["video"] == video
    windows = ["--window", "1", "--stride", "1"]
    assert main([video, *model, *windows, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["video"] == video
    assert main([video, *model, *windows, "--output", str(tmp_path / "line")]) == 0
    assert json.loads((tmp_path / "line.json").read_text(encoding="utf-8"))["video"] == video


@pytest.mark.parametrize("output", ["file/out", "folder"])
def test_unwritable_output_is_refused_before_any_work(clips, tmp_path, capsys, monkeypatch, output):
    (tmp_path / "file").write_text("")
    for kind in ("json", "png"):
        (tmp_path / f"folder.{kind}").mkdir()
    monkeypatch.delattr("jaxvid.inference.classifier.Classifier")  # loading a model would fail
    path = tmp_path / output
    windows = ["--window", "1", "--stride", "1", "--output", str(path)]
    for options in (["--json", f"{path}.json"], windows):
        assert main([clips[0], "--model", "none", *options]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {options[-2]}: {path}.")
        assert "cannot be written (" in line
    assert not [name for name in os.listdir(tmp_path) if "probe" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "0", "--window", "1", "--stride", "1"), "batch_size=0: must be at leas"),
        (("--top_k", "0"), "--top_k=0: must be at least 1"),
        (("--batch_size", "0"), "batch_size=0: must be at least 1"),
        (("--stride", "1"), "--stride needs --window"),
        (
            ("--output", "x"),
            "--output x: needs --window SECONDS, unless the file name ends in .mp4",
        ),
        (("--window", "1"), "--window needs --stride"),
        (("--window", "1", "--stride", "0"), "stride=0: must be a number of seconds above 0"),
        (("--window", "nan", "--stride", "1"), "window=nan: must be"),
        (("--window", "1", "--stride", "1", "--clips", "2"), "--clips cannot be combined with"),
        (("--window", "1", "--stride", "1", "--json", "x.json"), "use --output PREFIX"),
        (("--window", "1", "--stride", "1", "--output", "/dev/null/x"), "cannot be written"),
    ],
)
def test_bad_options_give_one_line_error_and_exit_code_2(
    folders, clips, capsys, arguments, message
):
    assert main([clips[0], "--model", str(folders / "xvit"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_windows_need_exactly_one_video_and_prediction_at_least_one(
    folders, clips, tmp_path, capsys
):
    windows = ("--window", "1", "--stride", "1")
    assert main([*clips[:2], "--model", str(folders / "xvit"), *windows]) == 2
    assert "--window: expected one video, got 2" in capsys.readouterr().err
    assert main([str(tmp_path), "--model", str(folders / "xvit")]) == 2
    assert "contains no videos" in capsys.readouterr().err


def test_command_line_in_a_subprocess(folders, clips, tmp_path):
    command = [sys.executable, "-m", "jaxvid.predict", f"{Path(clips[0]).parent}/0000[01].mp4"]
    command += [str(tmp_path / "no.mp4"), "--model", str(folders / "xvit"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert done.stderr.splitlines()[-1] == "1 of 3 failed"


def test_urls_and_stdin_are_classified(folders, clips, capsys, monkeypatch):
    content = Path(clips[0]).read_bytes()
    model = ["--model", str(folders / "xvit"), "--json"]
    with serve(content) as server, open(clips[0], "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        urls = [f"{server.url}/a[1].mp4?x=*", f"{server.url}/missing.mp4"]
        assert main([clips[0], *urls, "-", *model]) == 3
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("video") for row in rows] == [clips[0], *urls, clips[0], None]
    assert rows[1]["top"] == rows[3]["top"] == rows[0]["top"]
    assert rows[4] == {"failed": 1, "total": 4}
    assert "missing.mp4: cannot be downloaded (HTTP 404 Not Found)" in err
    assert err.splitlines()[-1] == "1 of 4 failed"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["-", *model]) == 3
    assert "no data" in capsys.readouterr().err


def test_stdin_that_is_a_terminal_is_refused(folders, capsys, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO()))
    assert main(["-", "--model", str(folders / "xvit")]) == 2
    assert capsys.readouterr().err == (
        "error: -: the standard input is a terminal; pipe a video into this command\n"
    )


def test_csv_is_printed_or_written_to_a_file(folders, clips, tmp_path, capsys):
    broken, out = str(tmp_path / "no.mp4"), tmp_path / "new" / "out.csv"
    arguments = [clips[0], broken, "--model", str(folders / "xvit"), "--top_k", "2", "--csv"]
    assert main(arguments) == 3
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [(row["video"], row["rank"]) for row in rows] == [
        (clips[0], "1"),
        (clips[0], "2"),
        (broken, ""),
    ]
    assert rows[0]["label"] in LABELS
    assert 1 / 8 < float(rows[0]["probability"]) < 1
    assert "no.mp4 does not exist" in rows[2]["error"]
    assert main([*arguments, str(out), "--json"]) == 3
    assert out.read_text() == printed
    assert len(capsys.readouterr().out.splitlines()) == 3
    windows = ["--window", "1", "--stride", "1", "--csv"]
    assert main([clips[0], "--model", str(folders / "xvit"), *windows]) == 0
    assert capsys.readouterr().out.startswith("start,end,padded,label_1,probability_1,")


@pytest.mark.parametrize("windows", [(), ("--window", "1", "--stride", "0.5")])
def test_the_annotated_video_has_all_frames(folders, clips, tmp_path, capsys, windows):
    output, model = tmp_path / "new" / "annotated.MP4", ["--model", str(folders / "xvit")]
    assert main([clips[3], *model, "--output", str(output), *windows]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == (2 if windows else 6)
    assert err.splitlines()[-1] == f"annotated video: {output}"
    with av.open(clips[3]) as source, av.open(str(output)) as annotated:
        times = [[frame.time for frame in file.decode(video=0)] for file in (source, annotated)]
    np.testing.assert_allclose(times[1], times[0], atol=1e-3)
    assert os.listdir(output.parent) == [output.name]


def test_the_annotated_video_does_not_replace_its_source(folders, clips, tmp_path, capsys):
    clip = shutil.copy(clips[0], tmp_path / "clip.mp4")
    content = Path(clip).read_bytes()
    assert main([str(clip), "--model", str(folders / "xvit"), "--output", str(clip)]) == 2
    assert "is the video itself; choose another file" in capsys.readouterr().err
    assert Path(clip).read_bytes() == content


def test_classes_are_reported_if_a_frame_between_them_is_damaged(
    folders, clips, tmp_path, capsys, monkeypatch
):
    def iter_frames(self, indices):
        yield from self.get_frames(indices[:3])
        raise DecodeError("frame 3 is damaged")

    monkeypatch.setattr(VideoFile, "iter_frames", iter_frames)
    output = tmp_path / "out.mp4"
    arguments = [clips[0], "--model", str(folders / "xvit"), "--output", str(output)]
    assert main(arguments) == 3
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6
    assert err.splitlines() == [
        f"failed: {output}: not written, because a frame is damaged; frame 3 is damaged",
        "1 of 1 failed",
    ]
    assert os.listdir(tmp_path) == []


def test_options_that_are_given_twice_are_refused(clips, capsys):
    with pytest.raises(SystemExit) as done:
        main([clips[0], "--model", "a", "--model", "b"])
    assert done.value.code == 2
    assert "--model is given twice; give it once" in capsys.readouterr().err


def test_a_run_is_not_a_model_folder(folders, clips, tmp_path, capsys):
    shutil.copytree(folders / "xvit", tmp_path / "run" / "model")
    assert main([clips[0], "--model", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {tmp_path}/run/model?\n")


# ------------------------------------------------------------------ bad videos


def write_audio(path: Path) -> None:
    """Write a file without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_empty(path: Path) -> None:
    """Write a video without frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize("windows", [(), ("--window", "1", "--stride", "1")])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_audio, "contains no video stream"),
        (write_empty, "cannot be decoded"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "does not exist"),
    ],
)
def test_bad_videos_give_one_line_errors(folders, tmp_path, capsys, write, message, windows):
    path = tmp_path / "bad.mp4"
    write(path)
    assert main([str(path), "--model", str(folders / "xvit"), *windows]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith(f"failed: {path}")
    assert message in first
    assert last == "1 of 1 failed"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read all files")
def test_videos_and_folders_without_permission_give_one_line_errors(
    folders, clips, tmp_path, capsys
):
    locked = Path(shutil.copy(clips[0], tmp_path / "locked.mp4"))
    locked.chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    assert main([str(tmp_path), clips[0], "--model", str(folders / "xvit")]) == 3
    out, err = capsys.readouterr()
    assert out.startswith(clips[0])
    assert "locked.mp4: cannot be decoded (Permission denied)" in err
    assert "closed: cannot be read (Permission denied)" in err


def test_files_skipped_in_folders_are_counted_in_one_line(clips, folders, tmp_path, capsys):
    shutil.copy(clips[0], tmp_path / "line\nbreak.mp4")
    for name in ("a.txt", "b.txt", ".hidden.mp4", "sub/c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.gif").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    assert main([str(tmp_path), "--model", str(folders / "xvit"), "--top_k", "1"]) == 0
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("skipped")]
    assert line == (
        "skipped in folders: 3 files without a video suffix (.txt 2, .json 1), 1 broken link or "
        "not a regular file, 1 hidden, 1 link to a folder"
    )
    assert f"{tmp_path}/line\\nbreak.mp4  (" in out
    assert len(out.splitlines()) == 2


def test_unreadable_subfolders_are_reported(tmp_path, monkeypatch):
    """`os.walk` is patched, because tests that run as root can read all folders."""
    (tmp_path / "a.mp4").touch()

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/closed"))
        yield top, [], ["a.mp4"]

    monkeypatch.setattr(os, "walk", walk)
    videos, [failure] = expand([str(tmp_path)])
    assert videos == [str(tmp_path / "a.mp4")]
    assert failure["error"] == f"{tmp_path}/closed: cannot be read (Permission denied)"
