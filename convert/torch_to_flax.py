"""Convert released PyTorch weights into a model folder.

python convert/torch_to_flax.py --model PRESET --input FILE.pth --output FOLDER [--check]

The file is a checkpoint of the original implementation, or an image ViT of timm (.pth,
.safetensors) or Google (.npz) whose weights initialise a video model. Nothing is written unless
every key of the file is used once or ignored for a stated reason, and every weight of the model is
filled once or listed as newly initialised.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from jaxvid import entry_point

    entry_point.run("convert.torch_to_flax")

import argparse
import re

import jax
import numpy as np

from jaxvid import parsers, remote
from jaxvid.atomic import output_path
from jaxvid.errors import InputError
from jaxvid.models import ModelConfig, Params, abstract_model, family_of, merge_params
from jaxvid.storage import model_card, model_folder
from jaxvid.weights import rules, torch_files
from jaxvid.weights.conversion import convert_file, describe
from jaxvid.weights.weight_files import converted_errors

CHECK_BOUND = 1e-4  # maximum absolute difference of logits and of frame features, in float32


def check(path: Path, config: ModelConfig, params: Params) -> list[tuple[str, float]]:
    """Compare a converted model with the PyTorch reference, which loads the file with strict=True.

    Args:
        path: A checkpoint of the original implementation.
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
    try:
        import torch

        from .torch_reference import build_reference
    except ImportError as error:
        raise InputError(
            f"--check needs PyTorch ({error}); install torch or omit --check"
        ) from None
    reference = build_reference(config)
    with converted_errors(path):
        tree = torch.load(path, map_location="cpu", weights_only=True)
        state = torch_files.unwrap_state_dict(tree)
    state = {key: value.float() for key, value in state.items()}
    zeros = family_of(config).torch.zeros
    for key, value in reference.state_dict().items():
        if any(re.fullmatch(pattern, key) for pattern in zeros):
            state.setdefault(key, torch.zeros_like(value))
    reference.load_state_dict(state, strict=True)
    blocks = []
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
    path = remote.complete_copy(args.input)
    converted = convert_file(path, args.model, num_classes=args.num_classes, labels=args.labels)
    config, params, card = converted.config, converted.params, converted.card
    print(describe(converted.plan, config))
    if args.check:
        _print_check(converted.kind, path, config, params)
    output = output_path(args.output)
    model_folder.save_model_folder(str(output), params, card)
    print(f"\nclass names: {card['labels_source'] or 'none; set them with --labels FILE'}")
    if warning := model_card.describe_assumed_labels(card, str(output)):
        print(f"warning: {warning}", file=sys.stderr)
    count = sum(array.size for array in params.values())
    print(f"{output}: {config.name}, {count / 1e6:.2f} M parameters")
    return 0


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
