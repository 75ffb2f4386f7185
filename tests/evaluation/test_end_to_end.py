"""Evaluation of real video files equals the test loops of the original implementations."""

import io
import math
import shutil
from pathlib import Path

import av
import h5py
import jax
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from PIL import Image
from scipy.special import softmax

from configs import stam_16_k400, xvit_k600, xvit_ssv2
from convert import torch_to_flax
from convert.torch_reference import build_reference
from jaxvid import evaluate
from jaxvid.data.class_names import class_names
from jaxvid.data.clips.clip import load_eval_views
from jaxvid.data.sources import open_dataset
from jaxvid.distributed.sharding import AXES
from jaxvid.experiment import resolve
from jaxvid.models import abstract_model, family_of, make_model_config
from jaxvid.storage import model_card, model_folder
from tests import goldens
from tests.golden.synthetic import synthetic_param

FOLDER = goldens.FOLDER / "end_to_end"
RECORDED_FRAMES = [0, 7, 15]  # frames in the goldens' `pixels` (STAM) and `thumbs` (XViT)
PIXEL_TOLERANCE, SCORE_TOLERANCE = 0.02, 1e-4  # pixels from 0 to 255; logits
RECIPES = {"stam_16": stam_16_k400, "xvit_k600": xvit_k600, "xvit_ssv2": xvit_ssv2}


def load(name: str) -> dict:
    """Return the arrays of an end-to-end golden."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return dict(arrays)


def write_data(name: str, golden: dict, folder: Path) -> str:
    """Write the videos of a golden in the layout that its original implementation reads.

    Returns:
        The matching `data.source`.
    """
    folder.mkdir()
    if name == "stam_16":
        for video in golden["listed"]:
            shutil.copy(FOLDER / video, folder)
        lines = "".join(f"{video} {i}\n" for i, video in enumerate(golden["listed"]))
        (folder / "val.csv").write_text(lines)
        (folder / "labels.txt").write_text("\n".join(class_names("kinetics400")))
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
    """Load a golden, and write its videos and a model folder with its weights.

    Returns:
        The golden's arrays; the config of the recipe, changed to these videos, the golden's depth
        and this model folder; and the model folder.
    """
    golden = load(name)
    config = RECIPES[name].get_config().unlock()
    config.data.source = write_data(name, golden, tmp_path / "data")
    config.data.folder = str(tmp_path / "data")
    config.model.update({k: int(golden[k]) for k in ("depth", "temporal_depth") if k in golden})
    model_config = make_model_config(**config.model)
    card = model_card.make_card(
        model_config,
        preprocessing=family_of(model_config).released_preprocessing(model_config),
        labels=None,
        provenance={},
    )
    params = goldens.params(abstract_model(model_config)[1], int(golden["seed"]))
    model_folder.save_model_folder(tmp_path / "model", params, card)
    config.init_from = str(tmp_path / "model")
    config.data.num_threads = 2
    config.eval.batch_size = 2
    return golden, config.lock(), tmp_path / "model"


def read_frames(path: Path, indices: np.ndarray) -> np.ndarray:
    """Decode frames of an mp4 file, or of an HDF5 file of JPEGs; convert them with BT.601."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            pictures = [Image.open(io.BytesIO(file["frames"][i].tobytes())) for i in indices]
        return np.stack([np.asarray(picture) for picture in pictures])
    with av.open(str(path)) as container:
        frames = dict(enumerate(container.decode(video=0)))
    for frame in frames.values():
        frame.colorspace = 2  # unspecified, for which swscale uses BT.601
    return np.stack([frames[i].to_ndarray(format="rgb24") for i in indices])


def crop_as_stam(frames: np.ndarray) -> torch.Tensor:
    """Apply the same Resize(256) and CenterCrop(224) as torchvision.

    Returns:
        `(t h w c)`, in [0, 1].
    """
    crops = []
    for frame in frames:
        picture = Image.fromarray(frame)
        scale = 256 / min(picture.size)
        picture = picture.resize([int(s * scale) for s in picture.size], Image.Resampling.BILINEAR)
        left, top = (int(round((s - 224) / 2)) for s in picture.size)
        crops.append(np.asarray(picture.crop((left, top, left + 224, top + 224))))
    return torch.from_numpy(np.stack(crops)).float() / 255


def crop_as_xvit(frames: np.ndarray) -> torch.Tensor:
    """Normalise, resize to 224 and take three crops: `(v t h w c)`."""
    video = (torch.from_numpy(frames).float() / 255 - 0.5) / 0.5
    h, w = frames.shape[1:3]
    size = [math.floor(max(h / w, 1) * 224), math.floor(max(w / h, 1) * 224)]
    video = torch.nn.functional.interpolate(
        video.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    middle = [math.ceil((s - 224) / 2) for s in size]
    if w >= h:
        corners = [(middle[0], 0), middle, (middle[0], size[1] - 224)]
    else:
        corners = [(0, middle[1]), middle, (size[0] - 224, middle[1])]
    return torch.stack([video[:, y : y + 224, x : x + 224] for y, x in corners])


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["stam_16", "xvit_k600"])
def test_full_size_probabilities_equal_the_original(name, tmp_path, monkeypatch):
    """Convert full-size weights and evaluate them with their recipe, without further options."""
    golden = load(name)
    reference = build_reference(make_model_config(name))
    shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    state = {
        key: torch.from_numpy(np.array(synthetic_param(key, shape, 3)))
        for key, shape in shapes.items()
    }
    torch.save({"model" if name == "stam_16" else "model_state": state}, tmp_path / "weights.pth")
    arguments = ["--model", name, "--input", str(tmp_path / "weights.pth")]
    assert torch_to_flax.main([*arguments, "--output", str(tmp_path / "model")]) == 0
    reference.load_state_dict(state, strict=True)
    del state

    config = RECIPES[name].get_config().unlock()
    assert config.model.dtype == "bfloat16"  # used in training only
    config.init_from = str(tmp_path / "model")
    config.data.source = write_data(name, golden, tmp_path / "data")
    config.data.folder = str(tmp_path / "data")
    _, scores = run_evaluation(config.lock(), tmp_path / "eval", monkeypatch)
    for row, video in enumerate(golden["names"]):
        path = FOLDER / (video if name == "stam_16" else f"{video}.h5")
        frames = read_frames(path, golden["indices"][row].reshape(-1, 16)[0])
        views = crop_as_stam(frames)[None] if name == "stam_16" else crop_as_xvit(frames)
        with torch.no_grad():
            expected = reference(views).sum(dim=0).numpy()
        i = golden["listed"].tolist().index(video) if name == "stam_16" else row
        ours, theirs = (softmax(np.float64(s) / len(views)) for s in (scores[i], expected))
        print(f"{video}: largest relative difference {np.max(abs(ours - theirs) / theirs):.1e}")
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=0)


