"""Export a model folder: the command `jaxvid export`."""

if __name__ == "__main__":  # before the slow imports below
    from jaxvid import entry_point

    entry_point.run("jaxvid.export")

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

from jaxvid import parsers
from jaxvid.atomic import OutputPath, output_path, write_file, write_json
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import InputError, printable
from jaxvid.inference.onnx_export import export_onnx
from jaxvid.models import split_params
from jaxvid.storage import exported_file
from jaxvid.storage.preprocessing import (
    Channels,
    clip_shape,
    load_model_and_preprocessing,
    normalize,
)
from jaxvid.weights.resolve import resolve_model

DESCRIBED = ("labels", "labels_source", "activation", "preprocessing", "config", "provenance")
PLATFORMS = ("cpu", "cuda")
MAX_BYTES = 2**31 - 2**20  # size limit of the weights: serialised programs have 32-bit offsets


def export_stablehlo(model: nnx.Module, spec: ClipSpec, *, mean: Channels, std: Channels) -> bytes:
    """Serialise a network with its weights and normalisation for `jax.export.deserialize`.

    Args:
        model: The network.
        spec: Defines `num_frames` and `crop`.
        mean: Mean that is subtracted from pixels in [0, 1].
        std: Divisor of the pixels after the mean is subtracted.

    Returns:
        A program that maps cropped clips `(b, t, h, w, c)` uint8 to logits `(b, num_classes)`
        float32, for any b.

    Raises:
        InputError: The weights are too large for one program.
    """
    _check_size(model, "a StableHLO program")
    (b,) = jax_export.symbolic_shape("b")
    clips = jax.ShapeDtypeStruct(clip_shape(spec, b), jnp.uint8)
    program = jax.jit(lambda clips: model(normalize(clips, mean, std)))
    return bytes(jax_export.export(program, platforms=PLATFORMS)(clips).serialize())


def _check_size(model: nnx.Module, kind: str) -> None:
    """Refuse weights that are too large for a kind of file."""
    size = sum(leaf.nbytes for leaf in split_params(model)[1].values())
    if size > MAX_BYTES:
        raise InputError(
            f"the weights have {size / 1e9:.1f} GB, more than the limit of {kind} "
            f"({MAX_BYTES / 1e9:.1f} GB); use --format safetensors"
        )


def export_safetensors(model: nnx.Module, card: dict) -> bytes:
    """Serialise a network's weights as float32 safetensors, with the names of `split_params`.

    Args:
        model: The network.
        card: The model card, stored as metadata under the key `model.json`.
    """
    weights = {name: np.asarray(leaf) for name, leaf in split_params(model)[1].items()}
    return safetensors_bytes(weights, {"model.json": json.dumps(card, ensure_ascii=False)})


def export(
    folder: str | Path,
    output: str | Path,
    format_: str = "stablehlo",
    *,
    precision: str = "float32",
    calibrate: Path | None = None,
) -> dict:
    """Write the network of a model folder as one file, and a description of the file as JSON.

    Args:
        folder: Model folder, or another name of a model; see `resolve_model`.
        output: File to write. The description is written to `OUTPUT.json`.
        format_: One of `parsers.FORMATS`.
        precision: Precision of an ONNX file, one of `parsers.PRECISIONS`.
        calibrate: Videos from which the ranges of an int8 file are measured; see `export_onnx`.

    Returns:
        The contents of `OUTPUT.json`.

    Raises:
        InputError: The model folder is unusable, the weights are too large, a package is not
            installed, or a file cannot be written.
    """
    card, model, preprocessing = load_model_and_preprocessing(resolve_model(folder))
    spec, output = preprocessing.spec, output_path(output)
    # Leave out the sizes and checksums, which describe files of the model folder.
    card = {key: value for key, value in card.items() if key not in ("files", "checksums")}
    description = {"file": output.name, "format": format_, "model": card["name"]}
    if format_ == "stablehlo":
        data = export_stablehlo(model, spec, mean=preprocessing.mean, std=preprocessing.std)
        description |= _describe_program(output, model, spec)
        description |= exported_file.describe_program(data)
    elif format_ == "onnx":
        _check_size(model, "an ONNX file")
        data, about = export_onnx(
            model, preprocessing, card["activation"], precision=precision, calibrate=calibrate
        )
        description |= _describe_onnx(output, model, spec, card["activation"], precision) | about
    else:
        data = export_safetensors(model, card)
        description |= _describe_weights(output, model)
    description |= {
        "jax": jax.__version__,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **{key: card[key] for key in DESCRIBED},
    }
    write_file(output, data)
    write_json(output.with_name(f"{output.name}.json"), description)
    return description


