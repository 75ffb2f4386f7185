"""Packs: contents, interrupted and sharded runs, broken videos and the command line."""

import dataclasses
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from PIL import Image

from jaxvid.data import check, prepare
from jaxvid.data.clips.clip import ClipSpec, load_eval_views, load_train_clip
from jaxvid.data.formats.pack_reader import PackRecords
from jaxvid.data.formats.pack_writer import Part, Settings, plan
from jaxvid.data.formats.video_reader import DecodeError, VideoFile
from jaxvid.data.sources import DatasetConfig, Record, open_dataset
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.errors import InputError
from tests.data.test_video_reader import rgb_of, write_colour

NUM = 10
SETTINGS = {"arrayrecord": Settings(clips_per_file=3), "h5": Settings("h5", clips_per_file=3)}
REPO = Path(__file__).parents[2]


def make_clip(path: Path, seed: int, num_frames: int = 17, size: tuple = (40, 56)) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    colours = rng.uniform(40, 215, (num_frames, 1, 1, 3))
    frames = colours + 30 * np.sin(rows / 9 + columns / 7 + seed)[None, :, :, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, frames.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten clips in class folders, one in a subfolder with an odd name, and their list."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i in range(NUM):
        name = f"sub {i % 3}/影, {i}.mp4"
        make_clip(folder / name, i, num_frames=12 if i == 4 else 17)
        lines.append(f"{name} {i % 3}\n")
    (folder / "train.csv").write_text("".join(lines), encoding="utf-8")
    (folder / "val.csv").write_text(lines[2] + lines[1], encoding="utf-8")
    (folder / "labels.txt").write_text("x\ny\nz z\n")
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def pack(request, folder, tmp_path_factory):
    """The folder, packed in one go."""
    output = tmp_path_factory.mktemp("packs") / request.param
    report = prepare.prepare([folder], output, SETTINGS[request.param], workers=2)
    assert report["complete"]
    return output, request.param, report


def contents(output: Path) -> dict[str, bytes]:
    """All files that matter; the report tells the time that packing took."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and ".parts" not in path.parts and path.name != "report.json"
    }


def open_pack(output: Path, kind: str, splits=("train", "val"), num_classes=3):
    source = {"arrayrecord": "pack", "h5": "xvit_h5"}[kind]
    data = DatasetConfig(source=source, folder=str(output))
    return open_dataset(data, num_classes, splits)


def command(*args) -> list[str]:
    return [sys.executable, "-m", "jaxvid.data.prepare", *map(str, args)]


def test_packs_have_the_frames_of_the_videos(folder, pack):
    output, kind, report = pack
    data = open_pack(output, kind)
    assert data.labels == ["x", "y", "z z"]
    assert report["readable"] == report["videos"] == NUM + 2
    assert [len(data.records[split]) for split in ("train", "val")] == [NUM, 2]
    for i, record in enumerate(data.records["train"]):
        assert record.label == i % 3
        assert str(i) in record.id
        with VideoFile(folder / f"sub {i % 3}/影, {i}.mp4") as video, record.open() as reader:
            assert reader.num_frames == video.num_frames == (12 if i == 4 else 17)
            assert reader.fps == video.fps
            indices = np.array([3, 0, 11, 3])
            frames, expected = reader.get_frames(indices), video.get_frames(indices)
        assert frames.shape == expected.shape
        assert abs(frames.astype(int) - expected).mean() < 2.5
    assert data.records["val"][0].label == 2


def test_both_formats_have_the_same_frames(folder, tmp_path):
    frames = []
    for kind, settings in SETTINGS.items():
        prepare.prepare([folder / "val.csv"], tmp_path / kind, settings, workers=1)
        record = open_pack(tmp_path / kind, kind, ("val",)).records["val"][1]
        with record.open() as reader:
            frames.append(reader.get_frames(np.arange(17)))
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize("size", [1, 2, 5, 17, 1000])
def test_records_of_any_size_have_the_packed_frames(folder, pack, tmp_path, size):
    output, kind, _ = pack
    settings = Settings(frames_per_record=size)
    prepare.prepare([folder / "val.csv"], tmp_path / "pack", settings, workers=1)
    [first, second] = open_pack(tmp_path / "pack", "arrayrecord", ("val",)).records["val"]
    assert second.listed.record == -(-17 // size)
    others = open_pack(output, kind).records["val"]
    for record, expected in zip((first, second), others, strict=True):
        with record.open() as reader, expected.open() as other:
            assert reader.num_frames == 17
            frames = other.get_frames(np.arange(17))
            for i in range(17):
                np.testing.assert_array_equal(reader.get_frames([i])[0], frames[i])
            mixed = np.array([16, 0, 5, 4, 5, 16])
            np.testing.assert_array_equal(reader.get_frames(mixed), frames[mixed])


def test_only_records_with_requested_frames_are_read(folder, tmp_path, monkeypatch):
    prepare.prepare(
        [folder / "val.csv"], tmp_path / "pack", Settings(frames_per_record=4), workers=1
    )
    records = open_pack(tmp_path / "pack", "arrayrecord", ("val",)).records["val"]
    read, function = [], PackRecords.read
    monkeypatch.setattr(
        PackRecords, "read", lambda self, record: read.append(record) or function(self, record)
    )
    with records[1].open() as reader:
        assert (reader.num_frames, records[1].label) == (17, 1)
        assert read == []
        reader.get_frames([16, 3, 0, 9, 3])
    assert read == [5, 7, 9]


def write_uneven(path: Path) -> None:
    """A clip whose frames are shown at uneven times, the last ones ever more slowly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, pix_fmt="yuv420p")
        stream.width, stream.height = 32, 32
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(40):
            picture = np.full((32, 32, 3), 6 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = 33 * i + 3 * max(i - 20, 0) ** 2, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("size", [3, 100])
def test_variable_frame_rates_are_stored(folder, tmp_path, size):
    write_uneven(tmp_path / "uneven.mp4")
    make_clip(tmp_path / "even.mp4", 0, num_frames=40)
    (tmp_path / "val.csv").write_text("even.mp4 0\nuneven.mp4 0\n")
    settings = Settings(frames_per_record=size)
    prepare.prepare([tmp_path / "val.csv"], tmp_path / "pack", settings, workers=1)
    records = open_pack(tmp_path / "pack", "arrayrecord", ("val",), 1).records["val"]
    assert [record.listed.has_times for record in records] == [0, 1]
    for name, record in zip(("even", "uneven"), records, strict=True):
        video = Record(tmp_path / f"{name}.mp4", 0)
        if name == "uneven":
            with record.open() as reader, video.open() as expected:
                np.testing.assert_array_equal(reader.times, expected.times)
        for sampling in ("segments", "dense_stride", "uniform_10s"):
            options = {"num_frames": 8, "crop": 16, "short_side": 16, "sampling": sampling}
            options |= {"sampling_rate": 3, "train_short_side": (16, 16)}
            spec = ClipSpec(**options, by_time=True)
            by_time = load_eval_views(record, spec)["indices"]
            np.testing.assert_array_equal(by_time, load_eval_views(video, spec)["indices"])
            by_number = load_eval_views(record, ClipSpec(**options))["indices"]
            assert np.array_equal(by_time, by_number) == (name == "even")
            for seed in range(5):
                clips = [
                    load_train_clip(source, np.random.default_rng(seed), spec)["indices"]
                    for source in (record, video)
                ]
                np.testing.assert_array_equal(*clips)


def test_tfds_reads_packs(folder, tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare(
        [folder / "val.csv"], tmp_path / "pack", Settings(frames_per_record=4), workers=1
    )
    builder = tfds.builder_from_directory(tmp_path / "pack")
    examples = list(builder.as_data_source("val"))
    assert [(e["first"], len(e["frames"])) for e in examples] == [
        *[(0, 4), (4, 4), (8, 4), (12, 4), (16, 1)] * 2
    ]
    example = examples[4]
    assert example["id"].decode() == "sub 2/影, 2.mp4"
    assert (example["label"], example["num_frames"], example["fps"]) == (2, 17, 15)
    assert example["frames"][0].startswith(b"\xff\xd8")
    assert builder.info.features["label"].names == ["x", "y", "z z"]
    assert "tensorflow" not in sys.modules


def test_the_original_program_reads_h5_packs(folder, tmp_path):
    prepare.prepare([folder / "val.csv"], tmp_path, Settings("h5"), workers=1)
    rates = dict(
        line.split(",") for line in (tmp_path / "annotation" / "val_fps.txt").read_text().split()
    )
    for line in (tmp_path / "annotations" / "val.txt").read_text().splitlines():
        name, num_frames, _ = line.split(",")
        assert float(rates[name]) == 15
        with h5py.File(tmp_path / "seq_h5" / "val" / f"{name}.h5") as file:
            frames = file[list(file.keys())[0]]
            assert len(frames) == int(num_frames) == 17
            assert Image.open(io.BytesIO(frames[3])).convert("RGB").size == (56, 40)


def test_running_again_does_nothing(folder, pack):
    output, kind, report = pack
    before, times = contents(output), {p: p.stat().st_mtime_ns for p in output.rglob("*record-*")}
    assert prepare.prepare([folder], output, SETTINGS[kind], workers=2) == report
    assert contents(output) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_sharded_jobs_write_the_same_pack(folder, pack, tmp_path):
    output, kind, _ = pack
    for i in (1, 0):
        report = prepare.prepare(
            [folder], tmp_path / "pack", SETTINGS[kind], workers=1, shard=(i, 2)
        )
        assert report["complete"] == (i == 0)
    assert contents(tmp_path / "pack") == contents(output)


# Kills its own process at the call of a function, the n-th time.
KILLED = """
import os, signal, sys
from jaxvid.data import prepare
module, name, left = {"encode": prepare, "replace": os}[sys.argv[1]], sys.argv[1], int(sys.argv[2])
function = getattr(module, name)
def killing(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
setattr(module, name, killing)
del sys.argv[1:3]
prepare.main()
"""


@pytest.mark.parametrize("crashes", [[("encode", 2), ("encode", 6)], [("replace", 3)] * 3])
def test_a_killed_run_continues_to_an_identical_pack(folder, pack, tmp_path, crashes):
    output, kind, _ = pack
    args = ["--input", folder, "--output", tmp_path / "pack", "--format", kind, "--workers", "1"]
    for crash in crashes:
        script = [sys.executable, "-c", KILLED, *map(str, crash)]
        job = subprocess.run(
            [*script, *map(str, args), "--clips_per_file", "3"],
            cwd=REPO,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert job.returncode == -signal.SIGKILL
        assert not (tmp_path / "pack" / "report.json").exists()
    prepare.prepare([folder], tmp_path / "pack", SETTINGS[kind], workers=2)
    assert contents(tmp_path / "pack") == contents(output)
    assert not list((tmp_path / "pack").rglob("*.partial"))


def test_exceptions_leave_no_partial_files(folder, pack, tmp_path, monkeypatch):
    output, kind, _ = pack
    encode, calls = prepare.encode, []

    def fail(record, *args):
        calls.append(record)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(record, *args)

    monkeypatch.setattr(prepare, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare([folder], tmp_path / "pack", SETTINGS[kind], workers=1)
    assert not list((tmp_path / "pack").rglob("*.partial"))
    prepare.prepare([folder], tmp_path / "pack", SETTINGS[kind], workers=1)
    assert contents(tmp_path / "pack") == contents(output)
    assert len(calls) < 8 + NUM + 2  # what was complete was kept


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_full_disk_is_one_error_line_without_partial_files(folder, tmp_path, kind):
    args = command("--input", folder, "--output", tmp_path / "pack", "--format", kind)
    limited = ["prlimit", "--fsize=20000", *args]  # bytes of a file
    job = subprocess.run(limited, cwd=REPO, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    lines = job.stderr.strip().splitlines()
    [line] = [line for line in lines if not line.startswith("packing: ")]  # a slow run's progress
    assert "cannot be written (" in line
    assert "too large" in line
    assert not list((tmp_path / "pack").rglob("*.partial"))
    assert not list((tmp_path / "pack").rglob("*record-*"))


# ------------------------------------------------------------------ broken and odd videos


@pytest.fixture
def mixed(tmp_path):
    """A list of sound, damaged, missing, empty and foreign files."""
    make_clip(tmp_path / "sound.mp4", 0)
    make_clip(tmp_path / "short.mp4", 1, num_frames=5)
    make_clip(tmp_path / "damaged.mp4", 2)
    data = bytearray((tmp_path / "damaged.mp4").read_bytes())
    middle = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "empty.mp4").write_text("")
    (tmp_path / "text.mp4").write_text("hello")
    names = ("sound", "short", "damaged", "missing", "empty", "text")
    (tmp_path / "val.csv").write_text("".join(f"{name}.mp4 1\n" for name in names))
    return tmp_path / "val.csv"


def test_broken_videos_have_no_frames_and_stay_listed(mixed, tmp_path, capsys, monkeypatch):
    args = ["prepare", "--input", str(mixed), "--output", str(tmp_path / "pack")]
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(SystemExit) as status:
        prepare.main()
    assert status.value.code == 3
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "pack" / "report.json").read_text())
    reasons = {row["id"]: row["reason"] for row in report["broken"]}
    assert list(reasons) == ["damaged.mp4", "missing.mp4", "empty.mp4", "text.mp4"]
    assert all(reason in out for reason in reasons.values())
    assert "missing.mp4 does not exist" in reasons["missing.mp4"]
    assert "empty.mp4 is empty" in reasons["empty.mp4"]
    assert 0 < report["broken"][0]["readable"] < report["broken"][0]["num_frames"] == 17
    assert "odd: short.mp4: shorter than a clip of 16 frames" in out
    assert "2 of 6 videos packed" in out
    records = open_pack(tmp_path / "pack", "arrayrecord", ("val",), num_classes=2).records["val"]
    sound = {"sound.mp4", "short.mp4"}
    assert {record.id for record in records} == {*reasons, *sound}
    for record in records:  # or an evaluation of the pack would not count what is broken
        if record.id in sound:
            record.open()
        else:
            with pytest.raises(DecodeError, match=f"{record.id}: could not be decoded when"):
                record.open()


def test_check_reports_unusual_files(tmp_path):
    make_clip(tmp_path / "a.mkv", 0)  # Matroska does not say how many frames it holds
    (tmp_path / "val.csv").write_text("a.mkv 0\n")
    [odd] = check.check([tmp_path / "val.csv"], workers=1)["odd"]
    assert odd["id"] == "a.mkv"
    assert odd["what"] == ["header claims 0 frames, there are 17"]


def test_repaired_videos_are_packed_by_the_next_run(mixed, tmp_path):
    prepare.prepare([mixed], tmp_path / "pack", Settings(), workers=2)
    for i, name in enumerate(("missing", "damaged", "empty", "text")):
        make_clip(tmp_path / f"{name}.mp4", 5 + i, num_frames=20)
    report = prepare.prepare([mixed], tmp_path / "pack", Settings(), workers=2)
    assert report["readable"] == 6
    assert len(open_pack(tmp_path / "pack", "arrayrecord", ("val",), 2).records["val"]) == 6


def test_a_list_of_broken_videos_is_refused(tmp_path, mixed):
    mixed.write_text("missing.mp4 0\nempty.mp4 0\n")
    with pytest.raises(InputError, match="none of 2 videos can be read"):
        prepare.prepare([mixed], tmp_path / "pack", Settings(), workers=1)
    assert not (tmp_path / "pack" / "dataset_info.json").exists()


def test_check_reports_the_same_without_writing(mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check", str(mixed), "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as status:
        check.main()
    assert status.value.code == 3
    assert "2 of 6 videos can be read" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    packed = prepare.prepare([mixed], tmp_path / "pack", Settings(), workers=2)
    for name in ("videos", "readable", "frames", "bytes", "broken", "odd"):
        assert report[name] == packed[name]
    mixed.write_text("sound.mp4 0\n")
    with pytest.raises(SystemExit) as status:
        check.main()
    assert status.value.code == 0
    mixed.write_text("sound.mp4 zero\n")
    with pytest.raises(SystemExit) as status:
        check.main()
    assert status.value.code == 2


# ------------------------------------------------------------------ settings


def test_frames_are_scaled_down_and_subsampled(tmp_path):
    make_clip(tmp_path / "wide.mp4", 0, size=(64, 96))
    make_clip(tmp_path / "small.mp4", 0, size=(16, 24))
    (tmp_path / "val.csv").write_text("wide.mp4 0\nsmall.mp4 0\n")
    prepare.prepare([tmp_path], tmp_path / "pack", Settings(short_side=32, frames=5), workers=1)
    wide, small = open_pack(tmp_path / "pack", "arrayrecord", ("val",), 1).records["val"]
    with wide.open() as reader, VideoFile(tmp_path / "wide.mp4") as video:
        assert reader.fps == pytest.approx(15 * 5 / 17)
        frames = reader.get_frames(np.arange(reader.num_frames))
        expected = video.get_frames(np.array([0, 4, 8, 12, 16]))
    assert frames.shape == (5, 32, 48, 3)
    halves = expected.reshape(5, 32, 2, 48, 2, 3).mean((2, 4))
    assert abs(frames - halves).mean() < 3
    with small.open() as reader:
        assert reader.get_frames([0]).shape == (1, 16, 24, 3)  # never enlarged


def test_packs_use_the_requested_color_matrix(tmp_path):
    yuv, tagged = (81, 90, 200), {"qp": "1", "x264-params": "colormatrix=bt709"}
    write_colour(tmp_path / "colour.mp4", yuv, "yuv420p", tagged)
    (tmp_path / "val.csv").write_text("colour.mp4 0\n")
    (tmp_path / "labels.txt").write_text("x\n")
    for matrix, standard in (("tagged", "bt709"), ("bt601", "bt601")):
        output = tmp_path / matrix
        settings = Settings(color_matrix=matrix, quality=100)
        prepare.prepare([tmp_path / "val.csv"], output, settings, workers=1)
        with open_pack(output, "arrayrecord", ("val",), 1).records["val"][0].open() as reader:
            frame = reader.get_frames([0])[0]
        np.testing.assert_allclose(
            frame, np.broadcast_to(rgb_of(yuv, standard, False), frame.shape), atol=5
        )
    data = DatasetConfig(source="pack", folder=str(tmp_path / "tagged"), color_matrix="tagged")
    assert open_dataset(data, 1, ("val",)).notes == ()
    data = dataclasses.replace(data, color_matrix="bt601")
    [note] = open_dataset(data, 1, ("val",)).notes
    assert "prepare it again with --color_matrix bt601" in note
    with pytest.raises(InputError, match="color_matrix='bt2020': must be one of 'tagged', 'bt601'"):
        Settings(color_matrix="bt2020")
    # A pack that an older version began is continued.
    path = tmp_path / "tagged" / ".parts" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("color_matrix") == "tagged"
    path.write_text(json.dumps(settings))
    again = Settings(quality=100)
    assert prepare.prepare([tmp_path / "val.csv"], tmp_path / "tagged", again, workers=1)[
        "complete"
    ]


def test_class_folders_are_packed(folder, tmp_path):
    for name in ("train/a", "train/b", "val/b"):
        make_clip(tmp_path / "tree" / name / "1.mp4", 0)
    prepare.prepare([tmp_path / "tree"], tmp_path / "pack", Settings("h5"), workers=1)
    data = open_pack(tmp_path / "pack", "h5", num_classes=2)
    assert data.labels == ["a", "b"]
    assert [(r.id, r.label) for r in data.records["train"]] == [("a_1", 0), ("b_1", 1)]


def test_paths_are_relative_to_the_prefix(folder, tmp_path):
    (tmp_path / "val.csv").write_text("1.mp4 0\n")
    make_clip(tmp_path / "videos" / "1.mp4", 0)
    prefix = str(tmp_path / "videos")
    assert not check.check([tmp_path / "val.csv"], 1, prefix)["broken"]
    report = prepare.prepare(
        [tmp_path / "val.csv"], tmp_path / "pack", Settings(), workers=1, prefix=prefix
    )
    assert report["readable"] == 1


def test_the_number_of_files_of_large_lists_is_limited():
    for count, expected in ((1, 1), (65, 2), (240_000, 256)):
        records = [Record(Path(f"{i}.mp4"), 0) for i in range(count)]
        parts = plan({"train": records}, Settings())
        assert len(parts) == parts[0].count == expected
        assert sum(len(part.records) for part in parts) == count


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (["x/a.mp4", "y/b, c.mp4"], ["a", "b__c"]),
        (["x/a.mp4", "y/a.mp4"], ["x_a", "y_a"]),
        (["../a.mp4", "a.mp4"], ["a_0", "a_1"]),
        (["影.mp4"], ["影"]),
    ],
)
def test_file_names_are_unique_and_stay_in_the_folder(ids, names):
    records = [Record(Path(name), 0, name) for name in ids]
    [part] = plan({"train": records}, Settings("h5"))
    assert isinstance(part, Part)
    assert part.names == names


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shard", "2/2"], "--shard 2/2: must be i/n"),
        (["--shard", "x"], "--shard x: must be i/n"),
        (["--frames", "0"], "--frames 0: must be 'all' or a positive number"),
        (["--quality", "0"], "quality=0: must be 1 to 100"),
        (["--frames_per_record", "0"], "frames_per_record=0: must be 1 to 1000000"),
        (
            ["--frames_per_record", "3"],
            "was started with different settings (frames_per_record); choose",
        ),
        (["--format", "zip"], "format='zip': must be one of 'arrayrecord', 'h5'"),
        (["--input", "nothing.csv"], "nothing.csv does not exist"),
        (
            ["--short_side", "128"],
            "was started with different settings (short_side); choose another",
        ),
    ],
)
def test_invalid_arguments_are_refused(folder, pack, capsys, monkeypatch, args, message):
    output, kind, _ = pack
    before = contents(output)
    base = ["--input", str(folder), "--output", str(output), "--format", kind]
    monkeypatch.setattr(sys, "argv", ["prepare", *base, "--clips_per_file", "3", *args])
    with pytest.raises(SystemExit) as status:
        prepare.main()
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(output) == before


