"""Exports a model folder: python -m jaxvid.export --model FOLDER --output FILE [--format F].

`stablehlo` (default): the network with its weights and its normalisation as one program, for any
batch size, on CPU and CUDA. Whoever runs it needs jax and flatbuffers, and none of this package.
`safetensors`: the weights alone, under the names that model folders have, with `model.json`.
Beside either lies FILE.json, which says what goes in, what comes out, and how to load it.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from jaxvid import entry_point

    entry_point.run("jaxvid.export")

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from safetensors.numpy import save as safetensors_bytes

from jaxvid.atomic import write_file, write_json
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import InputError
from jaxvid.models import split_params
from jaxvid.storage import eval_step
from jaxvid.storage.preprocessing import clip_shape, load_model_and_preprocessing

FORMATS = ("stablehlo", "safetensors")
PLATFORMS = ("cpu", "cuda")
MAX_BYTES = 2**31 - 2**20  # of weights in a program: it is serialised with 32-bit offsets


def export_stablehlo(model: nnx.Module, spec: ClipSpec, *, mean: float, std: float) -> bytes:
    """Serialises a network with its weights and its normalisation.

    Args:
        model: The network.
        spec: `num_frames` and `crop` count.
        mean: Subtracted from pixels in [0, 1].
        std: Divides them.

    Returns:
        What `jax.export.deserialize` takes: cropped clips `(b, t, h, w, 3)` uint8 → logits
        `(b, num_classes)` float32, for any b.

    Raises:
        InputError: The weights are too large for one program.
    """
    size = sum(leaf.nbytes for leaf in split_params(model)[1].values())
    if size > MAX_BYTES:
        raise InputError(
            f"the weights have {size / 1e9:.1f} GB; a StableHLO program holds at most "
            f"{MAX_BYTES / 1e9:.1f}: use --format safetensors"
        )
    (b,) = jax_export.symbolic_shape("b")
    clips = jax.ShapeDtypeStruct(clip_shape(spec, b), jnp.uint8)
    program = jax.jit(lambda clips: model(eval_step.normalize(clips, mean, std)))
    return bytes(jax_export.export(program, platforms=PLATFORMS)(clips).serialize())


def export_safetensors(model: nnx.Module, card: dict) -> bytes:
    """Serialises a network's weights as float32 safetensors under the names of `split_params`.

    Their metadata has `model.json`: `card` as JSON.
    """
    weights = {name: np.asarray(leaf) for name, leaf in split_params(model)[1].items()}
    return safetensors_bytes(weights, {"model.json": json.dumps(card, ensure_ascii=False)})


def export(folder: str | Path, output: str | Path, format_: str = "stablehlo") -> dict:
    """Writes a model folder's network as one file, and what is to be known of it beside it.

    Args:
        folder: The model folder.
        output: The file; `OUTPUT.json` is written too.
        format_: One of `FORMATS`.

    Returns:
        What `OUTPUT.json` holds.

    Raises:
        InputError: The model folder is unusable, the weights are too large, or a file cannot be
            written.
    """
    card, model, preprocessing = load_model_and_preprocessing(folder)
    spec, output = preprocessing.spec, Path(output)
    of_folder = ("files", "checksums")
    card = {key: value for key, value in card.items() if key not in of_folder}
    about = {"file": output.name, "format": format_, "model": card["name"]}
    if format_ == "stablehlo":
        data = export_stablehlo(model, spec, mean=preprocessing.mean, std=preprocessing.std)
        about |= {
            "input": {
                "shape": list(clip_shape(spec, "b")),
                "dtype": "uint8",
                "meaning": "clips (b, t, h, w, RGB), sampled, resized and cropped as "
                "`preprocessing` says, in whole grey levels; mean and std are applied inside"
                + (
                    " (evaluation does not round to whole grey levels where resize is bilinear: "
                    "logits differ by up to 1e-2)"
                    if spec.resize == "torch_bilinear"
                    else ""
                ),
            },
            "output": {
                "shape": ["b", model.config.num_classes],
                "dtype": "float32",
                "meaning": "logits, in the order of `labels`",
            },
            "platforms": list(PLATFORMS),
            "load": [
                "from jax import export  # pip install jax flatbuffers",
                f"model = export.deserialize(open({output.name!r}, 'rb').read())",
                "logits = model.call(clips)",
            ],
        }
    else:
        data = export_safetensors(model, card)
        params = split_params(model)[1]
        about |= {
            "weights": {name: list(leaf.shape) for name, leaf in params.items()},
            "parameters": sum(math.prod(leaf.shape) for leaf in params.values()),
            "load": [
                "from safetensors.numpy import load_file",
                f"weights = load_file({output.name!r})",
            ],
        }
    about |= {
        "jax": jax.__version__,
        "sha256": hashlib.sha256(data).hexdigest(),
        **{key: card[key] for key in ("labels", "preprocessing", "config", "provenance")},
    }
    write_file(output, data)
    write_json(output.with_name(f"{output.name}.json"), about)
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 where the input is unusable."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxvid.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="written, with FILE.json")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    args = parser.parse_args(argv)
    try:
        about = export(args.model, args.output, args.format)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    size = Path(args.output).stat().st_size
    name = os.fsencode(args.output).decode(errors="replace")
    print(f"{name}: {about['model']}, {about['format']}, {size / 1e6:.1f} MB")
    print(f"{name}.json: what goes in and comes out; to load it:")
    print(*(f"    {line}" for line in about["load"]), sep="\n")
    return 0
