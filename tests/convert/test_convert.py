"""Conversion between PyTorch checkpoints and model folders."""

import dataclasses
import io
import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
import torch

import jaxvid
from configs import finetune
from convert import flax_to_torch, torch_to_flax
from convert.torch_reference import ImageViT, build_reference
from jaxvid import atomic
from jaxvid.data.class_names import class_names
from jaxvid.errors import InputError
from jaxvid.models import PRESETS, make_model_config, split_params
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.preprocessing import Preprocessing
from jaxvid.train import train
from jaxvid.weights import rules
from jaxvid.weights.conversion import sha256
from jaxvid.weights.weight_files import open_weights
from tests import goldens
from tests.golden.synthetic import synthetic_param
from tests.models.test_stam import config_of as stam_config_of
from tests.models.test_xvit import config_of as xvit_config_of

TINY = {"width": 48, "depth": 2, "heads": 4, "image_size": 32}
RELEASED = [name for name in PRESETS if not name.endswith("_tiny")]


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    """Replace the released presets by tiny models of the same structure."""
    for name in RELEASED:
        sizes = TINY | ({"temporal_depth": 2} if name.startswith("stam") else {})
        monkeypatch.setitem(PRESETS, name, make_model_config(name, **sizes))


def state_dict(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return synthetic weights under the names of a released checkpoint."""
    reference = build_reference(make_model_config(name))
    return {
        key: torch.from_numpy(np.array(synthetic_param(key, tuple(value.shape), seed)))
        for key, value in reference.state_dict().items()
    }


def save(path, name: str, state: dict):
    """Save a state_dict as the original implementation of the model does."""
    if name.startswith("stam"):
        torch.save({"model": state}, path)
    else:
        torch.save(
            {"epoch": 3, "model_state": state, "optimizer_state": {"a": 1}, "cfg": "x"}, path
        )
    return path


def convert(name, path, folder, *flags) -> int:
    arguments = ["--model", name, "--input", str(path), "--output", str(folder), *flags]
    return torch_to_flax.main(arguments)


def refusal_of(name, path, tmp_path, capsys, *flags) -> str:
    """Assert that a conversion is refused, and return the error message."""
    assert convert(name, path, tmp_path / "refused", *flags) == InputError.EXIT_CODE
    assert not [p for p in tmp_path.iterdir() if "refused" in p.name]
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


# The others differ from these in the number of frames or classes only.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("stam_8", "xvit_k400", "xvit_ssv2") else pytest.mark.full
        )
        for name in RELEASED
    ],
)
def test_round_trips_are_bit_identical(name, tmp_path, capsys):
    state = state_dict(name)
    path = save(tmp_path / "in.pth", name, state)
    assert convert(name, path, tmp_path / "model", "--check") == 0
    assert "compared with PyTorch" in capsys.readouterr().out
    output = str(tmp_path / "out.pth")
    assert flax_to_torch.main(["--input", str(tmp_path / "model"), "--output", output]) == 0
    tree = torch.load(output, weights_only=True)
    converted = tree["model" if name.startswith("stam") else "model_state"]
    build_reference(make_model_config(name)).load_state_dict(converted, strict=True)
    assert converted.keys() == state.keys()
    for key, tensor in state.items():  # XViT never uses `new_fc`, which is not converted
        expected = torch.zeros_like(tensor) if key.startswith("new_fc.") else tensor
        assert torch.equal(converted[key], expected), key
    assert convert(name, output, tmp_path / "model2") == 0
    first, second = (split_params(jaxvid.load_model(tmp_path / f))[1] for f in ("model", "model2"))
    assert model_folder.fingerprint(first) == model_folder.fingerprint(second)
    card = model_card.load_card(tmp_path / "model")
    assert card["provenance"]["sha256"] == sha256(path)
    assert card["name"] == name


@pytest.mark.parametrize("name", ["xvit_tiny_k600", "xvit_tiny_256px", "stam_tiny_4f"])
def test_the_torch_reference_equals_the_original(name):
    golden = goldens.load(f"tiny/{name}")
    config = (stam_config_of if name.startswith("stam") else xvit_config_of)(golden)
    for fused in (False, True):
        reference = build_reference(config, fused=fused)
        seed = int(golden["param_seed"])
        assert sorted([k, list(v.shape)] for k, v in reference.state_dict().items()) == sorted(
            golden["manifest"]
        )
        state = {
            key: torch.from_numpy(np.array(synthetic_param(key, tuple(shape), seed)))
            for key, shape in golden["manifest"]
        }
        reference.load_state_dict(state, strict=True)
        with torch.no_grad():
            logits = reference(torch.from_numpy(golden["clip"]))
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)


def test_ddp_prefixes_and_half_precision_are_read_exactly(tmp_path):
    state = state_dict("xvit_k400")
    saved = {f"module.{key}": value.half() for key, value in state.items()}
    path = save(tmp_path / "in.pth", "xvit_k400", saved)
    assert convert("xvit_k400", path, tmp_path / "model") == 0
    params = split_params(jaxvid.load_model(tmp_path / "model"))[1]
    key = "base_model.blocks.0.attn.qkv"
    kernel = state[f"{key}.weight"].half().float().T.reshape(48, 3, 48)
    np.testing.assert_array_equal(params[f"{key}.kernel"], kernel)


def test_first_version_stam_files_get_zero_biases(tmp_path, capsys):
    state = {k: v for k, v in state_dict("stam_16").items() if not k.endswith("attn.qkv.bias")}
    path = save(tmp_path / "v1.pth", "stam_16", state)
    assert convert("stam_16", path, tmp_path / "model", "--check") == 0
    assert (
        "zeros: blocks.*.attn.qkv.bias (missing from files of the first released version)  × 2"
        in capsys.readouterr().out
    )
    params = split_params(jaxvid.load_model(tmp_path / "model"))[1]
    assert not params["blocks.1.attn.qkv.bias"].any()
    card = model_card.load_card(tmp_path / "model")
    assert "blocks.0.attn.qkv.bias" in card["provenance"]["zeros"]


def image_vit(grid: int) -> dict[str, torch.Tensor]:
    """Return random weights of an image ViT of the tiny size, under the names of timm."""
    state = {
        key: value
        for key, value in state_dict("stam_16").items()
        if not key.startswith(("aggregate.", "head."))
    }
    state["pos_embed"] = torch.randn(1, grid * grid + 1, 48)
    state |= {"head.weight": torch.randn(1000, 48), "head.bias": torch.randn(1000)}
    return state


def google_vit(state: dict) -> dict[str, np.ndarray]:
    """Return the weights of a timm ViT under Google's names and in its layouts."""
    google = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(2):
        block, google_block = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for layer, google_layer in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            google[f"{google_block}/{google_layer}/scale"] = state[f"{block}.{layer}.weight"]
            google[f"{google_block}/{google_layer}/bias"] = state[f"{block}.{layer}.bias"]
        for layer, google_layer in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            dense = f"{google_block}/MlpBlock_3/{google_layer}"
            google[f"{dense}/kernel"] = state[f"{block}.mlp.{layer}.weight"].T
            google[f"{dense}/bias"] = state[f"{block}.mlp.{layer}.bias"]
        attention = f"{google_block}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(48 * j, 48 * (j + 1))
            kernel = state[f"{block}.attn.qkv.weight"][rows].T.reshape(48, 4, 12)
            bias = state[f"{block}.attn.qkv.bias"][rows].reshape(4, 12)
            google[f"{attention}/{part}/kernel"] = kernel
            google[f"{attention}/{part}/bias"] = bias
        google[f"{attention}/out/kernel"] = state[f"{block}.attn.proj.weight"].T.reshape(4, 12, 48)
        google[f"{attention}/out/bias"] = state[f"{block}.attn.proj.bias"]
    return {key: value.numpy() for key, value in google.items()}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("stam_8", "pth"),
        ("xvit_k400", "safetensors"),
        ("xvit_k400", "npz"),
        pytest.param("xvit_k400", "pth", marks=pytest.mark.full),
        pytest.param("stam_8", "safetensors", marks=pytest.mark.full),
        pytest.param("stam_8", "npz", marks=pytest.mark.full),
    ],
)
def test_image_weights_initialize_video_models(name, suffix, tmp_path, capsys):
    from safetensors.torch import save_file

    state, path = image_vit(grid=3), tmp_path / f"vit.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    elif suffix == "safetensors":
        save_file(state, path)
    else:
        np.savez(path, **google_vit(state))
    assert convert(name, path, tmp_path / "model", "--num_classes", "7") == 0
    out = capsys.readouterr().out
    assert "resized: " in out
    assert "ignored: head.weight" in out
    assert "newly initialised: " in out
    model = jaxvid.load_model(tmp_path / "model")
    assert model.config.num_classes == 7
    params = split_params(model)[1]
    prefix = "" if name == "stam_8" else "base_model."
    for key, tensor in state.items():
        if key.startswith("head.") or key == "pos_embed":
            continue
        [param] = [p for p in params if rules.torch_key(p) == prefix + key]
        np.testing.assert_array_equal(rules.to_torch(param, np.asarray(params[param])), tensor)
    grid = state["pos_embed"][:, 1:].reshape(1, 3, 3, 48).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (2, 2), mode="bicubic")
    expected = torch.cat([state["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 4, 48)], 1)
    np.testing.assert_allclose(params[f"{prefix}pos_embed"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["stam_8", pytest.param("xvit_k400", marks=pytest.mark.full), "xvit_ssv2"]
)
def test_converted_folders_can_predict_and_be_fine_tuned(name, tmp_path, motion_folder, clips):
    path, folder = save(tmp_path / "in.pth", name, state_dict(name)), tmp_path / "model"
    assert convert(name, path, folder) == 0
    fields = {field.name for field in dataclasses.fields(Preprocessing)}
    assert {*model_card.load_card(folder)["preprocessing"]} == fields
    views = {"stam_8": (1, 1), "xvit_k400": (1, 3), "xvit_ssv2": (2, 3)}[name]
    classifier = jaxvid.Classifier(folder)
    assert (classifier.spec.num_clips, classifier.spec.num_crops) == views
    assert len(classifier.predict(clips[0]).labels) == 5
    config = finetune.get_config(f"{folder},{motion_folder}").unlock()
    assert (config.eval.num_clips, config.eval.num_crops) == views
    if name != "xvit_k400":  # only one of the models is trained
        return
    config.update(num_epochs=2 / 6)
    config.optimizer.warmup_epochs = 1 / 6
    assert train(config.lock(), tmp_path / "run")["num_videos"] == 24


def test_weights_under_the_key_state_dict_are_read(tmp_path):
    torch.save({"state_dict": state_dict("stam_8")}, tmp_path / "in.pth")
    assert convert("stam_8", tmp_path / "in.pth", tmp_path / "m", "--check") == 0


def test_an_unwritable_output_is_refused_in_one_line(tmp_path, capsys):
    path = save(tmp_path / "in.pth", "stam_8", state_dict("stam_8"))
    assert convert("stam_8", path, "/proc/jaxvid/model") == InputError.EXIT_CODE
    assert "cannot be written" in capsys.readouterr().err


def test_labels_are_stored_and_a_wrong_number_is_refused(tmp_path, capsys):
    path = save(tmp_path / "in.pth", "stam_8", state_dict("stam_8"))
    names = [f"class {i}" for i in range(400)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "labels.json").write_text(json.dumps(names[:9]))
    assert convert("stam_8", path, tmp_path / "m", "--labels", str(tmp_path / "labels.txt")) == 0
    card = model_card.load_card(tmp_path / "m")
    assert (card["labels"], card["labels_source"]) == (names, "file: labels.txt")
    message = refusal_of(
        "stam_8", path, tmp_path, capsys, "--labels", str(tmp_path / "labels.json")
    )
    assert "9 names for 400 classes" in message


@pytest.mark.parametrize(
    ("name", "dataset", "source"),
    [
        ("stam_8", "kinetics400", "Kinetics-400 in official order"),
        ("xvit_ssv2", "something_something_v2", "Something-Something v2 in official order"),
        (
            "xvit_k600",
            "kinetics600",
            "assumed: Kinetics-600 in alphabetical order; the authors' lists are unpublished",
        ),
    ],
)
def test_released_presets_have_the_names_of_their_dataset(name, dataset, source, tmp_path, capsys):
    path = save(tmp_path / "in.pth", name, state_dict(name))
    assert convert(name, path, tmp_path / "m") == 0
    out, err = capsys.readouterr()
    assert f"class names: {source}" in out
    assert ("the order of the class names is assumed" in err) == source.startswith("assumed")
    card = model_card.load_card(tmp_path / "m")
    assert (card["labels"], card["labels_source"]) == ([*class_names(dataset)], source)
    assert convert(name, path, tmp_path / "m", "--labels", "none") == 0
    out, err = capsys.readouterr()
    assert "class names: none; set them with --labels FILE" in out
    assert not err
    card = model_card.load_card(tmp_path / "m")
    assert (card["labels"], card["labels_source"]) == (None, None)


def test_other_numbers_of_classes_have_no_names_by_default(tmp_path):
    state = state_dict("stam_8")
    state |= {name: state[name][:7] for name in ("head.weight", "head.bias")}
    path = save(tmp_path / "in.pth", "stam_8", state)
    assert convert("stam_8", path, tmp_path / "m", "--num_classes", "7") == 0
    assert model_card.load_card(tmp_path / "m")["labels"] is None


def test_all_problems_are_reported_together(tmp_path, capsys):
    state = state_dict("xvit_ssv2")
    del state["base_model.norm.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["base_model.blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    state["base_model.blocks.1.mlp.fc1.bias"] = torch.full((192,), float("nan"))
    state["base_model.norm.weight"] = torch.ones(48, dtype=torch.int32)
    path = save(tmp_path / "in.pth", "xvit_ssv2", state)
    message = refusal_of("xvit_ssv2", path, tmp_path, capsys)
    assert "5 problems" in message
    for part in (
        "base_model.norm.bias: missing in the file; the model has (48,)",
        "extra.weight: (3,) in the file, not in the model",
        "base_model.blocks.0.mlp.fc1.bias: (5,) in the file, (192,) in the model",
        "base_model.blocks.1.mlp.fc1.bias: holds NaN or infinite values",
        "base_model.norm.weight: int32, not floating point",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("file_model", "model", "message"),
    [
        ("stam_16", "stam_8", "num_frames is 16 in aggregate.pos_embed but 8 in stam_8"),
        ("stam_16", "xvit_k400", "holds stam weights, but xvit_k400 is of the family xvit"),
        ("xvit_k400", "stam_16", "holds xvit weights, but stam_16 is of the family stam"),
        ("xvit_k400", "xvit_k600", "num_classes is 400 in consensus.mlp_head.4.weight but 600"),
        ("xvit_k400", "xvit_k999", "model 'xvit_k999' does not exist"),
    ],
)
def test_contradictions_between_file_and_model_are_refused(
    file_model, model, message, tmp_path, capsys
):
    path = save(tmp_path / "in.pth", file_model, state_dict(file_model))
    assert message in refusal_of(model, path, tmp_path, capsys)


def test_sizes_are_read_from_the_file(tmp_path, capsys):
    state = state_dict("xvit_k600")
    state["base_model.temp_embed"] = torch.randn(1, 16, 1, 48)
    state["consensus.mlp_head.4.weight"] = torch.randn(9, 48)
    state["consensus.mlp_head.4.bias"] = torch.randn(9)
    path = save(tmp_path / "in.pth", "xvit_k600", state)
    assert "pass --num_classes 9" in refusal_of("xvit_k600", path, tmp_path, capsys)
    assert convert("xvit_k600", path, tmp_path / "m", "--num_classes", "9") == 0
    config = jaxvid.load_model(tmp_path / "m").config
    assert (config.num_classes, config.temporal_embedding_frames) == (9, 16)


class Malicious:
    """An object that prints a message when it is unpickled."""

    def __reduce__(self):  # noqa: D105
        return (print, ("this must never be printed",))


def save_and_read(state: dict, path, **options) -> dict[str, np.ndarray]:
    """Save a state_dict with torch.save and read it with `open_weights`."""
    torch.save({"model": state}, path, **options)
    with open_weights(path) as (_, weights):
        return {key: weight.read() for key, weight in weights.items()}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_of_any_layout_are_read_exactly(is_zip, tmp_path):
    storage = torch.randn(6, 5, 4)
    state = {
        "pos_embed": storage,
        "transposed": storage.permute(2, 0, 1),
        "strided": storage[1::2, :, ::3],
        "with_offset": storage[4:],
        "expanded": torch.randn(1, 3).expand(7, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "with_gradient": torch.randn(3, requires_grad=True),
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
    }
    weights = save_and_read(state, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    assert weights.keys() == state.keys()
    for key, tensor in state.items():
        assert str(tensor.dtype) == f"torch.{weights[key].dtype}"
        np.testing.assert_array_equal(weights[key].astype("f8"), tensor.detach().double().numpy())


def test_a_flipped_bit_is_detected(tmp_path):
    path, tensor = tmp_path / "a.pth", torch.randn(100)
    save_and_read({"pos_embed": tensor}, path)
    data = bytearray(path.read_bytes())
    data[data.find(tensor.numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # PyTorch does not detect the flipped bit
    with open_weights(path) as (_, weights), pytest.raises(InputError, match="checksum of the"):
        weights["pos_embed"].read()


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    save_and_read({"pos_embed": torch.randn(100)}, path)
    with pytest.raises(InputError, match="changed while it was read"), open_weights(path):
        path.write_bytes(path.read_bytes() + b"more")


def test_float64_is_rounded_to_float32_and_reported(tmp_path, capsys):
    state = state_dict("stam_8")
    state["blocks.0.norm1.weight"] = torch.full((48,), 1 / 3, dtype=torch.float64)
    path = save(tmp_path / "in.pth", "stam_8", state)
    assert convert("stam_8", path, tmp_path / "model") == 0
    assert "rounded from float64: blocks.0.norm1.scale" in capsys.readouterr().out
    params = split_params(jaxvid.load_model(tmp_path / "model"))[1]
    assert (np.asarray(params["blocks.0.norm1.scale"]) == np.float32(1 / 3)).all()


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_npz_arrays_of_any_byte_order_and_precision_are_read(dtype, tmp_path):
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4)).astype(dtype))
    np.savez_compressed(tmp_path / "a.npz", embedding=array)
    with open_weights(tmp_path / "a.npz") as (kind, weights):
        assert kind == "google_vit"
        assert weights["embedding"].dtype == array.dtype.name
        np.testing.assert_array_equal(weights["embedding"].read(), array)


def test_files_that_are_not_weights_are_refused_in_one_line(tmp_path, capsys):
    valid = save(tmp_path / "valid.pth", "stam_8", state_dict("stam_8")).read_bytes()
    cases = {}

    def case(name: str, message: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        cases[name] = message

    case("text.pth", "cannot be read as a PyTorch checkpoint", b"hello")
    case("text.npz", "cannot be read as .npz", b"hello")
    case("text.safetensors", "cannot be read as .safetensors", b"hello")
    case("empty.pth", "cannot be read as a PyTorch checkpoint", b"")
    for tenth in (1, 5, 9):
        data = valid[: len(valid) * tenth // 10]
        case(f"truncated{tenth}.pth", "cannot be read as a PyTorch checkpoint", data)
    case("pickle.pth", "run as code on loading", pickle.dumps({"model": Malicious()}))
    buffer = io.BytesIO()
    torch.save({"model": {"a": Malicious()}}, buffer)
    case("zip_pickle.pth", "run as code on loading", buffer.getvalue())
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    case("bomb.pth", "declares 50 MB in a file of 0 MB; download", bomb.getvalue())
    case("bomb.npz", "declares 50 MB in a file of 0 MB; download", bomb.getvalue())
    pickled = io.BytesIO()
    np.savez(pickled, cls=np.array([Malicious()], dtype=object))
    case("pickle.npz", "cannot be read as .npz", pickled.getvalue())
    for name, tree in (("list", [1, 2]), ("other", {"a": torch.zeros(2)}), ("none", {})):
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        message = "got list" if name == "list" else "contains no weights of STAM, XViT or"
        case(f"{name}.pth", message, buffer.getvalue())
    (tmp_path / "folder").mkdir()
    cases |= {"folder": "is a folder", "missing.pth": "does not exist"}
    for name, message in cases.items():
        error = refusal_of("stam_8", tmp_path / name, tmp_path, capsys)
        assert message in error, (name, error)
        assert len(error.splitlines()) == 1
    assert "never be printed" not in capsys.readouterr().out


def test_a_failed_check_writes_nothing(tmp_path, capsys, monkeypatch):
    path = save(tmp_path / "in.pth", "stam_8", state_dict("stam_8"))
    monkeypatch.setattr(torch_to_flax, "CHECK_BOUND", 1e-12)
    assert "--check failed" in refusal_of("stam_8", path, tmp_path, capsys, "--check")


def test_an_interrupted_conversion_leaves_no_model_folder(tmp_path, monkeypatch):
    path = save(tmp_path / "in.pth", "stam_8", state_dict("stam_8"))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert("stam_8", path, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()


def test_flax_to_torch_checkpoints_load_strictly_and_bad_folders_are_refused(tmp_path, capsys):
    model = jaxvid.create_model("xvit_tiny")
    jaxvid.save_model(model, tmp_path / "demo")
    arguments = ["--input", str(tmp_path / "demo"), "--output", str(tmp_path / "demo.pth")]
    assert flax_to_torch.main(arguments) == 0
    state = torch.load(tmp_path / "demo.pth", weights_only=True)["model_state"]
    build_reference(model.config).load_state_dict(state, strict=True)
    arguments[1] = str(tmp_path / "missing")
    assert flax_to_torch.main(arguments) == InputError.EXIT_CODE
    assert "missing does not exist" in capsys.readouterr().err
    arguments = ["--input", str(tmp_path / "demo"), "--output", str(tmp_path / "no" / "a.pth")]
    assert flax_to_torch.main(arguments) == InputError.EXIT_CODE
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xvit_tiny", {"summary_tokens": True, "shift": "keys", "shift_per_head": True}),
        ("xvit_tiny", {"shift": "values", "shift_blocks": (1,), "head_depth": 2}),
        ("xvit_tiny", {"head": "mean", "shift": "none", "temporal_embedding_frames": 0}),
        ("stam_tiny", {"aggregator": "mean"}),
    ],
)
def test_the_torch_reference_has_all_options(name, options):
    model = jaxvid.create_model(name, width=16, depth=2, **options)
    reference = build_reference(model.config)
    params = split_params(model)[1]
    reference.load_state_dict(flax_to_torch.to_state_dict(params, model.config), strict=True)
    clips = np.random.default_rng(0).normal(size=(2, 8, 64, 64, 3)).astype(np.float32)
    expected = jax.jit(model)(clips)
    for last_queries in (None, 1):
        for module in reference.modules():
            if isinstance(module, ImageViT):
                module.last_queries = last_queries
        with torch.no_grad():
            logits = reference(torch.from_numpy(clips))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
