"""Models by name: downloads, own files, URLs, the cache, and names that do not exist."""

import concurrent.futures
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxvid
from configs import finetune
from jaxvid import check_labels, download, export, predict, visualize
from jaxvid.errors import InputError
from jaxvid.models import PRESETS, make_model_config, split_params, stam
from jaxvid.storage import model_card, model_folder
from jaxvid.training.distillation import DistillConfig, load_teacher
from jaxvid.training.initial_state import make_initial_state
from jaxvid.weights import cache
from jaxvid.weights.resolve import load_model, resolve_model
from tests.convert.hostile_checkpoints import MODEL, make_state, members, shrink_preset, write_zip
from tests.weights.server import serve

PATH = f"/zoo/{MODEL}.pth"
PAGE = b"<html>Please log in</html>"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Make a tiny preset, and an empty cache in an empty working directory; return the latter."""
    monkeypatch.setitem(PRESETS, MODEL, PRESETS[MODEL])
    shrink_preset()
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXVID_WEIGHTS", raising=False)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.01)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    """Return the authors' file for the tiny preset."""
    path = tmp_path_factory.mktemp("checkpoint") / "a.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, MODEL, PRESETS[MODEL])
        shrink_preset()
        write_zip(path, members())
    return path.read_bytes()


@pytest.fixture
def server(monkeypatch, checkpoint):
    """Serve the authors' file at the address in the family record."""
    with serve(files={PATH: checkpoint}) as server:
        monkeypatch.setitem(stam.FAMILY.released_weights, MODEL, f"{server.url}{PATH}")
        yield server


