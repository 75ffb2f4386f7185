"""Model folders survive interrupted saves and full disks; damaged ones are refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxvid
from configs import finetune
from convert import flax_to_torch
from jaxvid.errors import InputError
from jaxvid.models import make_model_config, split_params
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.model_card import check_labels
from jaxvid.training.distillation import DistillConfig, load_teacher

TINY = {"width": 16, "depth": 1, "image_size": 32}
# Saves a model, but exits instead of one of the renames or deletions: `function` is "rename" or
# "rmtree", and `count` is the number of its calls, on the model folder or beside it, that succeed.
INTERRUPTED_SAVE = """
import os, pathlib, shutil, sys
import jaxvid
folder, function, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = jaxvid.create_model("xvit_tiny", width=16, depth=1, image_size=32, seed=4)
owner = shutil if function == "rmtree" else pathlib.Path
original = getattr(owner, function)

def call_or_exit(path, *arguments, **options):
    global count
    if pathlib.Path(path).parent == pathlib.Path(folder).parent:
        count -= 1
        if count < 0:
            os._exit(9)
    return original(path, *arguments, **options)

setattr(owner, function, call_or_exit)
jaxvid.save_model(model, folder)
"""
# Saves a model where no file can be larger than 1000 bytes.
SAVE_ON_FULL_DISK = """
import resource, sys
import jaxvid
model = jaxvid.create_model("xvit_tiny", width=16, depth=1, image_size=32, seed=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
try:
    jaxvid.save_model(model, sys.argv[1])
except jaxvid.errors.InputError as error:
    print("error:", error)
"""

LOAD = """
import sys
import jaxvid
try:
    jaxvid.load_model(sys.argv[1])
except jaxvid.errors.InputError as error:
    print("error:", error)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)


def save(folder: Path, seed: int) -> None:
    model = jaxvid.create_model("xvit_tiny", **TINY, seed=seed)
    card = model_card.make_card(
        model.config, preprocessing=None, labels=None, provenance={"top1": float(seed)}
    )
    model_folder.save_model_folder(folder, split_params(model)[1], card)


def load_class_token(folder: Path) -> np.ndarray:
    """Return the class token, which differs between seeds."""
    return np.asarray(jaxvid.load_model(folder).base_model.cls_token[...])


@pytest.fixture
def best(tmp_path):
    """A complete model folder named `best`, as training writes it."""
    save(tmp_path / "best", 3)
    return tmp_path / "best"


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize(
    ("function", "count", "is_new"),
    [
        pytest.param("rename", 0, False, marks=pytest.mark.full),  # before the old is moved away
        ("rename", 1, False),  # the old folder is moved away, the new one is not yet in its place
        ("rmtree", 2, True),  # the new folder is in its place, the old one is not yet deleted
    ],
)
def test_killed_save_leaves_the_old_or_the_new_folder(best, function, count, is_new):
    before = load_class_token(best)
    done = run(INTERRUPTED_SAVE, str(best), function, str(count))
    assert done.returncode == 9, done.stderr
    assert len(list(best.parent.iterdir())) >= 2  # the folder and leftovers of the killed process
    assert (load_class_token(best) == before).all() != is_new
    if not is_new:
        assert model_card.best_score(best.parent, "top1") == 3.0
    save(best, 5)
    assert model_card.best_score(best.parent, "top1") == 5.0
    assert (load_class_token(best) != before).any()
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_partly_deleted_backup_is_not_restored(best):
    shutil.copytree(best, best.parent / ".best.old")
    (best.parent / ".best.old" / "model.json").unlink()  # the file that a deletion removes first
    shutil.rmtree(best)
    assert model_card.best_score(best.parent, "top1") == -1.0
    with pytest.raises(InputError, match="best does not exist; choose"):
        jaxvid.load_model(best)


