"""The synthetic motion clips are H.264 videos whose class depends on their motion only."""

import av
import numpy as np
import pytest
from PIL import Image

from jaxvid.data import synthetic_motion
from jaxvid.data.formats.video_reader import VideoFile
from jaxvid.errors import InputError


def scene(pair: int, seed: int = 0) -> np.ndarray:
    return synthetic_motion.render_scene(np.random.default_rng([seed, pair]), pair)


def shape_mask(frames: np.ndarray) -> np.ndarray:
    """Return a mask `(t, h, w)` of the shape, which is brighter than the background."""
    return (frames.max(axis=-1) > 100).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_scenes_have_the_motion_of_their_label(seed):
    rows, columns = np.mgrid[: synthetic_motion.SIZE, : synthetic_motion.SIZE]

    def centre(frames, coordinates):
        mask = shape_mask(frames)
        return (mask * coordinates).sum((1, 2)) / mask.sum((1, 2))

    assert synthetic_motion.LABELS[::2] == ("left", "up", "growing", "clockwise")
    assert (np.diff(centre(scene(0, seed), columns)[::4]) < 0).all()  # left
    assert (np.diff(centre(scene(1, seed), rows)[::4]) < 0).all()  # up
    assert (np.diff(shape_mask(scene(2, seed)).sum((1, 2))[::4]) > 0).all()  # growing
    frames = scene(3, seed)
    middle = (centre(frames, columns).mean(), centre(frames, rows).mean())
    errors = {}  # angle → difference between each rotated frame and the next frame
    for angle in (-8, 8):  # degrees; Pillow's positive angles turn counter-clockwise
        images = [Image.fromarray(frame).rotate(angle, center=middle) for frame in frames[:-1]]
        rotated = np.stack([np.asarray(image, float) for image in images])
        errors[angle] = abs(rotated - frames[1:]).mean()
    assert errors[-8] < errors[8]  # clockwise


def test_pairs_are_time_reversals(motion_folder):
    """Clip 2k+1 shows the frames of clip 2k backwards, except for compression errors."""
    for clip in (0, 2, 4, 6):
        with (
            VideoFile(motion_folder / "val" / f"{clip:05d}.mp4") as forwards,
            VideoFile(motion_folder / "val" / f"{clip + 1:05d}.mp4") as backwards,
        ):
            assert forwards.num_frames == backwards.num_frames == synthetic_motion.NUM_FRAMES
            indices = np.arange(synthetic_motion.NUM_FRAMES)
            a, b = forwards.get_frames(indices), backwards.get_frames(indices)[::-1]
        assert abs(a.astype(float) - b).mean() < 4
        assert abs(a.astype(float) - b).mean() < 0.5 * abs(a[::-1].astype(float) - b).mean()


def test_files_are_h264_with_balanced_labels(motion_folder):
    for split, count in (("train", 48), ("val", 24)):
        lines = (motion_folder / f"{split}.csv").read_text().splitlines()
        names, labels = zip(*(line.split(" ") for line in lines), strict=True)
        assert len(set(names)) == count
        assert np.bincount(np.array(labels, int)).tolist() == [count // 8] * 8
    assert (motion_folder / "labels.txt").read_text().split() == list(synthetic_motion.LABELS)
    with av.open(str(motion_folder / names[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_the_same_seed_gives_the_same_bytes_and_splits_differ(motion_folder, tmp_path):
    synthetic_motion.make_motion(tmp_path / "again", num_train=8, num_val=8, seed=0)
    synthetic_motion.make_motion(tmp_path / "other", num_train=8, num_val=8, seed=1)
    name = "train/00003.mp4"
    expected = (motion_folder / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == expected
    assert (tmp_path / "other" / name).read_bytes() != expected
    assert (motion_folder / "val/00003.mp4").read_bytes() != expected


def test_interrupted_generation_leaves_no_files_and_can_be_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "motion"
    calls = []

    def fail_later(path, frames):
        calls.append(path)
        if len(calls) > 4:
            raise KeyboardInterrupt
        path.write_bytes(b"incomplete")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic_motion, "write_clip", fail_later)
        with pytest.raises(KeyboardInterrupt):
            synthetic_motion.make_motion(folder, num_train=16, num_val=8, seed=0)
    assert not folder.exists()
    assert not list(tmp_path.glob("*.partial"))
    synthetic_motion.make_motion(folder, num_train=16, num_val=8, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["motion"]
    assert len(list(folder.glob("*/*.mp4"))) == 24
    before = (folder / "train.csv").stat().st_mtime_ns
    # The clips are already generated, so that nothing is written.
    synthetic_motion.make_motion(folder, num_train=16, num_val=8, seed=0)
    assert (folder / "train.csv").stat().st_mtime_ns == before


def test_invalid_output_folders_and_numbers_are_refused(tmp_path):
    folder = tmp_path / "motion"
    synthetic_motion.make_motion(folder, num_train=8, num_val=8, seed=0)
    with pytest.raises(InputError, match="delete it or choose another folder"):
        synthetic_motion.make_motion(folder, num_train=8, num_val=8, seed=1)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="contains no motion clips"):
        synthetic_motion.make_motion(tmp_path / "mine", num_train=8, num_val=8, seed=1)
    with pytest.raises(InputError, match="cannot be written"):
        synthetic_motion.make_motion("/proc/jaxvid/motion", num_train=8, num_val=8, seed=1)
    with pytest.raises(InputError, match="num_train=12: must be a positive multiple of 8"):
        synthetic_motion.make_motion(tmp_path / "new", num_train=12, num_val=8, seed=1)


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["motion", "--output", str(tmp_path / "m"), "--train", "8", "--val", "8"]
    monkeypatch.setattr("sys.argv", arguments)
    synthetic_motion.main()
    assert (tmp_path / "m" / "val.csv").exists()
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "2"])
    with pytest.raises(SystemExit) as stop:
        synthetic_motion.main()
    assert stop.value.code == InputError.EXIT_CODE
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
