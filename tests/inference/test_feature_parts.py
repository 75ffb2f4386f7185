"""Features of parts, extracted in this process instead of on workers of Apache Beam.

`tests/data/test_beam.py` extracts them on workers.
"""

import pickle
import shutil

import pytest

from jaxvid.data.beam import BeamRunner
from jaxvid.data.formats.pack_writer import Settings
from jaxvid.data.input_videos import open_input
from jaxvid.data.prepare import prepare
from jaxvid.errors import InputError
from jaxvid.features import FeatureOptions, features, main
from jaxvid.inference import feature_parts

RUNNER = BeamRunner("DirectRunner")


@pytest.fixture(scope="module")
def folder(motion_folder, tmp_path_factory):
    """Seventeen videos, of which one is broken."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(17):
        shutil.copy(motion_folder / "val" / f"{i:05}.mp4", folder)
    (folder / "00003.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def run_parts(monkeypatch):
    """Replaces `run_on_workers` by a function that runs three parts in this process."""
    monkeypatch.setattr(feature_parts, "PART_VIDEOS", 8)
    counts = []

    def run_on_workers(function, items, runner):
        assert runner is RUNNER
        counts.append(len(items))
        for item in (*reversed(items), items[0]):  # in any order, and one of them twice
            pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(item)))

    monkeypatch.setattr(feature_parts, "run_on_workers", run_on_workers)
    return counts


@pytest.mark.parametrize("times", [{}, {"window": 0.6, "stride": 0.3}])
def test_parts_have_the_bytes_of_one_extraction(folder, folders, tmp_path, run_parts, times):
    options = FeatureOptions(batch_size=8, **times)
    videos = open_input(folder)
    features(videos, folders / "xvit", tmp_path / "one.npz", options)
    features(videos, folders / "xvit", tmp_path / "parts.npz", options, RUNNER)
    assert run_parts == [3]
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one.npz", "parts.npz"}


def test_parts_of_a_pack(motion_folder, folders, tmp_path, run_parts):
    prepare([motion_folder / "val.csv"], tmp_path / "pack", Settings(short_side=72), workers=1)
    videos, options = open_input(tmp_path / "pack"), FeatureOptions(batch_size=8)
    features(videos, folders / "stam", tmp_path / "one.npz", options)
    features(videos, folders / "stam", tmp_path / "parts.npz", options, RUNNER)
    assert run_parts == [3]
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_finished_parts_are_not_extracted_again(folder, folders, tmp_path, run_parts, monkeypatch):
    videos, options = open_input(folder), FeatureOptions(batch_size=8)
    output = tmp_path / "out.npz"
    run = feature_parts.run_on_workers

    def lose_two_parts(function, items, runner):
        run(function, items[:1], runner)

    with monkeypatch.context() as patch:
        patch.setattr(feature_parts, "run_on_workers", lose_two_parts)
        with pytest.raises(InputError, match="not all parts were written; use a folder that all"):
            features(videos, folders / "xvit", output, options, RUNNER)
    features(videos, folders / "xvit", output, options, RUNNER)
    assert run_parts == [1, 2]
    # Other options have other parts.
    with monkeypatch.context() as patch:
        patch.setattr(feature_parts, "run_on_workers", lose_two_parts)
        with pytest.raises(InputError):
            features(videos, folders / "xvit", output, options, RUNNER)
    features(videos, folders / "xvit", output, FeatureOptions(batch_size=16), RUNNER)
    assert run_parts == [1, 2, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_a_worker_with_other_weights_or_devices_is_refused(folder, folders, tmp_path):
    videos = open_input(folder)
    part = feature_parts.FeaturePart(0, 0, len(videos.records), videos.records)

    def extract(**changes):
        job = {"model": str(folders / "xvit"), "sha256": "", "options": FeatureOptions()}
        job |= {"batch_size": 8, "pack": None, "folder": tmp_path} | changes
        feature_parts.extract_part(part, feature_parts.FeatureJob(**job))

    with pytest.raises(InputError, match="the weights differ from those on the machine of the com"):
        extract()
    network, *_ = feature_parts._load(str(folders / "xvit"), FeatureOptions())
    with pytest.raises(InputError, match="--batch_size=7 must be a positive multiple of 8"):
        extract(sha256=network.sha256, batch_size=7)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_processes=2"], "--runner cannot be combined with --coordinator, --num_processes"),
        (["--output=s3://a/b.npz"], "--output s3://a/b.npz: is an address; with --runner, choose"),
        (["--runner=Direct"], "--runner='Direct': must be one of 'DirectRunner'"),
    ],
)
def test_bad_options_are_refused(folder, folders, tmp_path, options, message, capsys):
    defaults = {"--output": f"{tmp_path / 'o.npz'}", "--runner": "DirectRunner"}
    given = {option.partition("=")[0] for option in options}
    options += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    assert main([str(folder), f"--model={folders / 'xvit'}", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