def make_views(config) -> list[dict]:
    """Load the evaluation views of each validation video of a config."""
    experiment = resolve(config)
    spec = experiment.preprocessing.spec
    data = open_dataset(experiment.dataset, config.model.num_classes, ("val",))
    return [load_eval_views(record, spec) for record in data.records["val"]]


def to_8bit_scale(video: np.ndarray) -> np.ndarray:
    """Convert uint8 pixels, or uint16 pixels in units of 1/256, to floats from 0 to 255."""
    return video / (256 if video.dtype == np.uint16 else 1)


def make_thumbs(video: np.ndarray) -> np.ndarray:
    """Average 14 × 14 patches: `(v t h w c)` → `(v t 16 16 c)`."""
    v, t, h, w, c = video.shape
    return video.reshape(v, t, h // 14, 14, w // 14, 14, c).mean(axis=(3, 5))


def run_evaluation(config, workdir: Path, monkeypatch) -> tuple[dict, np.ndarray]:
    """Evaluate as `main.py --mode eval` does.

    Returns:
        The evaluation's report, and the scores of all videos `(n, num_classes)`.
    """
    scores, original = [], evaluate.save_report

    def save_report(folder, result, results, *args):
        scores.append(results.scores)
        original(folder, result, results, *args)

    monkeypatch.setattr(evaluate, "save_report", save_report)
    one_device = jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    monkeypatch.setattr("jaxvid.distributed.sharding.make_mesh", lambda _: one_device)
    return evaluate.evaluate(config, workdir), scores[0]


def test_stam_equals_the_original(tmp_path, monkeypatch):
    golden, config, folder = open_golden("stam_16", tmp_path)
    assert load_color_matrix(folder) == "bt601"
    views = make_views(config)
    released = [golden["listed"].tolist().index(name) for name in golden["names"]]
    assert [bool(view["released"]) for view in views] == [i in released for i in range(len(views))]
    for row, i in enumerate(released):
        np.testing.assert_array_equal(views[i]["indices"], golden["indices"][row][None])
        pixels = views[i]["video"][0, RECORDED_FRAMES]
        np.testing.assert_array_equal(pixels, golden["pixels"][row])
    result, scores = run_evaluation(config, tmp_path / "eval", monkeypatch)
    np.testing.assert_allclose(scores[released], golden["scores"], rtol=0, atol=SCORE_TOLERANCE)
    order = np.argsort(-golden["scores"], axis=1)
    hits = order == np.array(released)[:, None]
    assert result["released_subset"] == {
        "num_videos": len(released),
        "top1": 100 * hits[:, :1].sum() / len(released),
        "top5": 100 * hits[:, :5].sum() / len(released),
    }
    assert result["num_videos"] == len(golden["listed"])
    assert result["protocol"]["dtype"] == "float32"
    assert result["protocol"]["color_matrix"] == "bt601"
    page = (tmp_path / "eval" / "eval.html").read_text()
    assert f'"released_subset":{{"num_videos":{len(released)},' in page


def load_color_matrix(folder: Path) -> str:
    """Return the colour matrix in a model card."""
    return model_card.load_card(folder)["preprocessing"]["color_matrix"]


@pytest.mark.parametrize("name", ["xvit_k600", "xvit_ssv2"])
def test_xvit_views_equal_the_original(name, tmp_path):
    golden, config, _ = open_golden(name, tmp_path)
    for row, views in enumerate(make_views(config)):
        indices = np.repeat(views["indices"], 3, axis=0)
        np.testing.assert_array_equal(indices, golden["indices"][row])
        video = to_8bit_scale(views["video"])
        thumbs = make_thumbs(video[:, RECORDED_FRAMES])
        np.testing.assert_allclose(thumbs, golden["thumbs"][row], rtol=0, atol=PIXEL_TOLERANCE)
        if "pixels" in golden:
            pixels = golden["pixels"][row]
            np.testing.assert_allclose(video[:, 7], pixels, rtol=0, atol=PIXEL_TOLERANCE)


@pytest.mark.parametrize("name", ["xvit_k600", pytest.param("xvit_ssv2", marks=pytest.mark.full)])
def test_xvit_scores_equal_the_original(name, tmp_path, monkeypatch):
    golden, config, _ = open_golden(name, tmp_path)
    result, scores = run_evaluation(config, tmp_path / "eval", monkeypatch)
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=SCORE_TOLERANCE)
    assert result["released_subset"] is None