def test_full_disk_gives_one_line_error_and_keeps_the_old_folder(best):
    before = load_class_token(best)
    # In a separate process, because Orbax's threads continue to log errors.
    done = run(SAVE_ON_FULL_DISK, str(best))
    assert done.stdout.startswith(f"error: {best} cannot be written (")
    assert "File too large" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert (load_class_token(best) == before).all()
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_full_disk_is_detected_before_writing(best, monkeypatch):
    usage = shutil.disk_usage(best)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.delattr(model_folder.ocp, "Checkpointer")  # an attempt to write would raise
    with pytest.raises(InputError, match="best cannot be written .0 MB free, .* needed.; make"):
        save(best, 4)
    with pytest.raises(InputError, match="cannot be written .0 MB free"):
        save(best.parent / "new" / "model", 4)
    assert [path.name for path in best.parent.iterdir()] == ["best"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("No space left on device\nin a kvstore"),
        ExceptionGroup("several", [ValueError("No space left on device"), OSError(5, "x")]),
    ],
)
def test_orbax_errors_for_a_full_disk_become_one_line(best, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(model_folder.ocp.Checkpointer, "save", fail)
    with pytest.raises(
        InputError, match=r"written \(No space left on device\); make"
    ) as error_info:
        save(best, 4)
    assert "\n" not in str(error_info.value)
    assert model_card.best_score(best.parent, "top1") == 3.0


# ------------------------------------------------------------------ damage


def zero_second_half(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(len(data) - middle))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def find_file(folder: Path, name: str) -> Path:
    """Return the file of this name in `params`, or the largest file if `name` is "largest"."""
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    if name == "largest":
        return max(files, key=lambda path: path.stat().st_size)
    return folder / "params" / name


@pytest.mark.parametrize("damage", [zero_second_half, flip_bit])
@pytest.mark.parametrize("name", ["largest", "_METADATA"])
def test_damage_that_keeps_file_sizes_gives_one_line_error(best, damage, name):
    damage(find_file(best, name))
    with pytest.raises(InputError, match="params is damaged: 1 of .* have changed") as error:
        jaxvid.load_model(best)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["largest", "_METADATA"])
def test_folders_without_checksums_load_and_damage_gives_one_line_error(best, name):
    card = json.loads((best / "model.json").read_text())
    del card["checksums"]
    (best / "model.json").write_text(json.dumps(card))
    jaxvid.load_model(best)
    zero_second_half(find_file(best, name))
    done = run(LOAD, str(best))  # in a separate process, because Orbax leaves coroutines behind
    assert done.stdout.startswith(f"error: {best}/params cannot be read (")
    assert len(done.stdout.splitlines()) == 1


def test_newer_format_version_is_refused(best):
    (best / "model.json").write_text('{"format_version": 2, "network": {}}')
    with pytest.raises(InputError, match="has format version 2, but this jaxvid reads 1; update"):
        jaxvid.load_model(best)


def test_too_large_network_is_refused_by_every_reader(best, config, capsys):
    card = json.loads((best / "model.json").read_text())
    card["config"]["depth"] = 10**9
    (best / "model.json").write_text(json.dumps(card))
    message = r"model.json: model xvit_tiny: depth=1000000000: must be 1 to 128; export the model"
    student = make_model_config(**config.model)
    with pytest.raises(InputError, match=message):
        jaxvid.load_model(best)
    with pytest.raises(InputError, match=message):
        model_folder.load_init(best, student, {})
    with pytest.raises(InputError, match=message):
        model_card.check_same_model(model_card.load_card(best), best, student)
    with pytest.raises(InputError, match=message):
        finetune.get_config(f"{best},{config.data.folder}")
    with pytest.raises(InputError, match=message):
        load_teacher(DistillConfig(teacher=str(best)), student, [], None)
    assert flax_to_torch.main(["--input", str(best), "--output", str(best / "a.pth")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_symbolic_links_are_followed(best, tmp_path):
    """Download caches consist of symbolic links."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for i, path in enumerate(p for p in best.rglob("*") if p.is_file()):
        path.rename(cache / str(i))
        path.symlink_to(cache / str(i))
    jaxvid.load_model(best)


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("model_labels", "data_labels"),
    [
        (["run", "sit"], ["run", "sit"]),
        (["Playing_guitar", "sit "], ["playing guitar", "sit"]),
        (None, ["run", "sit"]),
        (["0", "1"], ["run", "sit"]),  # numbers instead of names
        (["run", "sit"], ["0", "1"]),
        ([0, 1], ["run", "sit"]),
        (["1", "0"], ["1", "0"]),
    ],
)
def test_matching_labels_are_accepted(model_labels, data_labels):
    check_labels(model_labels, data_labels, "MODEL")


@pytest.mark.parametrize(
    ("model_labels", "data_labels", "message"),
    [
        (
            ["a", "run", "sit"],
            ["a", "sit", "run"],
            "MODEL .* 1 is 'run' in the model, 'sit' in the data;",
        ),
        (["run", "sit"], ["sit", "run"], "in a different order: .*labels.txt"),
        (["run", "sit"], ["run", "fly"], "1 is 'sit' in the model, 'fly' in the data; choose"),
        (["1", "0"], ["run", "sit"], "0 is '1' in the model, 'run' in the data"),
        (["run", "sit"], ["run"], "MODEL has different classes: 2 in the model, 1 in the data;"),
    ],
)
def test_different_labels_are_refused(model_labels, data_labels, message):
    with pytest.raises(InputError, match=message) as error:
        check_labels(model_labels, data_labels, "MODEL")
    assert "\n" not in str(error.value)
