"""Every config and its model can be built. Shrunk configs train for two steps and evaluate."""

import importlib
import json
from pathlib import Path

import pytest

import jaxvid
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from jaxvid.models import PRESETS, abstract_model, family_of, make_model_config
from jaxvid.storage.preprocessing import Preprocessing
from jaxvid.train import train

ROOT = Path(__file__).parents[1]
# Config → variants to test; `finetune` has its own test, and `common` is not a config.
VARIANTS = {"motion": ("", "blind", "stam"), "common": (), "finetune": ()}
VARIANTS |= dict.fromkeys(("xvit_k400", "xvit_k600", "xvit_ssv2"), ("released", "paper"))
VARIANTS["stam_k400"] = ("8", "16", "32", "64")
CONFIGS = [
    (path.stem, variant)
    for path in sorted((ROOT / "configs").glob("*.py"))
    for variant in VARIANTS.get(path.stem, ("",))
]


def get_config(name: str, variant: str):
    module = importlib.import_module(f"configs.{name}")
    return module, module.get_config(variant) if variant else module.get_config()


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_configs_are_complete_and_locked(name, variant):
    module, config = get_config(name, variant)
    assert f"configs/{name}.py" in module.__doc__  # the docstring contains the command
    assert config.is_locked
    with pytest.raises(AttributeError, match="locked"):
        config.batch = 1
    _, params = abstract_model(make_model_config(**config.model))
    assert params
    config.model.num_classes = 5
    assert make_model_config(**config.model).num_classes == 5


def shrink(config, folder):
    """Shrink a config to a network of one block and two steps of 8 motion clips."""
    config = config.copy_and_resolve_references().unlock()
    small = {"num_classes": 8, "width": 16, "depth": 1, "heads": 2, "image_size": 32}
    small |= {"temporal_heads": 2, "temporal_depth": 1, "temporal_mlp": 16}
    config.model.update({name: size for name, size in small.items() if name in config.model})
    config.data.update(source="folder", folder=str(folder), short_side=36, num_threads=2)
    config.data.short_side_max = min(config.data.short_side_max, 40)
    config.eval.update(short_side=36, batch_size=8, every_epochs=1.0)
    config.update(batch_size=8, num_epochs=2 / 6, log_steps=1)
    config.optimizer.warmup_epochs = 1 / 6
    return config.lock()


# Shrunk, these have the sizes of another config.
SAME_SHRUNK = [("stam_k400", frames) for frames in ("16", "32", "64")]
SAME_SHRUNK += [("xvit_k400", "released"), ("xvit_k400", "paper"), ("xvit_k600", "paper")]
SAME_SHRUNK += [("stam_16_k400", "")]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(*config, marks=pytest.mark.full if config in SAME_SHRUNK else ())
        for config in CONFIGS
        if config[0] != "motion"
    ],
)
def test_shrunk_recipes_train_and_evaluate(name, variant, motion_folder, tmp_path):
    _, config = get_config(name, variant)
    result = train(shrink(config, motion_folder), tmp_path)
    assert result["num_videos"] == 24
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]


@pytest.mark.parametrize(
    ("name", "variant", "learning_rate", "weight_decay", "smoothing", "mixup", "erase"),
    [
        ("xvit_k400", "", 0.03, 1e-5, 0.3, 0.4, 0.0),
        ("xvit_k600", "", 0.03, 1e-5, 0.3, 0.4, 0.0),
        ("xvit_ssv2", "", 0.03, 1e-4, 0.0, 0.0, 0.5),
        ("stam_k400", "8", 1e-5, 1e-3, 0.0, 0.0, 0.0),
        ("stam_16_k400", "", 1e-5, 1e-3, 0.0, 0.0, 0.0),
        ("stam_k400", "64", 2.5e-6, 1e-3, 0.0, 0.0, 0.0),
    ],
)
def test_recipes_have_the_released_values(
    name, variant, learning_rate, weight_decay, smoothing, mixup, erase
):
    _, config = get_config(name, variant)
    optimizer = config.optimizer
    actual = (optimizer.learning_rate, optimizer.weight_decay, config.label_smoothing)
    assert actual == (learning_rate, weight_decay, smoothing)
    assert (config.mixup_alpha, config.erase_prob) == (mixup, erase)
    xvit = name.startswith("xvit")
    assert (optimizer.name, config.data.augment) == (
        ("sgd", "autoaugment") if xvit else ("adamw", "")
    )
    assert bool(config.ema_decay) != xvit
    assert config.batch_size == optimizer.reference_batch_size


