"""Packs of JPEG frames: contents, interrupted and sharded runs, broken videos, command line."""

import dataclasses
import fcntl
import io
import itertools
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
from jaxvid.data.records import VideoFiles
from jaxvid.data.sources import DatasetConfig, Record, open_dataset
from jaxvid.data.synthetic_motion import write_clip
from jaxvid.errors import InputError
from tests.data.test_video_reader import write_colour, yuv_to_rgb

NUM_VIDEOS = 10
SETTINGS = {"arrayrecord": Settings(clips_per_file=3), "h5": Settings("h5", clips_per_file=3)}
REPO = Path(__file__).parents[2]


def make_clip(path: Path, seed: int, num_frames: int = 17, size: tuple = (40, 56)) -> None:
    """Write a wave pattern in a random colour per frame; `size` is the height and the width."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    colours = rng.uniform(40, 215, (num_frames, 1, 1, 3))
    frames = colours + 30 * np.sin(rows / 9 + columns / 7 + seed)[None, :, :, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, frames.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder of ten clips whose paths contain spaces, commas and non-ASCII letters.

    `train.csv` lists all clips, `val.csv` two of them. Clip 4 has 12 frames, the others have 17.
    """
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i in range(NUM_VIDEOS):
        name = f"sub {i % 3}/影, {i}.mp4"
        make_clip(folder / name, i, num_frames=12 if i == 4 else 17)
        lines.append(f"{name} {i % 3}\n")
    (folder / "train.csv").write_text("".join(lines), encoding="utf-8")
    (folder / "val.csv").write_text(lines[2] + lines[1], encoding="utf-8")
    (folder / "labels.txt").write_text("x\ny\nz z\n")
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def pack(request, folder, tmp_path_factory):
    """A pack of `folder` in each format: its path, the format, and the report of the run."""
    output = tmp_path_factory.mktemp("packs") / request.param
    report = prepare.prepare([folder], output, SETTINGS[request.param], workers=2)
    assert report["complete"]
    return output, request.param, report


def contents(output: Path) -> dict[str, bytes]:
    """Return path → bytes of a pack's files, except state files and report, which contain times."""
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


def test_packs_contain_the_frames_of_the_videos(folder, pack):
    output, kind, report = pack
    data = open_pack(output, kind)
    assert data.labels == ["x", "y", "z z"]
    assert report["readable"] == report["videos"] == NUM_VIDEOS + 2
    assert [len(data.records[split]) for split in ("train", "val")] == [NUM_VIDEOS, 2]
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


def test_both_formats_contain_the_same_frames(folder, tmp_path):
    frames = []
    for kind, settings in SETTINGS.items():
        prepare.prepare([folder / "val.csv"], tmp_path / kind, settings, workers=1)
        record = open_pack(tmp_path / kind, kind, ("val",)).records["val"][1]
        with record.open() as reader:
            frames.append(reader.get_frames(np.arange(17)))
    np.testing.assert_array_equal(*frames)