def refusal_of(function, *args, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*args, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def slot_files(name: str = MODEL) -> list[str]:
    return sorted(os.listdir(cache.Slot(name).folder))


# ------------------------------------------------------------------ released weights


def test_weights_are_downloaded_once_by_name(server, checkpoint, capsys):
    model = load_model(MODEL, pretrained=True)
    weights = split_params(model)[1]
    expected = make_state()["blocks.0.attn.proj.weight"].T
    np.testing.assert_array_equal(weights["blocks.0.attn.proj.kernel"], expected)
    digest = hashlib.sha256(checkpoint).hexdigest()
    assert f"SHA-256 {digest}, converted to" in capsys.readouterr().err
    assert slot_files() == ["model", "source.sha256"]
    folder = resolve_model(MODEL)
    assert (folder.parent / "source.sha256").read_text() == f"{digest}  {MODEL}.pth\n"
    provenance = model_card.load_card(folder)["provenance"]
    assert (provenance["sha256"], provenance["url"]) == (digest, f"{server.url}{PATH}")
    assert jaxvid.load_model(MODEL).config.num_frames == 8
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""


def test_a_folder_with_the_name_of_a_preset_wins(server, folder):
    (folder / MODEL).mkdir()
    (folder / MODEL / "model.json").write_text("{}")
    assert resolve_model(MODEL) == MODEL
    assert f"{MODEL}/model.json cannot be read" in refusal_of(load_model, MODEL)
    assert load_model(MODEL, pretrained=True).config.name == MODEL


def test_a_changed_file_is_refused_and_deleted(server, checkpoint):
    shutil.rmtree(resolve_model(MODEL))
    assert resolve_model(MODEL).exists()  # the same file again
    shutil.rmtree(resolve_model(MODEL))
    server.files[PATH] = checkpoint + b"\0"
    message = refusal_of(resolve_model, MODEL)
    assert "which is not that of the first download in" in message
    assert slot_files() == ["source.sha256"]
    (cache.Slot(MODEL).record).unlink()
    server.files[PATH] = checkpoint
    assert resolve_model(MODEL).exists()


@pytest.mark.parametrize("contents", [PAGE, b"", b"half"], ids=["page", "empty", "text"])
def test_a_file_that_is_no_checkpoint_is_deleted(server, contents, folder):
    server.files[PATH] = contents
    message = refusal_of(resolve_model, MODEL)
    assert message.startswith(f"{server.url}{PATH} cannot be used: ")
    assert "cannot be read as a PyTorch checkpoint" in message
    assert message.endswith(f"set JAXVID_WEIGHTS to the folder that contains {MODEL}.pth")
    assert slot_files() == []


def test_a_missing_file_may_be_provided_by_hand(server, checkpoint, tmp_path, monkeypatch):
    server.status = 404
    message = refusal_of(resolve_model, MODEL)
    assert f"{PATH} cannot be downloaded (the server answered 404 Not Found)" in message
    assert message.endswith(f"set JAXVID_WEIGHTS to the folder that contains {MODEL}.pth")
    monkeypatch.setenv("JAXVID_WEIGHTS", str(tmp_path / "own"))
    assert "own: is not a folder" in refusal_of(resolve_model, MODEL)
    (tmp_path / "own").mkdir()
    assert "404 Not Found" in refusal_of(resolve_model, MODEL)
    (tmp_path / "own" / f"{MODEL}.pth").write_bytes(checkpoint)
    assert resolve_model(MODEL).exists()
    assert (tmp_path / "own" / f"{MODEL}.pth").exists()


def test_concurrent_calls_download_once(server, capsys):
    server.pause = 0.05
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = [job.result() for job in [pool.submit(resolve_model, MODEL) for _ in range(3)]]
    assert {*folders} == {cache.Slot(MODEL).model}
    assert len(server.requests) == 1
    # The name of the process is unknown for a moment after it has taken the lock.
    assert re.search(
        rf"{MODEL}: waiting for (process {os.getpid()}|another process)", capsys.readouterr().err
    )


def test_a_cache_that_cannot_be_written_is_reported(server, monkeypatch):
    monkeypatch.setenv("JAXVID_CACHE", "/proc/cache")
    message = refusal_of(resolve_model, MODEL)
    assert message.startswith(f"/proc/cache/weights/{MODEL} cannot be written (")
    assert message.endswith("; set JAXVID_CACHE to another folder")


def test_a_full_cache_is_only_read(server, monkeypatch):
    resolve_model(MODEL)
    monkeypatch.setattr(cache.Slot, "_lock", lambda *_: pytest.fail("the cache is written"))
    assert load_model(MODEL).config.num_classes == 5


def test_the_authors_file_must_fit_the_preset(server, monkeypatch):
    monkeypatch.setitem(PRESETS, MODEL, make_model_config(MODEL, num_classes=4))
    assert "num_classes is 5 in head.weight but 4" in refusal_of(resolve_model, MODEL)
    assert slot_files() == [f"{MODEL}.pth"]  # it is intact, and not downloaded again


# ------------------------------------------------------------------ own checkpoints


def test_a_url_is_downloaded_and_its_preset_inferred(server):
    url = f"{server.url}{PATH}?version=2"
    server.files[f"{PATH}?version=2"] = server.files[PATH]
    assert load_model(url).config.name == MODEL
    assert load_model(url).config.name == MODEL
    assert len(server.requests) == 1


def test_a_url_with_a_wrong_preset_is_kept(server):
    url = f"{server.url}{PATH}"
    assert "is of the family xvit" in refusal_of(load_model, url, preset="xvit_tiny")
    assert "does not exist; expected one of" in refusal_of(load_model, url, preset="stam_9")
    assert load_model(url, preset=MODEL).config.name == MODEL
    assert len(server.requests) == 1


def test_a_file_may_have_other_classes_than_its_preset(checkpoint, folder, monkeypatch):
    (folder / "own.pth").write_bytes(checkpoint)
    monkeypatch.setitem(PRESETS, MODEL, make_model_config(MODEL, num_classes=4))
    message = refusal_of(load_model, "own.pth")
    assert "num_classes=5" in message
    assert message.endswith("convert the file with jaxvid convert --model PRESET")
    model = load_model("own.pth", preset=MODEL)
    assert model.config.num_classes == 5
    assert resolve_model("own.pth", preset=MODEL) == resolve_model(folder / "own.pth", preset=MODEL)


def test_a_file_is_converted_again_when_it_has_changed(checkpoint, folder):
    (folder / "own.pth").write_bytes(checkpoint)
    first = resolve_model("own.pth")
    (folder / "own.pth").write_bytes(checkpoint + b"\0")
    assert resolve_model("own.pth") != first


@pytest.mark.full
def test_a_child_process_converts_like_this_process(folder):
    model = jaxvid.create_model("xvit_tiny")
    jaxvid.save_model(model, folder / "model")
    from convert import flax_to_torch

    assert flax_to_torch.main(["--input", "model", "--output", "own.pth"]) == 0
    options = {"preset": "xvit_tiny"}
    path = resolve_model("own.pth", isolated=True, **options)
    params = split_params(model_folder.load_model(path))[1]
    assert model_folder.fingerprint(params) == model_folder.fingerprint(split_params(model)[1])
    (folder / "bad.pth").write_bytes(PAGE)
    assert "it is a web page" in refusal_of(resolve_model, "bad.pth", isolated=True, **options)


# ------------------------------------------------------------------ names


def test_unknown_names_are_explained(folder):
    (folder / "runs" / "motion" / "model").mkdir(parents=True)
    (folder / "runs" / "motion" / "model" / "model.json").touch()
    for name, hint in (
        ("stam_15", "stam_15 does not exist; did you mean stam_16?"),
        ("runs/motoin/model", "did you mean runs/motion/model?"),
        ("runs/motion", "did you mean runs/motion/model?"),
        ("nowhere", "choose a folder written by training or by a converter, or one of stam_8, "),
        ("xvit_k400", "xvit_k400 has no released weights; train it"),
        ("hf://user", "expected hf://USER/REPO"),
    ):
        assert hint in refusal_of(resolve_model, name)
    assert "xvit_tiny has no released" in refusal_of(load_model, "xvit_tiny", pretrained=True)
    assert "omit the preset" in refusal_of(load_model, "runs/motion/model", preset="xvit_tiny")


NEAR = "did you mean stam_16?"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (predict, ["clip.mp4"]),
        (visualize, ["clip.mp4", "--output=a.png"]),
        (export, ["--output=a.safetensors", "--format=safetensors"]),
        (check_labels, ["--videos=videos"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_programs_explain_unknown_names(program, arguments, capsys):
    Path("clip.mp4").touch()
    assert program.main([*arguments, "--model=stam_15"]) == 2
    assert capsys.readouterr().err == f"error: stam_15 does not exist; {NEAR}\n"


def test_training_explains_unknown_names():
    student = PRESETS["stam_tiny"]
    assert NEAR in refusal_of(make_initial_state, None, student, seed=0, init_from="stam_15")
    teacher = DistillConfig(teacher="stam_15", weight=0.5, temperature=1.0)
    assert NEAR in refusal_of(load_teacher, teacher, student, [], None)
    assert NEAR in refusal_of(finetune.get_config, "stam_15,videos")


def test_download_prints_the_folders(server, capsys):
    assert download.main([MODEL, MODEL]) == 0
    assert capsys.readouterr().out == f"{cache.Slot(MODEL).model}\n" * 2
    assert download.main(["nowhere"]) == 2


def test_a_name_is_used_for_predictions(server, motion_folder, capsys):
    video = str(motion_folder / "val" / "00000.mp4")
    assert predict.main([video, f"--model={MODEL}", "--top_k=1"]) == 0
    assert "%" in capsys.readouterr().out
