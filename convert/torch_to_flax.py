"""Converts released PyTorch weights into a model folder.

python convert/torch_to_flax.py --model stam_16 --input stam_16.pth --output FOLDER [--check]

Reads STAM and XViT checkpoints, and timm (.pth, .safetensors) or Google (.npz) image ViTs as the
start of either. Every key of the file is used once or ignored for a stated reason, every weight of
the model is filled once or listed as newly initialised; otherwise nothing is written.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import guard

    guard.run("convert.torch_to_flax")

import argparse
import dataclasses
import hashlib
import json
import re
import zipfile

import jax
import numpy as np
import torch

from convert import rules
from jaxvid import model_folder
from jaxvid.errors import InputError
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    create_model,
    make_model_config,
    split_params,
)
from jaxvid.models.stam import STAMConfig
from jaxvid.models.surgery import resize_pos_embed

CHECK_BOUND = 1e-4  # largest absolute difference of logits and features, in float32


def released_preprocessing(config: ModelConfig) -> dict:
    """How the released program of a model makes its clips: all that a model folder says of it.

    XViT's frames get the crop's size along their short side, of which 3 crops are taken; STAM's are
    an eighth larger than the one crop in their middle. Something-Something has two clips a video.
    """
    size = config.image_size
    how = {"num_frames": config.num_frames, "crop": size, "sampling_rate": 16, "by_time": False}
    if isinstance(config, STAMConfig):
        how |= {"sampling": "rate", "short_side": round(size * 8 / 7), "resize": "antialiased"}
        return how | {"num_clips": 1, "num_crops": 1, "mean": 0.0, "std": 1.0}
    how |= {"sampling": "dense", "short_side": size, "resize": "bilinear"}
    how |= {"num_clips": 1, "num_crops": 3, "mean": 0.5, "std": 0.5}
    return how | {"sampling": "segments", "num_clips": 2} if config.name == "xvit_ssv2" else how


def read_file(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Reads a checkpoint without running anything that it holds.

    Args:
        path: A `.pth` (any name that torch reads), `.safetensors` or `.npz` file.

    Returns:
        The kind of source (a key of `rules.SOURCES`) and its weights, key → array.

    Raises:
        InputError: It is no such file, is damaged, or would run code.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the checkpoint file itself")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    _check_zip(path)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return "google_vit", rules.google_to_torch(dict(arrays))
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as .npz ({_first_line(error)})") from None
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return "timm_vit", _to_numpy(path, load_file(path))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} cannot be read as .safetensors ({_first_line(error)})"
            ) from None
    tree = _torch_load(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}, not a dict of weights")
    tree = _unwrap(tree)
    if "pos_embed" not in tree and "base_model.pos_embed" not in tree:
        names = ", ".join(list(tree)[:4]) or "nothing"
        raise InputError(f"{path} holds no weights of STAM, XViT or a timm ViT, but {names}, ...")
    if any(key.startswith("base_model.") for key in tree):
        kind = "xvit"
    else:
        kind = "stam" if any(key.startswith("aggregate.") for key in tree) else "timm_vit"
    return kind, _to_numpy(path, tree)


def _unwrap(tree: dict) -> dict:
    """The state_dict inside a checkpoint, without a DDP prefix."""
    inner = next(
        (
            tree[key]
            for key in ("model", "model_state", "state_dict")
            if isinstance(tree.get(key), dict)
        ),
        tree,
    )
    return {str(key).removeprefix("module."): value for key, value in inner.items()}


def _torch_load(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _first_line(error)
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            reason = "it holds more than weights, which would be run as code on loading"
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint ({reason})") from None


def _check_zip(path: Path) -> None:
    """Refuses an archive that declares more than its file can hold (a zip bomb)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if declared > 4 * size:  # weights hardly compress
        raise InputError(
            f"{path} declares {declared / 1e6:.0f} MB in a file of {size / 1e6:.0f} MB; not read"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _to_numpy(path: Path, tree: dict) -> dict[str, np.ndarray]:
    """Tensors as arrays that share their memory; half precision is widened, which is exact."""
    out, problems = {}, []
    for key, value in tree.items():
        if not isinstance(value, torch.Tensor):
            problems.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif value.dtype in (torch.float16, torch.bfloat16):
            out[key] = value.detach().float().numpy()
        else:
            out[key] = value.detach().numpy()
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return out


def infer_config(
    model: str, kind: str, arrays: dict[str, np.ndarray], num_classes: int | None, source: Path
) -> ModelConfig:
    """The preset's config with the sizes that the file determines.

    Args:
        model: The preset's name.
        kind: The kind of source.
        arrays: The file's weights.
        num_classes: What the user said, or None.
        source: The file, for messages.

    Raises:
        InputError: The file contradicts the preset; both are shown.
    """
    config = make_model_config(model)
    family = "stam" if isinstance(config, STAMConfig) else "xvit"
    if rules.SOURCES[kind].is_image_model:
        return make_model_config(model, num_classes=num_classes or config.num_classes)
    if kind != family:
        raise InputError(f"{source} holds {kind} weights, but --model {model} is a {family}")
    prefix = rules.image_prefix(config)
    found: dict[str, tuple[str, int, int]] = {}  # field → (key, axis, offset)
    if kind == "stam":
        found["num_frames"] = ("aggregate.pos_embed", 1, -1)
        found["num_classes"] = ("head.weight", 0, 0)
    else:
        found["temporal_embedding_frames"] = ("base_model.temp_embed", 1, 0)
        found["num_classes"] = ("consensus.mlp_head.4.weight", 0, 0)
    found["width"] = (f"{prefix}cls_token", 2, 0)
    sizes, problems = {}, []
    for field, (key, axis, offset) in found.items():
        if key in arrays and arrays[key].ndim > axis:
            sizes[field] = arrays[key].shape[axis] + offset
    wanted = {"num_classes": num_classes or config.num_classes, "width": config.width}
    if kind == "stam":
        wanted["num_frames"] = config.num_frames
    for field, value in wanted.items():
        if field in sizes and sizes[field] != value:
            problems.append(
                f"{field} is {sizes[field]} in {found[field][0]} but {value} in {model}"
            )
    if problems:
        hint = ""
        if "num_classes" in sizes and sizes["num_classes"] != wanted["num_classes"]:
            hint = f"; --num_classes {sizes['num_classes']} takes another number of classes"
        raise InputError(f"{source} contradicts --model {model}: {'; '.join(problems)}{hint}")
    try:
        return dataclasses.replace(config, **sizes)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def convert(
    kind: str, arrays: dict[str, np.ndarray], config: ModelConfig, source: Path
) -> tuple[Params, rules.Plan]:
    """Turns a file's weights into a model's.

    Args:
        kind: The kind of source.
        arrays: The file's weights; emptied on the way, to keep memory low.
        config: The model's config.
        source: The file, for messages.

    Returns:
        The weights, and what became of each key.

    Raises:
        InputError: Names every key that is missing, left over, or of another shape or dtype, and
            every weight that is not finite.
    """
    _, abstract_params = abstract_model(config)
    shapes = {key: array.shape for key, array in arrays.items()}
    plan = rules.plan(rules.SOURCES[kind], shapes, abstract_params, config)
    problems = list(plan.problems)
    for key in plan.used.values():
        if arrays[key].dtype.kind != "f":
            problems.append(f"{key}: {arrays[key].dtype}, not floating point")
        elif not np.isfinite(arrays[key]).all():
            problems.append(f"{key}: holds NaN or infinite values")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise InputError(f"{source} does not fit {config.name}, {len(problems)} problems:{lines}")
    params = {}
    if plan.initialised:
        fresh = split_params(create_model(**dataclasses.asdict(config)))[1]
        params = {name: fresh[name] for name in plan.initialised}
    for name, leaf in abstract_params.items():
        if name in plan.zeros:
            params[name] = jax.numpy.zeros(leaf.shape, np.float32)
        elif name in plan.used:
            array = rules.from_torch(name, arrays.pop(plan.used[name]))
            if name in plan.resized:
                side = config.image_size // config.patch_size
                array = resize_pos_embed(jax.numpy.asarray(array), (side, side))
            params[name] = jax.numpy.array(array, np.float32)
    return params, plan


def describe(plan: rules.Plan) -> str:
    """A table of what went where; the same weight of several blocks is one line."""
    lines = [f"{key:56} → {name}" for name, key in plan.used.items()]
    lines += [f"zeros: {name} ({reason})" for name, reason in plan.zeros.items()]
    lines += [f"resized: {name}: {how}" for name, how in plan.resized.items()]
    lines += [f"ignored: {key} ({reason})" for key, reason in plan.ignored.items()]
    lines += [f"newly initialised: {name}" for name in plan.initialised]
    counts: dict[str, int] = {}
    for line in lines:
        short = re.sub(r"\b(blocks|layers|temporal_encoder)\.\d+", r"\1.*", line)
        counts[short] = counts.get(short, 0) + 1
    rows = [line + (f"  × {count}" if count > 1 else "") for line, count in counts.items()]
    return "\n".join([f"{'key in the file':56} → weight in the model", *rows])


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, config: ModelConfig, params: Params) -> list[tuple[str, float]]:
    """Largest differences from the PyTorch reference, which loads the file strictly, on one clip.

    Args:
        path: The STAM or XViT file.
        config: The model's config.
        params: The converted weights.

    Returns:
        (what, largest absolute difference) for logits, frame features and each block's output.
    """
    from convert.torch_reference import build_reference
    from jaxvid.models import merge_params

    reference = build_reference(config)
    state = {key: value.float() for key, value in _unwrap(_torch_load(path)).items()}
    for key, value in reference.state_dict().items():
        if key.endswith("attn.qkv.bias"):  # which first-version files lack
            state.setdefault(key, torch.zeros_like(value))
    reference.load_state_dict(state, strict=True)
    size = config.image_size
    clip = np.random.default_rng(0).normal(size=(1, config.num_frames, size, size, 3))
    clip = clip.astype(np.float32)
    blocks: list[torch.Tensor] = []
    with torch.no_grad():
        logits = reference(torch.from_numpy(clip)).numpy()
        frames = reference.frame_features(torch.from_numpy(clip), blocks).numpy()
    del state, reference
    graphdef, _ = abstract_model(config)

    @jax.jit
    def run(params, clip):
        model = merge_params(graphdef, params)
        vit = model if isinstance(config, STAMConfig) else model.base_model
        x, outputs = vit.embed(clip), []
        for block in vit.blocks:
            x = block(x)
            outputs.append(x)
        return model(clip), model.features(clip)["frames"], outputs

    ours = jax.device_get(run(params, clip))
    rows = [("logits", logits, ours[0]), ("frame features", frames, ours[1])]
    for i, (theirs, mine) in enumerate(zip(blocks, ours[2], strict=True)):
        rows.append((f"block {i}", theirs.numpy(), mine.reshape(theirs.shape)))
    return [(what, float(np.abs(a - b).max())) for what, a, b in rows]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="stam_8/16/32/64, xvit_k400/k600/ssv2")
    parser.add_argument("--input", required=True, type=Path, help=".pth, .safetensors or .npz")
    parser.add_argument("--output", required=True, type=Path, help="model folder to write")
    parser.add_argument("--labels", type=Path, help="names of the classes, one a line")
    parser.add_argument("--num_classes", type=int, help="if not the released model's")
    parser.add_argument("--check", action="store_true", help="compare with the PyTorch reference")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE


def _run(args: argparse.Namespace) -> int:
    make_model_config(args.model)  # a wrong name is told before a long read
    kind, arrays = read_file(args.input)
    config = infer_config(args.model, kind, arrays, args.num_classes, args.input)
    labels = None
    if args.labels:
        labels = _read_labels(args.labels, config.num_classes)
    params, plan = convert(kind, arrays, config, args.input)
    print(describe(plan))
    if args.check:
        if rules.SOURCES[kind].is_image_model:
            raise InputError("--check compares video models; an image model has no logits for it")
        rows = check(args.input, config, params)
        print(f"\n{'compared with PyTorch':24} largest difference (bound {CHECK_BOUND:g})")
        for what, difference in rows:
            print(f"{what:24} {difference:.2e}")
        worst = max(difference for what, difference in rows if not what.startswith("block"))
        if not worst <= CHECK_BOUND:
            raise InputError(
                f"--check failed: {worst:.2e} is past {CHECK_BOUND:g}; nothing written"
            )
    card = model_folder.make_card(
        config,
        preprocessing=released_preprocessing(config),
        labels=labels,
        provenance={
            "file": args.input.name,
            "kind": kind,
            "sha256": sha256(args.input),
            "zeros": plan.zeros,
            "resized": plan.resized,
            "ignored": plan.ignored,
            "initialised": plan.initialised,
        },
    )
    model_folder.save_model_folder(args.output, params, card)
    count = sum(array.size for array in params.values())
    print(f"\n{args.output}: {config.name}, {count / 1e6:.2f} M parameters")
    return 0


def _read_labels(path: Path, num_classes: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        labels = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not isinstance(labels, list) or len(labels) != num_classes:
        raise InputError(f"{path}: {len(labels)} names for {num_classes} classes")
    return [str(label) for label in labels]
