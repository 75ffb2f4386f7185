"""A third model family, defined only in this file, works with every program.

The programs contain no family names: a `Family` record is all that they need.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxvid
from benchmarks.cost import multiply_adds
from configs import common, finetune
from convert import flax_to_torch, torch_to_flax
from jaxvid import models
from jaxvid.errors import InputError
from jaxvid.evaluate import evaluate
from jaxvid.export import export
from jaxvid.models import counts, family, image_vit
from jaxvid.models.layers import SelfAttention, qkv_linear, record_attention
from jaxvid.storage import model_card, model_folder
from jaxvid.train import train
from jaxvid.training.optim import OptimizerConfig, make_optimizer
from jaxvid.visualize import visualize
from tests.conftest import shrunk_config

# ------------------------------------------------------------------ the family


@dataclasses.dataclass(frozen=True, kw_only=True)
class PooledConfig(image_vit.ImageViTConfig):
    """Config of `PooledViT`; it has no fields of its own."""

    def num_params(self) -> int:
        head = counts.linear_params(self.width, self.num_classes)
        return image_vit.image_vit_params(self) + head


class FrameViT(image_vit.ImageViT):
    """A vision transformer that processes each frame on its own."""

    def __init__(self, cfg: PooledConfig, *, rngs: nnx.Rngs):
        d, linear = cfg.width, functools.partial(nnx.Linear, dtype=cfg.compute_dtype, rngs=rngs)
        self.init_embeddings(cfg, image_vit.normal_init, rngs=rngs)

        def attention(_):
            qkv = qkv_linear(d, image_vit.normal_init, cfg.compute_dtype, rngs=rngs)
            return SelfAttention(cfg.heads, qkv, linear(d, d))

        self.init_blocks(1e-6, linear, attention, rngs=rngs)


class PooledViT(nnx.Module):
    """Classifies the mean of the features of all frames."""

    def __init__(self, config: PooledConfig, *, rngs: nnx.Rngs):
        self.config, self.vit = config, FrameViT(config, rngs=rngs)
        self.fc = nnx.Linear(config.width, config.num_classes, rngs=rngs)

    def frame_features(self, video, *, key=None):
        return self.vit.frame_features(video, key=key)

    def classify(self, frames):
        return self.fc(frames.mean(axis=1))

    def features(self, video):
        frames = self.frame_features(video)
        return {"frames": frames, "video": frames.mean(axis=1)}

    def attention(self, video):
        vit = self.vit
        return {"spatial": record_attention(vit.blocks, vit.embed(video), self.config.heads)[1]}

    def __call__(self, video, *, key=None):
        return self.classify(self.frame_features(video, key=key))


SIZES = {"num_frames": 8, "image_size": 64, "patch_size": 32, "width": 16, "depth": 2, "heads": 2}
FAMILY = family.Family(
    name="pooled",
    title="Pooled ViT",
    config=PooledConfig,
    module=PooledViT,
    presets={"pooled_tiny": PooledConfig(name="pooled_tiny", num_classes=8, **SIZES)},
    image_prefix="vit.",
    head=("fc.",),
    class_heads=("fc.",),
    layer_lists=("blocks",),
    head_counts={"heads": "vit.blocks."},
    tensor_axes=family.BLOCK_TENSOR_AXES,
    multiply_adds=lambda c, attention: image_vit.image_vit_multiply_adds(c, attention=attention),
    released_preprocessing=lambda c: {
        **{"num_frames": c.num_frames, "crop": c.image_size, "short_side": c.image_size},
        **{"sampling": "segments", "mean": 0.5, "std": 0.5},
    },
    torch=family.TorchFormat(marker="vit."),
    shares_frames=True,
)

# ------------------------------------------------------------------ the programs


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """Register the family and its presets during the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.FAMILIES, FAMILY.name, FAMILY)
        for name, config in FAMILY.presets.items():
            patch.setitem(models.PRESETS, name, config)
        yield


@pytest.fixture(scope="module")
def run(motion_folder, tmp_path_factory):
    """Return the config and workdir of a run of one epoch, sharded over every mesh axis."""
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.model = common.default_config("pooled_tiny").model
    config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    config.optimizer.warmup_epochs = 1 / 3
    workdir = tmp_path_factory.mktemp("pooled") / "run"
    assert train(config.lock(), workdir)["num_videos"] == 24
    return config, workdir


