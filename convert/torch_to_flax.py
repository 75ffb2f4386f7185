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
    from jaxvid import entry_point

    entry_point.run("convert.torch_to_flax")

import argparse
import dataclasses
import hashlib
import json
import re

import jax
import numpy as np
import torch

from convert import rules
from convert.weight_files import FLOATS, Weight, load_state_dict, open_weights
from jaxvid.errors import InputError, one_line, short_repr
from jaxvid.files import read_limited
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    create_model,
    make_model_config,
    split_params,
)
from jaxvid.models.stam import STAMConfig
from jaxvid.models.transfer import resize_pos_embed
from jaxvid.storage import model_card, model_folder

MAX_LABELS_BYTES = 32 * 10**6
CHECK_BOUND = 1e-4  # largest absolute difference of logits and features, in float32


def released_preprocessing(config: ModelConfig) -> dict:
    """How the released program of a model makes its clips: all that a model folder says of it.

    XViT's frames get the crop's size along their short side, of which 3 crops are taken; STAM's are
    an eighth larger than the one crop in their middle. Something-Something has two clips a video.
    """
    size = config.image_size
    how = {"num_frames": config.num_frames, "crop": size, "sampling_rate": 16, "by_time": False}
    if isinstance(config, STAMConfig):
        how |= {
            "sampling": "uniform_10s",
            "short_side": round(size * 8 / 7),
            "resize": "pil_bilinear",
        }
        how["color_matrix"] = "bt601"  # its PyAV ignored the matrix that a file names
        return how | {"num_clips": 1, "num_crops": 1, "mean": 0.0, "std": 1.0}
    how |= {"sampling": "dense_stride", "short_side": size, "resize": "torch_bilinear"}
    how["color_matrix"] = "tagged"
    how |= {"num_clips": 1, "num_crops": 3, "mean": 0.5, "std": 0.5}
    return how | {"sampling": "segments", "num_clips": 2} if config.name == "xvit_ssv2" else how


def infer_config(
    model: str, kind: str, weights: dict[str, Weight], num_classes: int | None, source: Path
) -> ModelConfig:
    """The preset's config with the sizes that the file determines.

    Args:
        model: The preset's name.
        kind: The kind of source.
        weights: The file's weights.
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
        if key in weights and len(weights[key].shape) > axis:
            sizes[field] = weights[key].shape[axis] + offset
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
    kind: str, weights: dict[str, Weight], config: ModelConfig, source: Path
) -> tuple[Params, rules.Plan]:
    """Turns a file's weights into a model's.

    Args:
        kind: The kind of source.
        weights: The file's weights. Only those whose shape is the model's are read.
        config: The model's config.
        source: The file, for messages.

    Returns:
        The weights, and what became of each key. float64 is rounded to float32.

    Raises:
        InputError: Names every key that is missing, left over, or of another shape or dtype, and
            every weight with values that float32 cannot hold.
    """
    _, abstract_params = abstract_model(config)
    shapes = {key: weight.shape for key, weight in weights.items()}
    plan = rules.plan(rules.SOURCES[kind], shapes, abstract_params, config)
    params: dict[str, np.ndarray | jax.Array] = {}
    for name, key in plan.used.items():
        weight = weights[key]
        if weight.dtype not in FLOATS:
            number = "" if "float" in weight.dtype.lower() else ", not floating point"
            known = "" if number else f"; only {', '.join(FLOATS)} are read"
            plan.problems.append(f"{key}: {weight.dtype}{number}{known}")
            continue
        array, problem = _as_float32(weight.read())
        if problem:
            plan.problems.append(f"{key}: {problem}")
        if weight.dtype == "float64":
            plan.rounded.append(name)
        if plan.problems:
            params.clear()  # the rest is read for its problems alone
            continue
        array = rules.from_torch(name, array)
        if name in plan.resized:
            side = config.image_size // config.patch_size
            array = resize_pos_embed(jax.numpy.asarray(array), (side, side))
        params[name] = jax.numpy.array(array, np.float32)
    if plan.problems:
        raise InputError(_describe_problems(plan.problems, config, source))
    if plan.initialised:
        fresh = split_params(create_model(**dataclasses.asdict(config)))[1]
        params |= {name: fresh[name] for name in plan.initialised}
    for name in plan.zeros:
        params[name] = jax.numpy.zeros(abstract_params[name].shape, np.float32)
    return {name: params[name] for name in abstract_params}, plan


def _as_float32(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Values in float32, and what is wrong with them. Half precision is widened, which is exact."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32, copy=False)
    if np.isfinite(narrow).all():
        return narrow, ""
    if np.isfinite(array).all():
        return narrow, f"holds values beyond float32's range of ±{np.finfo(np.float32).max:.1e}"
    return narrow, "holds NaN or infinite values"


def _describe_problems(problems: list[str], config: ModelConfig, source: Path) -> str:
    """All problems in a line; the same problem of several blocks is one, and 30 are shown."""
    rows = _count_alike(problems)
    more = f"; and {len(rows) - 30} more" * (len(rows) > 30)
    return (
        f"{source} does not fit {config.name}, {len(problems)} problems: "
        f"{'; '.join(rows[:30])}{more}"
    )


def _count_alike(lines: list[str]) -> list[str]:
    """Lines that differ in the number of a block alone as one, with a star and their count."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        short = re.sub(r"\b(blocks|layers|temporal_encoder)\.\d+", r"\1.*", line)
        groups.setdefault(short, []).append(line)
    return [
        f"{short}  × {len(group)}" if len(group) > 1 else group[0]
        for short, group in groups.items()
    ]


def describe(plan: rules.Plan) -> str:
    """A table of what went where; the same weight of several blocks is one line."""
    lines = [f"{key:56} → {name}" for name, key in plan.used.items()]
    lines += [f"zeros: {name} ({reason})" for name, reason in plan.zeros.items()]
    lines += [f"resized: {name}: {how}" for name, how in plan.resized.items()]
    lines += [f"ignored: {key} ({reason})" for key, reason in plan.ignored.items()]
    lines += [f"newly initialised: {name}" for name in plan.initialised]
    lines += [f"rounded from float64: {name}" for name in plan.rounded]
    return "\n".join([f"{'key in the file':56} → weight in the model", *_count_alike(lines)])


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
    state = {key: value.float() for key, value in load_state_dict(path).items()}
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
    labels = None
    with open_weights(args.input) as (kind, weights):
        if kind == "google_vit":
            weights = rules.google_to_torch(weights, args.input)
        config = infer_config(args.model, kind, weights, args.num_classes, args.input)
        if args.labels:
            labels = _read_labels(args.labels, config.num_classes)
        params, plan = convert(kind, weights, config, args.input)
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
    card = model_card.make_card(
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
        text = read_limited(path, MAX_LABELS_BYTES).decode("utf-8")
        labels = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a file of labels") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); save it as UTF-8, a name a line"
        ) from None
    if not isinstance(labels, list):
        raise InputError(f"{path}: a {type(labels).__name__}, expected a list of names")
    if len(labels) != num_classes:
        raise InputError(
            f"{path}: {len(labels)} names for {num_classes} classes; give each class one"
        )
    for label in labels:
        if not isinstance(label, str | int):
            raise InputError(f"{path}: {short_repr(label)} is no name; expected text")
    return [str(label) for label in labels]