def test_other_folders_and_running_jobs_are_not_modified(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="mine is not empty and is not a pack"):
        prepare.prepare([folder], tmp_path / "mine", Settings(), workers=1)
    prepare.prepare([folder], tmp_path / "pack", Settings(), workers=1)
    with open(tmp_path / "pack" / ".parts" / "lock.0-of-1.partial", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another prepare is writing it"):
            prepare.prepare([folder], tmp_path / "pack", Settings(), workers=1)


def test_two_lists_of_a_split_are_refused(tmp_path):
    make_clip(tmp_path / "train.mp4", 0)
    (tmp_path / "a").mkdir()
    for name in ("a/train.csv", "train.csv"):
        (tmp_path / name).write_text(f"{tmp_path}/train.mp4 0\n")
    with pytest.raises(InputError, match="split 'train' is given twice"):
        check.gather([tmp_path / "a/train.csv", tmp_path / "train.csv"])


# ------------------------------------------------------------------ names of files

ODD_NAMES = [b"caf\xe9.mp4", b"a\nb.mp4", b"q\"u,o'te.mp4", b"c\rr.mp4", b"\xff\xfe broken.mp4"]


@pytest.fixture
def odd_names(tmp_path):
    """A class folder of videos whose names are not UTF-8, or hold line breaks and quotes."""
    source, folder = tmp_path / "plain.mp4", tmp_path / "data" / "train" / "x"
    make_clip(source, 0)
    folder.mkdir(parents=True)
    for name in ODD_NAMES:
        sound = source.read_bytes() if b"broken" not in name else b"hello"
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(sound)
    (folder / "notes.txt").write_text("x")
    return tmp_path / "data"


def run_main(module, monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    with pytest.raises(SystemExit) as status:
        module.main()
    return status.value.code, *capsys.readouterr()


def test_check_reports_unusual_names_on_one_line_each(odd_names, tmp_path, capsys, monkeypatch):
    code, out, err = run_main(
        check, monkeypatch, capsys, odd_names, "--json", tmp_path / "out.json"
    )
    assert code == 3
    assert len(out.splitlines()) == 2
    assert "\\udcff\\udcfe broken.mp4: cannot be decoded" in out
    assert "skipped in class folders: 1 not videos by their suffix (.txt 1)" in err
    out.encode()  # prints everywhere
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    [row] = report["broken"]
    assert os.fsencode(row["id"]) == b"x/\xff\xfe broken.mp4"


@pytest.mark.parametrize("kind", SETTINGS)
def test_unusual_names_keep_their_ids_in_packs(odd_names, tmp_path, capsys, monkeypatch, kind):
    args = ["--input", odd_names, "--output", tmp_path / "pack", "--format", kind]
    code, out, err = run_main(prepare, monkeypatch, capsys, *args)
    assert code == 3
    assert len(out.splitlines()) == 3
    report = json.loads((tmp_path / "pack" / "report.json").read_text(encoding="utf-8"))
    assert os.fsencode(report["broken"][0]["id"]) == b"x/\xff\xfe broken.mp4"
    packed = open_pack(tmp_path / "pack", kind, ("train",), 1).records["train"]
    listed = check.gather([odd_names])[0]["train"]
    if kind == "h5":  # file names are made of letters there
        assert len(packed) == len(listed) - 1
    else:
        assert [record.id for record in packed] == [record.id for record in listed]
        assert {os.fsencode(r.id) for r in packed} == {b"x/" + name for name in ODD_NAMES}
    for record in packed:
        if "broken" not in record.id:
            with record.open() as reader:
                assert reader.get_frames([16]).shape == (1, 40, 56, 3)


def test_check_tests_its_output_path_before_reading(tmp_path, capsys, monkeypatch):
    make_clip(tmp_path / "train.mp4", 0)
    (tmp_path / "train.csv").write_text("train.mp4\n")
    precious = tmp_path / "out.json"
    precious.write_text("precious")
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(check, "examine", None)  # nothing is read
    for name, reason in (
        ("none/../out.json/x.json", "File exists"),
        ("pipe.json", "not a regular file"),
        (".", "Is a directory"),
    ):
        args = [tmp_path / "train.csv", "--json", tmp_path / name]
        code, _, err = run_main(check, monkeypatch, capsys, *args)
        assert (code, err.count("\n")) == (2, 1)
        assert f"cannot be written ({reason}); choose another" in err
    monkeypatch.undo()

    def fail(*_):
        raise InputError("the disk is full")

    monkeypatch.setattr(check, "make_report", fail)  # what fails on the way
    args = [tmp_path / "train.csv", "--json", precious]
    assert run_main(check, monkeypatch, capsys, *args)[0] == 2
    assert precious.read_text() == "precious"
    monkeypatch.undo()
    assert run_main(check, monkeypatch, capsys, *args)[0] == 0
    assert json.loads(precious.read_text())["readable"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_class_names_that_a_pack_cannot_represent_are_refused(tmp_path):
    make_clip(tmp_path / "train" / " x" / "1.mp4", 0)
    with pytest.raises(InputError, match="the class ' x' begins or ends with a space; rename it"):
        prepare.prepare([tmp_path], tmp_path / "pack", Settings(), workers=1)
    assert not (tmp_path / "pack").exists()


def test_damaged_state_files_are_refused_or_rewritten(folder, tmp_path):
    prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
    [state] = (tmp_path / "pack" / ".parts").glob("val-*.json")
    whole = state.read_text()
    for text in ("[]", "{", whole.replace('"findings": [', '"findings": [1, ')):
        state.write_text(text)
        prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
        assert json.loads(state.read_text())["kept"] == json.loads(whole)["kept"]
    (tmp_path / "pack" / ".parts" / "settings.json").write_text("[" * 10_000)
    with pytest.raises(InputError, match="settings.json: is damaged; delete .*pack and prepare"):
        prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