def load_weights(folder) -> dict[str, np.ndarray]:
    """Return the weights of a model folder by name."""
    _, params = models.split_params(jaxvid.load_model(folder))
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def test_evaluation_reproduces_the_accuracy_of_training(run, tmp_path):
    config, workdir = run
    config = config.copy_and_resolve_references().unlock()
    config.init_from = str(workdir / "best")
    result = evaluate(config.lock(), tmp_path)
    assert result["num_videos"] == 24
    assert result["top1"] == model_card.best_score(workdir, "top1")


def test_conversion_to_pytorch_and_back_is_bit_identical(run, tmp_path, capsys):
    folder, file = run[1] / "best", tmp_path / "pooled.pth"
    assert flax_to_torch.main(["--input", str(folder), "--output", str(file)]) == 0
    arguments = ["--model", "pooled_tiny", "--input", str(file), "--output", str(tmp_path / "back")]
    assert torch_to_flax.main(arguments) == 0
    weights, converted = load_weights(folder), load_weights(tmp_path / "back")
    assert weights.keys() == converted.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(converted[name], array, err_msg=name)
    assert jaxvid.load_model(tmp_path / "back").config == jaxvid.load_model(folder).config
    assert torch_to_flax.main([*arguments, "--check"]) == InputError.EXIT_CODE
    assert "the family pooled has no PyTorch reference" in capsys.readouterr().err


def test_fine_tuning_with_a_frozen_backbone_changes_only_the_head(run, motion_folder, tmp_path):
    folder = run[1] / "best"
    config = finetune.get_config(f"{folder},{motion_folder}").unlock()
    assert (config.model.name, config.model.num_classes) == ("pooled_tiny", 8)
    config.optimizer.update(freeze="backbone", layer_decay=0.5, warmup_epochs=0.0)
    config.update(num_epochs=1 / 6)
    config.model.dtype = "float32"  # compiles faster
    train(config.lock(), tmp_path / "run")
    before, after = load_weights(folder), load_weights(tmp_path / "run" / "best")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"fc.kernel", "fc.bias"}


def test_layer_decay_scales_each_block():
    settings = OptimizerConfig(name="sgd", learning_rate=1.0, layer_decay=0.5, momentum=0.0)
    config = models.make_model_config("pooled_tiny")
    params = {name: np.ones((), np.float32) for name in models.abstract_model(config)[1]}
    optimizer = make_optimizer(settings, lambda _: 1.0, models.family_of(config))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    scales = {"vit.pos_embed": 0.125, "vit.blocks.0.norm1.scale": 0.25, "vit.norm.scale": 1.0}
    for name, scale in {**scales, "vit.blocks.1.mlp.fc1.kernel": 0.5, "fc.kernel": 1.0}.items():
        assert -updates[name] == pytest.approx(scale), name


def test_weights_initialise_a_model_with_different_classes_and_resolution(run):
    config = models.make_model_config("pooled_tiny", num_classes=3, image_size=96)
    abstract = models.abstract_model(config)[1]
    fresh = {name: jnp.zeros(leaf.shape) for name, leaf in abstract.items()}
    _, lines = model_folder.load_init(run[1] / "best", config, fresh)
    assert lines[1:] == [
        "resized: vit.pos_embed: 2×2 → 3×3 patches, bicubically",
        "reinitialised: fc: 8 classes in the folder, 3 in the model (2 weights)",
    ]
    with pytest.raises(InputError, match="of the family Pooled ViT; xvit_tiny is of the family X"):
        model_folder.load_init(run[1] / "best", models.make_model_config("xvit_tiny"), fresh)


def test_prediction_export_and_visualisation(run, clips, tmp_path):
    folder = run[1] / "best"
    classifier = jaxvid.Classifier(folder)
    [prediction] = classifier.predict(clips[:1])
    assert (prediction.error, len(prediction.labels)) == ("", 5)
    timeline = classifier.windows(clips[0], window=0.5, stride=0.25)  # windows share frames
    np.testing.assert_allclose(timeline.probabilities.sum(axis=1), 1, rtol=1e-5)
    metadata = export(folder, tmp_path / "pooled.safetensors", "safetensors")
    weights = load_file(tmp_path / "pooled.safetensors")
    assert metadata["weights"].keys() == weights.keys() == load_weights(folder).keys()
    visualize(clips[0], folder, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_num_params_equals_the_built_network():
    config = models.make_model_config("pooled_tiny")
    _, params = models.abstract_model(config)
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert multiply_adds(config, attention=False) < multiply_adds(config)