def test_finetune_reads_its_model_and_data(motion_folder, folders, tmp_path):
    get = importlib.import_module("configs.finetune").get_config
    model = jaxvid.create_model("xvit_tiny", num_classes=3, width=16, depth=1)
    preprocessing = {
        "sampling": "dense_stride",
        "sampling_rate": 2,
        "resize": "torch_bilinear",
        "mean": [0.4, 0.4, 0.5],
        "std": 0.2,
    }
    preprocessing |= {"short_side": 72, "num_frames": 8, "crop": 64}
    jaxvid.save_model(model, tmp_path / "model", preprocessing=preprocessing)
    config = get(f"{tmp_path / 'model'},{motion_folder}").unlock()
    assert (config.model.num_classes, config.model.width, config.data.std) == (8, 16, 0.2)
    assert config.data.mean == [0.4, 0.4, 0.5]
    assert (config.data.source, config.data.sampling) == ("folder", "dense_stride")
    assert (config.data.short_side, config.data.short_side_max) == (73, 91)
    assert (config.eval.short_side, config.eval.num_clips, config.eval.num_crops) == (72, 1, 1)
    config.update(num_epochs=2 / 6)
    config.optimizer.warmup_epochs = 1 / 6
    train(config.lock(), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "chosen for an epoch of 48 clips: batch_size=8, log_steps=1, eval.every" in log
    assert "reinitialised: consensus.mlp_head.4: 3 classes in the folder, 8 in the model" in log
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert (card["preprocessing"]["mean"], card["preprocessing"]["std"]) == ([0.4, 0.4, 0.5], 0.2)
    # The preprocessing of this folder has no sampling_rate, resize or by_time.
    older = get(f"{folders / 'stam'},{motion_folder}")
    assert (older.data.sampling, older.data.sampling_rate, older.data.by_time) == (
        "uniform_10s",
        16,
        0,
    )
    jaxvid.save_model(model, tmp_path / "bare")
    for folders_argument, message in {
        "": "--config configs/finetune.py:MODEL,DATA_FOLDER",
        f"{tmp_path},{motion_folder}": "is not a model folder",
        f"{tmp_path / 'bare'},{motion_folder}": "preprocessing is missing",
        f"{tmp_path / 'model'},{tmp_path}": "unknown layout; expected train.csv",
    }.items():
        with pytest.raises((ValueError, InputError), match=message):
            get(folders_argument)


def test_finetune_divides_data_without_validation_videos(folders, motion_folder, tmp_path):
    get = importlib.import_module("configs.finetune").get_config
    assert get(f"{folders / 'xvit'},{motion_folder}").data.val_share == 0
    for name in ("run", "walk"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.mp4").write_text(name)
    config = get(f"{folders / 'xvit'},{tmp_path}")
    assert (config.data.source, config.data.list) == ("class_folders", "")
    (tmp_path / "all.csv").write_text("run/1.mp4,run\n")
    listed = get(f"{folders / 'xvit'},{tmp_path / 'all.csv'}")
    assert (listed.data.source, listed.data.list) == ("folder", str(tmp_path / "all.csv"))
    for data, num_classes in ((config, 2), (listed, 1)):
        assert (data.data.folder, data.data.val_share) == (str(tmp_path), 0.2)
        assert data.model.num_classes == num_classes


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("_tiny")])
def test_released_preprocessing_equals_that_of_the_config(name):
    stam = name.startswith("stam")
    _, config = get_config("stam_k400" if stam else name, name.rpartition("_")[2] if stam else "")
    model_config = make_model_config(name)
    released = family_of(model_config).released_preprocessing(model_config)
    released = Preprocessing.from_json(released)
    assert released == resolve(config).with_color_matrix(released.color_matrix).preprocessing


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="motion.py:fast: must be '', 'blind' or 'stam'"):
        importlib.import_module("configs.motion").get_config("fast")
    with pytest.raises(ValueError, match="xvit_k400.py:fast: must be 'released' or 'paper'"):
        importlib.import_module("configs.xvit_k400").get_config("fast")


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_clips_are_flipped_unless_classes_depend_on_direction(name, variant):
    _, config = get_config(name, variant)
    assert config.data.flip_prob == (0.0 if name in ("motion", "xvit_ssv2") else 0.5)