@pytest.mark.parametrize("size", [1, 2, 5, 17, 1000])
def test_frames_do_not_depend_on_the_record_size(folder, pack, tmp_path, size):
    output, kind, _ = pack
    settings = Settings(frames_per_record=size)
    prepare.prepare([folder / "val.csv"], tmp_path / "pack", settings, workers=1)
    [first, second] = open_pack(tmp_path / "pack", "arrayrecord", ("val",)).records["val"]
    assert second.listed.record == -(-17 // size)  # the first video fills the records before it
    references = open_pack(output, kind).records["val"]
    for record, reference in zip((first, second), references, strict=True):
        with record.open() as reader, reference.open() as reference_reader:
            assert reader.num_frames == 17
            frames = reference_reader.get_frames(np.arange(17))
            for i in range(17):
                np.testing.assert_array_equal(reader.get_frames([i])[0], frames[i])
            indices = np.array([16, 0, 5, 4, 5, 16])
            np.testing.assert_array_equal(reader.get_frames(indices), frames[indices])


def test_only_records_with_requested_frames_are_read(folder, tmp_path, monkeypatch):
    prepare.prepare(
        [folder / "val.csv"], tmp_path / "pack", Settings(frames_per_record=4), workers=1
    )
    records = open_pack(tmp_path / "pack", "arrayrecord", ("val",)).records["val"]
    record_numbers, read = [], PackRecords.read_data

    def log_and_read(self, records):
        record_numbers.extend(records)
        return read(self, records)

    monkeypatch.setattr(PackRecords, "read_data", log_and_read)
    monkeypatch.setattr(PackRecords, "parse", None)  # records that equal the index are not parsed
    with records[1].open() as reader:
        assert (reader.num_frames, records[1].label) == (17, 1)
        assert record_numbers == []
        reader.get_frames([16, 3, 0, 9, 3])
    assert record_numbers == [5, 7, 9]  # the second video has records 5 to 9


def write_uneven(path: Path) -> None:
    """Write 40 frames, 33 ms apart in the first half, then at growing intervals."""
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
def test_packs_store_the_times_of_variable_frame_rates(tmp_path, size):
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


def test_h5_packs_have_the_layout_of_the_original_program(folder, tmp_path):
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


def test_a_repeated_run_changes_no_files(folder, pack):
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


# Runs prepare and kills its own process at the n-th call of a function.
# Arguments: name of the function, n, and the arguments of prepare.
KILLING_SCRIPT = """
import os, signal, sys
from jaxvid.data import prepare
name, remaining = sys.argv[1], int(sys.argv[2])
module = {"encode": prepare, "replace": os}[name]
function = getattr(module, name)
def count_and_kill(*args):
    global remaining
    remaining -= 1
    if not remaining:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
setattr(module, name, count_and_kill)
del sys.argv[1:3]
prepare.main()
"""


@pytest.mark.parametrize("crashes", [[("encode", 2), ("encode", 6)], [("replace", 3)] * 3])
def test_a_killed_run_resumes_to_an_identical_pack(folder, pack, tmp_path, crashes):
    output, kind, _ = pack
    args = ["--input", folder, "--output", tmp_path / "pack", "--format", kind, "--workers", "1"]
    for crash in crashes:
        script = [sys.executable, "-c", KILLING_SCRIPT, *map(str, crash)]
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
    assert len(calls) < 8 + NUM_VIDEOS + 2  # complete parts were not encoded again


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_full_disk_is_one_error_line_without_partial_files(folder, tmp_path, kind):
    args = command("--input", folder, "--output", tmp_path / "pack", "--format", kind)
    limited = ["prlimit", "--fsize=20000", *args]  # largest file in bytes
    job = subprocess.run(limited, cwd=REPO, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    lines = job.stderr.strip().splitlines()
    # Slow runs also print lines of progress. Both splits contain the same videos.
    [line] = [line for line in lines if not line.startswith(("packing: ", "overlap: "))]
    assert "cannot be written (" in line
    assert "too large" in line
    assert not list((tmp_path / "pack").rglob("*.partial"))
    assert not list((tmp_path / "pack").rglob("*record-*"))


# ------------------------------------------------------------------ broken and unusual videos


@pytest.fixture
def mixed_list(tmp_path):
    """A list of intact, short, damaged, missing, empty and non-video files."""
    make_clip(tmp_path / "intact.mp4", 0)
    make_clip(tmp_path / "short.mp4", 1, num_frames=5)
    make_clip(tmp_path / "damaged.mp4", 2)
    data = bytearray((tmp_path / "damaged.mp4").read_bytes())
    middle = data.index(b"mdat") + 4 + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "empty.mp4").write_text("")
    (tmp_path / "text.mp4").write_text("hello")
    names = ("intact", "short", "damaged", "missing", "empty", "text")
    (tmp_path / "val.csv").write_text("".join(f"{name}.mp4 1\n" for name in names))
    return tmp_path / "val.csv"


def test_broken_videos_stay_listed_without_frames(mixed_list, tmp_path, capsys, monkeypatch):
    args = ["prepare", "--input", str(mixed_list), "--output", str(tmp_path / "pack")]
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
    assert "unusual: short.mp4: shorter than a clip of 16 frames" in out
    assert "2 of 6 videos packed" in out
    records = open_pack(tmp_path / "pack", "arrayrecord", ("val",), num_classes=2).records["val"]
    readable = {"intact.mp4", "short.mp4"}
    # Broken videos are listed too, because an evaluation must count them.
    assert {record.id for record in records} == {*reasons, *readable}
    for record in records:
        if record.id in readable:
            record.open()
        else:
            with pytest.raises(DecodeError, match=f"{record.id}: could not be decoded when"):
                record.open()


def test_check_reports_unusual_files(tmp_path):
    make_clip(tmp_path / "a.mkv", 0)  # Matroska headers do not contain the number of frames
    make_clip(tmp_path / "b.mkv", 0, num_frames=12)
    (tmp_path / "val.csv").write_text("a.mkv 0\nb.mkv 0\n")
    [row] = check.check([tmp_path / "val.csv"], workers=1)["odd"]
    assert row["id"] == "b.mkv"
    assert row["what"] == ["shorter than a clip of 16 frames"]


def test_check_refuses_packs(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="is a pack, whose videos were checked when it was writ"):
        check.check([tmp_path], workers=1)


def test_repaired_videos_are_packed_by_the_next_run(mixed_list, tmp_path):
    prepare.prepare([mixed_list], tmp_path / "pack", Settings(), workers=2)
    for i, name in enumerate(("missing", "damaged", "empty", "text")):
        make_clip(tmp_path / f"{name}.mp4", 5 + i, num_frames=20)
    report = prepare.prepare([mixed_list], tmp_path / "pack", Settings(), workers=2)
    assert report["readable"] == 6
    assert len(open_pack(tmp_path / "pack", "arrayrecord", ("val",), 2).records["val"]) == 6


def test_a_list_without_readable_videos_is_refused(tmp_path, mixed_list):
    mixed_list.write_text("missing.mp4 0\nempty.mp4 0\n")
    with pytest.raises(InputError, match="none of 2 videos can be read"):
        prepare.prepare([mixed_list], tmp_path / "pack", Settings(), workers=1)
    assert not (tmp_path / "pack" / "dataset_info.json").exists()


def test_check_and_prepare_report_the_same(mixed_list, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["check", str(mixed_list), "--json", str(tmp_path / "out.json")]
    )
    with pytest.raises(SystemExit) as status:
        check.main()
    assert status.value.code == 3
    assert "2 of 6 videos can be read" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    packed = prepare.prepare([mixed_list], tmp_path / "pack", Settings(), workers=2)
    for name in ("videos", "readable", "frames", "bytes", "broken", "odd"):
        assert report[name] == packed[name]
    mixed_list.write_text("intact.mp4 0\n")
    with pytest.raises(SystemExit) as status:
        check.main()
    assert status.value.code == 0
    mixed_list.write_text("intact.mp4 0.5\n")
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
    downscaled = expected.reshape(5, 32, 2, 48, 2, 3).mean((2, 4))  # means of 2 × 2 pixels
    assert abs(frames - downscaled).mean() < 3
    with small.open() as reader:
        assert reader.get_frames([0]).shape == (1, 16, 24, 3)  # small frames are not enlarged


def test_packs_use_the_requested_color_matrix(tmp_path):
    yuv, options = (81, 90, 200), {"qp": "1", "x264-params": "colormatrix=bt709"}
    write_colour(tmp_path / "colour.mp4", yuv, "yuv420p", options)
    (tmp_path / "val.csv").write_text("colour.mp4 0\n")
    (tmp_path / "labels.txt").write_text("x\n")
    for matrix, standard in (("tagged", "bt709"), ("bt601", "bt601")):
        output = tmp_path / matrix
        settings = Settings(color_matrix=matrix, quality=100)
        prepare.prepare([tmp_path / "val.csv"], output, settings, workers=1)
        with open_pack(output, "arrayrecord", ("val",), 1).records["val"][0].open() as reader:
            frame = reader.get_frames([0])[0]
        np.testing.assert_allclose(
            frame, np.broadcast_to(yuv_to_rgb(yuv, standard, full=False), frame.shape), atol=5
        )
    data = DatasetConfig(source="pack", folder=str(tmp_path / "tagged"), color_matrix="tagged")
    assert open_dataset(data, 1, ("val",)).notes == ()
    data = dataclasses.replace(data, color_matrix="bt601")
    [note] = open_dataset(data, 1, ("val",)).notes
    assert "prepare it again with --color_matrix bt601" in note
    with pytest.raises(InputError, match="color_matrix='bt2020': must be one of 'tagged', 'bt601'"):
        Settings(color_matrix="bt2020")
    # A pack of an older version, whose settings do not contain color_matrix, can be resumed.
    path = tmp_path / "tagged" / ".parts" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings.pop("color_matrix") == "tagged"
    path.write_text(json.dumps(settings))
    report = prepare.prepare(
        [tmp_path / "val.csv"], tmp_path / "tagged", Settings(quality=100), workers=1
    )
    assert report["complete"]


def test_class_folders_are_packed(tmp_path):
    for name in ("train/a", "train/b", "val/b"):
        make_clip(tmp_path / "tree" / name / "1.mp4", 0)
    prepare.prepare([tmp_path / "tree"], tmp_path / "pack", Settings("h5"), workers=1)
    data = open_pack(tmp_path / "pack", "h5", num_classes=2)
    assert data.labels == ["a", "b"]
    assert [(r.id, r.label) for r in data.records["train"]] == [("a_1", 0), ("b_1", 1)]


def test_paths_are_relative_to_the_prefix(tmp_path):
    (tmp_path / "val.csv").write_text("1.mp4 0\n")
    make_clip(tmp_path / "videos" / "1.mp4", 0)
    prefix = str(tmp_path / "videos")
    assert not check.check([tmp_path / "val.csv"], 1, prefix)["broken"]
    report = prepare.prepare(
        [tmp_path / "val.csv"], tmp_path / "pack", Settings(), workers=1, prefix=prefix
    )
    assert report["readable"] == 1


def test_the_number_of_files_per_split_is_limited():
    for count, expected in ((1, 1), (65, 2), (240_000, 256)):
        records = VideoFiles(Path(), [f"{i}.mp4" for i in range(count)], [0] * count)
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
def test_names_of_h5_files_are_unique_and_contain_no_folders(ids, names):
    records = VideoFiles(Path(), ids, [0] * len(ids))
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
    base = {"--input": str(folder), "--output": str(output), "--format": kind}
    options = base | {"--clips_per_file": "3"} | dict([args])
    monkeypatch.setattr(sys, "argv", ["prepare", *itertools.chain(*options.items())])
    with pytest.raises(SystemExit) as status:
        prepare.main()
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(output) == before


def test_output_folders_with_other_contents_or_in_use_are_refused(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="mine is not empty and is not a pack"):
        prepare.prepare([folder], tmp_path / "mine", Settings(), workers=1)
    prepare.prepare([folder], tmp_path / "pack", Settings(), workers=1)
    with open(tmp_path / "pack" / ".parts" / "lock.0-of-1.partial", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another prepare is writing it"):
            prepare.prepare([folder], tmp_path / "pack", Settings(), workers=1)


def test_two_lists_of_the_same_split_are_refused(tmp_path):
    make_clip(tmp_path / "train.mp4", 0)
    (tmp_path / "a").mkdir()
    for name in ("a/train.csv", "train.csv"):
        (tmp_path / name).write_text(f"{tmp_path}/train.mp4 0\n")
    with pytest.raises(InputError, match="split 'train' is given twice"):
        check.gather([tmp_path / "a/train.csv", tmp_path / "train.csv"])


# ------------------------------------------------------------------ unusual file names

UNUSUAL_NAMES = [b"caf\xe9.mp4", b"a\nb.mp4", b"q\"u,o'te.mp4", b"c\rr.mp4", b"\xff\xfe broken.mp4"]


@pytest.fixture
def unusual_names(tmp_path):
    """A data folder of one class. File names contain line breaks, quotes and non-UTF-8 bytes.

    The last file is not a video.
    """
    source, folder = tmp_path / "plain.mp4", tmp_path / "data" / "train" / "x"
    make_clip(source, 0)
    folder.mkdir(parents=True)
    for name in UNUSUAL_NAMES:
        data = source.read_bytes() if b"broken" not in name else b"hello"
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(data)
    (folder / "notes.txt").write_text("x")
    return tmp_path / "data"


def run_main(module, monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    with pytest.raises(SystemExit) as status:
        module.main()
    return status.value.code, *capsys.readouterr()


def test_check_reports_unusual_names_on_one_line_each(unusual_names, tmp_path, capsys, monkeypatch):
    code, out, err = run_main(
        check, monkeypatch, capsys, unusual_names, "--json", tmp_path / "out.json"
    )
    assert code == 3
    assert len(out.splitlines()) == 2
    assert "\\udcff\\udcfe broken.mp4: cannot be decoded" in out
    assert "skipped in class folders: 1 file without a video suffix (.txt 1)" in err
    out.encode()  # raises if it contains surrogates, which cannot be printed
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    [row] = report["broken"]
    assert os.fsencode(row["id"]) == b"x/\xff\xfe broken.mp4"


@pytest.mark.parametrize("kind", SETTINGS)
def test_videos_with_unusual_names_are_packed(unusual_names, tmp_path, capsys, monkeypatch, kind):
    args = ["--input", unusual_names, "--output", tmp_path / "pack", "--format", kind]
    code, out, err = run_main(prepare, monkeypatch, capsys, *args)
    assert code == 3
    assert len(out.splitlines()) == 3
    report = json.loads((tmp_path / "pack" / "report.json").read_text(encoding="utf-8"))
    assert os.fsencode(report["broken"][0]["id"]) == b"x/\xff\xfe broken.mp4"
    packed = open_pack(tmp_path / "pack", kind, ("train",), 1).records["train"]
    listed = check.gather([unusual_names])[0]["train"]
    if kind == "h5":  # lists only readable videos, by the names of their HDF5 files
        assert len(packed) == len(listed) - 1
    else:
        assert [record.id for record in packed] == [record.id for record in listed]
        assert {os.fsencode(r.id) for r in packed} == {b"x/" + name for name in UNUSUAL_NAMES}
    for record in packed:
        if "broken" not in record.id:
            with record.open() as reader:
                assert reader.get_frames([16]).shape == (1, 40, 56, 3)


def test_check_validates_its_output_path_and_replaces_it_only_on_success(
    tmp_path, capsys, monkeypatch
):
    make_clip(tmp_path / "train.mp4", 0)
    (tmp_path / "train.csv").write_text("train.mp4\n")
    output = tmp_path / "out.json"
    output.write_text("previous report")
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(check, "examine", None)  # reading a video would raise a TypeError
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

    monkeypatch.setattr(check, "make_report", fail)  # fails after the videos are read
    args = [tmp_path / "train.csv", "--json", output]
    assert run_main(check, monkeypatch, capsys, *args)[0] == 2
    assert output.read_text() == "previous report"
    monkeypatch.undo()
    assert run_main(check, monkeypatch, capsys, *args)[0] == 0
    assert json.loads(output.read_text())["readable"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_class_names_that_a_pack_cannot_represent_are_refused(tmp_path):
    make_clip(tmp_path / "train" / " x" / "1.mp4", 0)
    with pytest.raises(InputError, match="the class ' x' begins or ends with a space; rename it"):
        prepare.prepare([tmp_path], tmp_path / "pack", Settings(), workers=1)
    assert not (tmp_path / "pack").exists()


def test_damaged_state_files_are_refused_or_rewritten(folder, tmp_path):
    prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
    [state] = (tmp_path / "pack" / ".parts").glob("val-*.json")
    intact = state.read_text()
    for text in ("[]", "{", intact.replace('"findings": [', '"findings": [1, ')):
        state.write_text(text)
        prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
        assert json.loads(state.read_text())["kept"] == json.loads(intact)["kept"]
    (tmp_path / "pack" / ".parts" / "settings.json").write_text("[" * 10_000)
    with pytest.raises(InputError, match="settings.json: is damaged; delete .*pack and prepare"):
        prepare.prepare([folder / "val.csv"], tmp_path / "pack", Settings(), workers=1)