def _describe_program(output: OutputPath, model: nnx.Module, spec: ClipSpec) -> dict:
    """Describe the input and output of a StableHLO program, and how to load it."""
    return {
        **_describe_signature(model, spec),
        "platforms": list(PLATFORMS),
        "load": [
            "from jax import export  # pip install jax flatbuffers",
            f"model = export.deserialize(open({output.name!r}, 'rb').read())",
            "logits = model.call(clips)",
        ],
    }


def _describe_onnx(
    output: OutputPath, model: nnx.Module, spec: ClipSpec, activation: str, precision: str
) -> dict:
    """Describe the input and outputs of an ONNX file, and how to load it."""
    signature = _describe_signature(model, spec)
    probabilities = signature["output"] | {"meaning": f"{activation} of the logits"}
    options, argument = [], ""
    if precision == "int8":
        options = [
            "options = onnxruntime.SessionOptions()",
            "# Without this option, int8 products overflow on x86 CPUs that do not have VNNI.",
            "options.add_session_config_entry('session.x64quantprecision', '1')",
        ]
        argument = ", options"
    return {
        **signature,
        "probabilities": probabilities,
        "load": [
            "import onnxruntime  # pip install onnxruntime",
            *options,
            f"session = onnxruntime.InferenceSession({output.name!r}{argument})",
            "logits, probabilities = session.run(None, {'clips': clips})",
        ],
    }


def _describe_signature(model: nnx.Module, spec: ClipSpec) -> dict:
    """Describe the input and the logits of a program."""
    meaning = (
        "clips (b, t, h, w, RGB) with pixels from 0 to 255, sampled, resized and cropped as "
        "described in `preprocessing`; the program applies mean and std"
    )
    if spec.resize == "torch_bilinear":
        meaning += (
            " (jaxvid's evaluation does not round resized pixels to integers; its logits differ by "
            "up to 1e-2)"
        )
    return {
        "input": {"shape": list(clip_shape(spec, "b")), "dtype": "uint8", "meaning": meaning},
        "output": {
            "shape": ["b", model.config.num_classes],
            "dtype": "float32",
            "meaning": "logits, in the order of `labels`",
        },
    }


def _describe_weights(output: OutputPath, model: nnx.Module) -> dict:
    """Describe a safetensors file, and how to load it."""
    params = split_params(model)[1]
    return {
        "weights": {name: list(leaf.shape) for name, leaf in params.items()},
        "layout": (
            "kernels are (in, out), those of convolutions (h, w, in, out); layers that compute "
            "queries, keys and values have kernels (in, 3, d) and biases (3, d), with the heads "
            "one after the other in d"
        ),
        "parameters": sum(math.prod(leaf.shape) for leaf in params.values()),
        "load": [
            "from safetensors.numpy import load_file",
            f"weights = load_file({output.name!r})",
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if the input is unusable."""
    parser = parsers.export()
    args = parser.parse_args(argv)
    if args.check is None and None in (args.model, args.output):
        parser.error("expected --model and --output, or --check")
    if args.check is not None and (args.model, args.output) != (None, None):
        parser.error("--check: cannot be combined with --model or --output")
    if args.format != "onnx" and args.precision != "float32":
        parser.error(f"--precision {args.precision}: requires --format onnx")
    if args.precision == "int8" and args.calibrate is None:
        parser.error("--precision int8: requires --calibrate LIST_OR_FOLDER")
    if args.precision != "int8" and args.calibrate is not None:
        parser.error("--calibrate: requires --precision int8")
    try:
        if args.check is not None:
            print(printable(exported_file.check_exported(args.check)))
            return 0
        description = export(
            args.model,
            args.output,
            args.format,
            precision=args.precision,
            calibrate=args.calibrate,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.EXIT_CODE
    name = os.fsencode(args.output).decode(errors="replace")
    size = f"{description['bytes'] / 1e6:.1f} MB"
    print(f"{name}: {description['model']}, {description['format']}, {size}")
    print(f"{name}.json: description of the exported file; load that file with:")
    print(*(f"    {line}" for line in description["load"]), sep="\n")
    if args.format == "stablehlo":
        print(f"compatibility: {exported_file.describe_guarantee(description)}")
    return 0
