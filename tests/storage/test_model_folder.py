"""Model folders: interrupted saves, full disks, damaged files, classes."""

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
SAVE = """
import os, pathlib, shutil, sys
import jaxvid
folder, at, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = jaxvid.create_model("xvit_tiny", width=16, depth=1, image_size=32, seed=4)
owner = shutil if at == "rmtree" else pathlib.Path
plain = getattr(owner, at)

def call(path, *arguments, **options):
    global count
    if pathlib.Path(path).parent == pathlib.Path(folder).parent:
        count -= 1
        if count < 0:
            os._exit(9)
    return plain(path, *arguments, **options)

setattr(owner, at, call)
jaxvid.save_model(model, folder)
"""

FULL_DISK = """
import resource, sys
import jaxvid
model = jaxvid.create_model("xvit_tiny", width=16, depth=1, image_size=32, seed=4)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))  # no file may be larger
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


def bias(folder: Path) -> np.ndarray:
    """Return a weight that differs between seeds."""
    return np.asarray(jaxvid.load_model(folder).base_model.cls_token[...])


@pytest.fixture
def best(tmp_path):
    """A complete model folder, `best` of a run."""
    save(tmp_path / "best", 3)
    return tmp_path / "best"


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize(
    ("at", "count", "is_new"),
    [
        ("rename", 0, False),  # complete, but not yet in place
        ("rename", 1, False),  # the old one is moved away, the new one not yet in place
        ("rmtree", 2, True),  # the new one is in place, the old one not yet deleted
    ],
)
def test_killed_save_leaves_the_old_or_the_new_folder(best, at, count, is_new):
    before = bias(best)
    done = run(SAVE, str(best), at, str(count))
    assert done.returncode == 9, done.stderr
    assert len(list(best.parent.iterdir())) >= 2  # leftovers of the killed process
    assert (bias(best) == before).all() != is_new
    if not is_new:
        assert model_card.best_top1(best.parent) == 3.0
    save(best, 5)
    assert model_card.best_top1(best.parent) == 5.0
    assert (bias(best) != before).any()
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_half_deleted_backup_is_not_restored(best):
    shutil.copytree(best, best.parent / ".best.old")
    (best.parent / ".best.old" / "model.json").unlink()  # deleted first
    shutil.rmtree(best)
    assert model_card.best_top1(best.parent) == -1.0
    with pytest.raises(InputError, match="best is not a model folder"):
        jaxvid.load_model(best)


def test_full_disk_gives_one_line_error_and_keeps_the_old_folder(best):
    before = bias(best)
    # In a process of its own, as Orbax leaves threads behind that keep logging errors.
    done = run(FULL_DISK, str(best))
    assert done.stdout.startswith(f"error: {best} cannot be written (")
    assert "File too large" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert (bias(best) == before).all()
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_full_disk_is_detected_before_writing(best, monkeypatch):
    usage = shutil.disk_usage(best)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.delattr(model_folder.ocp, "Checkpointer")
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
    assert model_card.best_top1(best.parent) == 3.0


# ------------------------------------------------------------------ damage


def zero_half(path: Path) -> None:
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] + bytes(len(data) - half))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def find_file(folder: Path, which: str) -> Path:
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    if which == "largest":
        return max(files, key=lambda path: path.stat().st_size)
    return folder / "params" / which


@pytest.mark.parametrize("damage", [zero_half, flip])
@pytest.mark.parametrize("which", ["largest", "_METADATA"])
def test_damage_that_keeps_file_sizes_gives_one_line_error(best, damage, which):
    damage(find_file(best, which))
    with pytest.raises(InputError, match="params is damaged: 1 of .* have changed") as error:
        jaxvid.load_model(best)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("which", ["largest", "_METADATA"])
def test_folders_without_checksums_load_and_damage_gives_one_line_error(best, which):
    card = json.loads((best / "model.json").read_text())
    del card["checksums"]
    (best / "model.json").write_text(json.dumps(card))
    jaxvid.load_model(best)
    zero_half(find_file(best, which))
    done = run(LOAD, str(best))  # in its own process, as Orbax leaves coroutines behind
    assert done.stdout.startswith(f"error: {best}/params cannot be read (")
    assert len(done.stdout.splitlines()) == 1


def test_newer_format_version_is_refused(best):
    (best / "model.json").write_text('{"format_version": 2, "network": {}}')
    with pytest.raises(InputError, match="has format version 2, but this jaxvid reads 1; update"):
        jaxvid.load_model(best)


def test_huge_network_is_refused_by_every_reader(best, config, capsys):
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
        model_card.check_same_model(best, student)
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


# ------------------------------------------------------------------ classes


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
def test_equal_classes_are_accepted(model_labels, data_labels):
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
def test_different_classes_are_refused(model_labels, data_labels, message):
    with pytest.raises(InputError, match=message) as error:
        check_labels(model_labels, data_labels, "MODEL")
    assert "\n" not in str(error.value)
