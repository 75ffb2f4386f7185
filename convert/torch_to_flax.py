"""Convert released PyTorch weights into a model folder.

python convert/torch_to_flax.py --model PRESET --input FILE.pth --output FOLDER [--check]

The file is a checkpoint of an original program, or an image ViT of timm (.pth, .safetensors) or
Google (.npz) whose weights initialise a video model. Every key of the file must be used once or
ignored for a stated reason. Every weight of the model must be filled once or listed as newly
initialised. Otherwise nothing is written.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from jaxvid import entry_point

    entry_point.run("convert.torch_to_flax")

import argparse
import dataclasses
import hashlib
import re

import jax
import numpy as np
import torch

from jaxvid import parsers
from jaxvid.data.class_names import PUBLIC_DATASETS, class_names, read_class_names
from jaxvid.errors import InputError, printable
from jaxvid.models import (
    ModelConfig,
    Params,
    abstract_model,
    create_model,
    family_of,
    make_model_config,
    merge_params,
    split_params,
)
from jaxvid.models.resize import resize_pos_embed
from jaxvid.storage import model_card, model_folder

from . import google_vit, rules
from .weight import FLOATS, Weight
from .weight_files import load_state_dict, open_weights

NO_LABELS = "none"  # value of --labels that leaves out the class names
CHECK_BOUND = 1e-4  # maximum absolute difference of logits and of frame features, in float32


def infer_config(
    model: str, kind: str, weights: dict[str, Weight], num_classes: int | None, source: Path
) -> ModelConfig:
    """Return the preset's config, with sizes taken from the file where they may differ.

    Args:
        model: The preset's name.
        kind: The kind of file; see `rules.get_source`.
        weights: The file's weights.
        num_classes: The value of `--num_classes`, or None for that of the preset.
        source: The file, for messages.

    Raises:
        InputError: The preset is unknown; the file contradicts it (the message contains both
            values); or a size in the file is invalid.
    """
    config = make_model_config(model)
    family = family_of(config)
    if rules.get_source(kind).is_image_model:
        return make_model_config(model, num_classes=num_classes or config.num_classes)
    if kind != family.name:
        raise InputError(
            f"{source} holds {kind} weights, but --model {model} is of the family {family.name}; "
            "choose a preset of the file's family"
        )
    locations = {  # field → key, axis, number of rows to subtract from the size
        **{
            embedding.field: (name, 1, embedding.leading_rows)
            for name, embedding in family.frame_embeddings.items()
        },
        "num_classes": (f"{family.class_heads[0]}weight", 0, 0),
        "width": (f"{family.image_prefix}cls_token", 2, 0),
    }
    sizes = {
        field: weights[key].shape[axis] - leading_rows
        for field, (key, axis, leading_rows) in locations.items()
        if key in weights and len(weights[key].shape) > axis
    }
    expected = {
        "num_classes": num_classes or config.num_classes,
        "width": config.width,
        "num_frames": config.num_frames,
    }
    origins = {"num_classes": "--num_classes"} if num_classes else {}
    problems = [
        f"{field} is {sizes[field]} in {locations[field][0]} but {value} in "
        f"{origins.get(field, model)}"
        for field, value in expected.items()
        if field in sizes and sizes[field] != value
    ]
    if problems:
        hint = ""
        if "num_classes" in sizes and sizes["num_classes"] != expected["num_classes"]:
            hint = f"; pass --num_classes {sizes['num_classes']}"
        raise InputError(f"{source} contradicts --model {model}: {'; '.join(problems)}{hint}")
    try:
        return dataclasses.replace(config, **sizes)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def convert(
    kind: str, weights: dict[str, Weight], config: ModelConfig, source: Path
) -> tuple[Params, rules.Plan]:
    """Convert the weights of a file to those of a model.

    Args:
        kind: The kind of file; see `rules.get_source`.
        weights: The file's weights. Only those that the plan uses are read.
        config: The model's config.
        source: The file, for messages.

    Returns:
        The model's weights in float32, and the plan that was carried out.

    Raises:
        InputError: The message names keys that are missing or unknown, or have a wrong shape or
            dtype, and weights with values that are not finite in float32.
    """
    _, abstract_params = abstract_model(config)
    shapes = {key: weight.shape for key, weight in weights.items()}
    plan = rules.make_plan(rules.get_source(kind), shapes, abstract_params, family_of(config))
    params: dict[str, np.ndarray | jax.Array] = {}
    for name, key in plan.used.items():
        weight = weights[key]
        if weight.dtype not in FLOATS:
            is_float = "float" in weight.dtype.lower()  # e.g. float8_e4m3fn
            reason = f"; expected {', '.join(FLOATS)}" if is_float else ", not floating point"
            plan.problems.append(f"{key}: {weight.dtype}{reason}")
            continue
        array, problem = _as_float32(weight.read())
        if problem:
            plan.problems.append(f"{key}: {problem}")
        if weight.dtype == "float64":
            plan.rounded.append(name)
        if plan.problems:
            params.clear()  # not needed: the remaining weights are read only to find all problems
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
    """Return values as float32, and the problem with them or an empty string."""
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float32, copy=False)
    if np.isfinite(rounded).all():
        return rounded, ""
    if np.isfinite(array).all():
        return rounded, f"holds values outside float32's range of ±{np.finfo(np.float32).max:.1e}"
    return rounded, "holds NaN or infinite values"


def _describe_problems(problems: list[str], config: ModelConfig, source: Path) -> str:
    """Return at most 30 problems as one line. Equal problems of several blocks are merged."""
    rows = _merge_layers(problems, config)
    more = f"; and {len(rows) - 30} more" * (len(rows) > 30)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{source} does not fit {config.name}, {count}: {'; '.join(rows[:30])}{more}"


def _merge_layers(lines: list[str], config: ModelConfig) -> list[str]:
    """Merge lines that differ only in the index of a layer: `blocks.*.norm1.weight  × 12`."""
    groups: dict[str, list[str]] = {}
    layer_lists = "|".join(family_of(config).layer_lists)
    for line in lines:
        short = re.sub(rf"\b({layer_lists})\.\d+", r"\1.*", line)
        groups.setdefault(short, []).append(line)
    return [
        f"{short}  × {len(group)}" if len(group) > 1 else group[0]
        for short, group in groups.items()
    ]


def describe(plan: rules.Plan, config: ModelConfig) -> str:
    """Return a table of keys and weights. Lines of equal weights of several blocks are merged."""
    lines = [f"{key:56} → {name}" for name, key in plan.used.items()]
    lines += [f"zeros: {name} ({reason})" for name, reason in plan.zeros.items()]
    lines += [f"resized: {name}: {description}" for name, description in plan.resized.items()]
    lines += [f"ignored: {key} ({reason})" for key, reason in plan.ignored.items()]
    lines += [f"newly initialised: {name}" for name in plan.initialised]
    lines += [f"rounded from float64: {name}" for name in plan.rounded]
    return "\n".join(
        [f"{'key in the file':56} → weight in the model", *_merge_layers(lines, config)]
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, config: ModelConfig, params: Params) -> list[tuple[str, float]]:
    """Compare a converted model with the PyTorch reference, which loads the file with strict=True.

    Args:
        path: A checkpoint of the original program.
        config: The model's config.
        params: The converted weights.

    Returns:
        `(name, maximum absolute difference)` of the logits, the frame features and the output of
        each block, for one random clip.

    Raises:
        InputError: There is no PyTorch reference of the model, or PyTorch cannot read the file.
    """
    size = config.image_size
    clip = np.random.default_rng(0).normal(size=(1, config.num_frames, size, size, 3))
    clip = clip.astype(np.float32)
    expected = _run_reference(path, config, clip)
    graphdef, _ = abstract_model(config)
    family = family_of(config)

    @jax.jit
    def run(params: Params, clip: jax.Array) -> tuple:
        model = merge_params(graphdef, params)
        vit = family.image_vit(model)
        x, outputs = vit.embed(clip), []
        for block in vit.blocks:
            x = block(x)
            outputs.append(x)
        return model(clip), model.features(clip)["frames"], *outputs

    names = ["logits", "frame features", *(f"block {i}" for i in range(config.depth))]
    return [
        (name, float(np.abs(reference - array.reshape(reference.shape)).max()))
        for name, reference, array in zip(
            names, expected, jax.device_get(run(params, clip)), strict=True
        )
    ]


def _run_reference(path: Path, config: ModelConfig, clip: np.ndarray) -> list[np.ndarray]:
    """Return the logits, frame features and outputs of all blocks of the PyTorch reference."""
    from .torch_reference import build_reference

    reference = build_reference(config)
    state = {key: value.float() for key, value in load_state_dict(path).items()}
    zeros = family_of(config).torch.zeros
    for key, value in reference.state_dict().items():
        if any(re.fullmatch(pattern, key) for pattern in zeros):
            state.setdefault(key, torch.zeros_like(value))
    reference.load_state_dict(state, strict=True)
    blocks: list[torch.Tensor] = []
    with torch.no_grad():
        logits = reference(torch.from_numpy(clip))
        frames = reference.frame_features(torch.from_numpy(clip), blocks)
    return [tensor.numpy() for tensor in (logits, frames, *blocks)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parsers.convert().parse_args(argv)
    try:
        return _run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE


def _run(args: argparse.Namespace) -> int:
    make_model_config(args.model)  # refuses an unknown name before the file is read
    with open_weights(args.input) as (kind, weights):
        if kind == "google_vit":
            weights = google_vit.to_torch(weights, args.input)
        config = infer_config(args.model, kind, weights, args.num_classes, args.input)
        labels, labels_source = _choose_labels(args.labels, kind, config)
        params, plan = convert(kind, weights, config, args.input)
    print(describe(plan, config))
    if args.check:
        _print_check(kind, args.input, config, params)
    card = model_card.make_card(
        config,
        preprocessing=family_of(config).released_preprocessing(config),
        labels=labels,
        labels_source=labels_source,
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
    print(f"\nclass names: {labels_source or 'none; set them with --labels FILE'}")
    if warning := model_card.describe_assumed_labels(card, args.output):
        print(f"warning: {warning}", file=sys.stderr)
    count = sum(array.size for array in params.values())
    print(f"{args.output}: {config.name}, {count / 1e6:.2f} M parameters")
    return 0


def _choose_labels(
    option: str | None, kind: str, config: ModelConfig
) -> tuple[list[str] | None, str | None]:
    """Return the class names and their origin for the model card, or None for both.

    Without `--labels`, a checkpoint of a released preset has the names of the preset's data set if
    the number of classes is the same. The classes of an image model are not those of the network.

    Args:
        option: The value of `--labels`, or None if it is not set.
        kind: The kind of weights file; see `rules.get_source`.
        config: The model's config.

    Raises:
        InputError: The file of class names is unusable or has a wrong number of names.
    """
    if option == NO_LABELS:
        return None, None
    if option is not None:
        path = Path(option)
        source = printable(f"file: {path.name}")[: model_card.MAX_SOURCE]
        return read_class_names(path, config.num_classes), source
    released = family_of(config).released_classes.get(config.name)
    if released is None or rules.get_source(kind).is_image_model:
        return None, None
    names = list(class_names(released.dataset))
    if len(names) != config.num_classes:
        return None, None
    title = PUBLIC_DATASETS[released.dataset]
    if released.assumption:
        return names, f"{model_card.ASSUMED}{title} in alphabetical order; {released.assumption}"
    return names, f"{title} in official order"


def _print_check(kind: str, path: Path, config: ModelConfig, params: Params) -> None:
    """Run `check` and print its result.

    Raises:
        InputError: The difference of the logits or frame features is above `CHECK_BOUND`, or the
            file cannot be checked.
    """
    if rules.get_source(kind).is_image_model:
        raise InputError(
            "--check needs the file of a video model, got that of an image model; omit --check"
        )
    rows = check(path, config, params)
    print(f"\n{'compared with PyTorch':24} largest difference (bound {CHECK_BOUND:g})")
    for name, difference in rows:
        print(f"{name:24} {difference:.2e}")
    worst = max(difference for name, difference in rows if not name.startswith("block"))
    if not worst <= CHECK_BOUND:
        raise InputError(
            f"--check failed: the difference {worst:.2e} is above {CHECK_BOUND:g}; "
            "nothing was written"
        )
