"""Evaluation of real video files equals the test loops of the original programs."""

import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import stam_16_k400, xvit_k600, xvit_ssv2
from convert.torch_to_flax import released_preprocessing
from jaxvid import evaluate, model_folder
from jaxvid.data.clips import load_eval_views, make_spec
from jaxvid.data.sources import open_folder
from jaxvid.models import abstract_model, make_model_config
from jaxvid.sharding import AXES
from tests import goldens

FOLDER = goldens.FOLDER / "end_to_end"
RECORDED_FRAMES = [0, 7, 15]  # of a clip, in `pixels` (STAM) and `thumbs`
GREY_TOLERANCE, SCORE_TOLERANCE = 0.02, 1e-4  # grey levels; logits
RECIPES = {"stam_16": stam_16_k400, "xvit_k600": xvit_k600, "xvit_ssv2": xvit_ssv2}


def load(name: str) -> dict:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def write_data(name: str, golden: dict, folder: Path) -> str:
    """Lay the videos of a golden out as its original program reads them.

    Returns:
        The `data.source` of that layout.
    """
    folder.mkdir()
    if name == "stam_16":
        for video in golden["listed"]:
            shutil.copy(FOLDER / video, folder)
        lines = "".join(f"{video} {i}\n" for i, video in enumerate(golden["listed"]))
        (folder / "val.csv").write_text(lines)
        (folder / "labels.txt").write_text("".join(f"class {i}\n" for i in range(400)))
        return "folder"
    rows = [
        (str(video), str(video).rpartition("_")[2], str(label))
        for video, label in zip(golden["names"], golden["labels"], strict=True)
    ]
    if name == "xvit_k600":
        (folder / "annotations").mkdir()
        (folder / "val").mkdir()
        for video, *_ in rows:
            shutil.copy(FOLDER / f"{video}.h5", folder / "val")
        text = "".join(f"{','.join(row)}\n" for row in rows)
        (folder / "annotations" / "val.txt").write_text(text)
        return "xvit_h5"
    with h5py.File(folder / "Something-Something-v2-frames.h5", "w") as file:
        for video, *_ in rows:
            with h5py.File(FOLDER / f"{video}.h5") as source:
                source.copy("frames", file, video)
    (folder / "val_videofolder.txt").write_text("".join(f"{' '.join(row)}\n" for row in rows))
    return "xvit_h5"


def open_golden(name: str, tmp_path: Path):
    """A golden, the recipe's config on its videos and of its depth, and its model folder."""
    golden = load(name)
    config = RECIPES[name].get_config().unlock()
    config.data.source = write_data(name, golden, tmp_path / "data")
    config.data.folder = str(tmp_path / "data")
    config.model.update({k: int(golden[k]) for k in ("depth", "temporal_depth") if k in golden})
    model_config = make_model_config(**config.model)
    card = model_folder.make_card(
        model_config,
        preprocessing=released_preprocessing(model_config),
        labels=None,
        provenance={},
    )
    params = goldens.params(abstract_model(model_config)[1], int(golden["seed"]))
    model_folder.save_model_folder(tmp_path / "model", params, card)
    config.init_from = str(tmp_path / "model")
    config.data.num_threads = 2
    config.eval.batch_size = 2
    return golden, config.lock(), tmp_path / "model"


def make_views(config) -> list[dict]:
    """The evaluation views of each video of a config."""
    spec = make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops)
    data = open_folder(config.data, config.model.num_classes, ("val",))
    return [load_eval_views(record, spec) for record in data.records["val"]]


def to_grey(video: np.ndarray) -> np.ndarray:
    """Pixels as float64 grey levels."""
    return video / (256 if video.dtype == np.uint16 else 1)


def make_thumbs(video: np.ndarray) -> np.ndarray:
    """Means of 14 × 14 patches: `(v t h w c)` → `(v t 16 16 c)`."""
    v, t, h, w, c = video.shape
    return video.reshape(v, t, h // 14, 14, w // 14, 14, c).mean(axis=(3, 5))


def run_evaluation(config, workdir: Path, monkeypatch) -> tuple[dict, np.ndarray]:
    """Evaluate as `main.py --mode eval` does.

    Returns:
        `eval.json`, and every video's scores `(n, num_classes)`.
    """
    scores, original = [], evaluate.save_report

    def save_report(folder, result, results, *args):
        scores.append(results.scores)
        original(folder, result, results, *args)

    monkeypatch.setattr(evaluate, "save_report", save_report)
    one_device = jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    monkeypatch.setattr("jaxvid.sharding.make_mesh", lambda _: one_device)
    return evaluate.evaluate(config, workdir), scores[0]


def test_stam_equals_the_original(tmp_path, monkeypatch):
    golden, config, folder = open_golden("stam_16", tmp_path)
    assert load_color_matrix(folder) == "bt601"
    views = make_views(config)
    kept = [golden["listed"].tolist().index(name) for name in golden["names"]]
    assert [bool(view["released"]) for view in views] == [i in kept for i in range(len(views))]
    for row, i in enumerate(kept):
        np.testing.assert_array_equal(views[i]["indices"], golden["indices"][row][None])
        shown = views[i]["video"][0, RECORDED_FRAMES]
        np.testing.assert_array_equal(shown, golden["pixels"][row])
    result, scores = run_evaluation(config, tmp_path / "eval", monkeypatch)
    np.testing.assert_allclose(scores[kept], golden["scores"], rtol=0, atol=SCORE_TOLERANCE)
    order = np.argsort(-golden["scores"], axis=1)
    hits = order == np.array(kept)[:, None]
    assert result["released_subset"] == {
        "num_videos": len(kept),
        "top1": 100 * hits[:, :1].sum() / len(kept),
        "top5": 100 * hits[:, :5].sum() / len(kept),
    }
    assert result["num_videos"] == len(golden["listed"])
    assert result["protocol"]["dtype"] == "float32"
    assert result["protocol"]["color_matrix"] == "bt601"
    page = (tmp_path / "eval" / "eval.html").read_text()
    assert f'"released_subset":{{"num_videos":{len(kept)},' in page


def load_color_matrix(folder: Path) -> str:
    return model_folder.load_card(folder)["preprocessing"]["color_matrix"]


@pytest.mark.parametrize("name", ["xvit_k600", "xvit_ssv2"])
def test_xvit_views_equal_the_original(name, tmp_path):
    golden, config, _ = open_golden(name, tmp_path)
    for row, views in enumerate(make_views(config)):
        indices = np.repeat(views["indices"], 3, axis=0)
        np.testing.assert_array_equal(indices, golden["indices"][row])
        video = to_grey(views["video"])
        thumbs = make_thumbs(video[:, RECORDED_FRAMES])
        np.testing.assert_allclose(thumbs, golden["thumbs"][row], rtol=0, atol=GREY_TOLERANCE)
        if "pixels" in golden:
            pixels = golden["pixels"][row]
            np.testing.assert_allclose(video[:, 7], pixels, rtol=0, atol=GREY_TOLERANCE)


@pytest.mark.parametrize("name", ["xvit_k600", pytest.param("xvit_ssv2", marks=pytest.mark.full)])
def test_xvit_scores_equal_the_original(name, tmp_path, monkeypatch):
    golden, config, _ = open_golden(name, tmp_path)
    result, scores = run_evaluation(config, tmp_path / "eval", monkeypatch)
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=SCORE_TOLERANCE)
    assert result["released_subset"] is None
