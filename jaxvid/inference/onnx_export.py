"""ONNX files: a network in float32, float16 or int8, and their descriptions."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from jaxvid.atomic import write_file
from jaxvid.converters import find_converter
from jaxvid.data.clips.transforms import to_uint8
from jaxvid.data.input_videos import open_input
from jaxvid.data.pipeline import make_eval_iter, split_batch
from jaxvid.data.protocols import VideoRecord
from jaxvid.data.records import Selection
from jaxvid.errors import InputError, import_or_explain
from jaxvid.files import cache_dir, read_limited
from jaxvid.models import split_params
from jaxvid.progress import Progress, to_stderr
from jaxvid.storage.exported_file import MAX_FILE_BYTES, describe_test
from jaxvid.storage.model_folder import fingerprint
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.preprocessing import (
    Preprocessing,
    clip_shape,
    load_model_and_preprocessing,
)

if TYPE_CHECKING:
    from onnx import ModelProto

CALIBRATION_VIDEOS = 64
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
# int8 files compute these operators in int8 if they have weights. The patch embedding is a `Conv`,
# and the class head a `Gemm`.
QUANTIZED = "MatMul"
CACHE_VERSION = 1  # of files in the cache; increased when the export changes


def export_onnx(
    model: nnx.Module,
    preprocessing: Preprocessing,
    activation: str,
    *,
    precision: str = "float32",
    calibrate: Path | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """Make an ONNX file of a network, and describe how it was made.

    Args:
        model: The network.
        preprocessing: Its preprocessing.
        activation: Function from logits to probabilities, a key of `activation.ACTIVATIONS`.
        precision: One of `parsers.PRECISIONS`.
        calibrate: With `int8`: a list or folder of videos, from which the ranges of the activations
            are measured.

    Returns:
        The contents of the file, and `opset`, `precision`, `calibration` (with `int8`) and `test`
        for its description.

    Raises:
        InputError: A package is not installed, the family has no PyTorch reference, or the videos
            cannot be read.
    """
    for package in PACKAGES:
        import_or_explain(package, "jaxvid[onnx]", "--format onnx needs")
    records = list_videos(calibrate) if calibrate else ()
    converter = importlib.import_module(find_converter("convert.flax_to_onnx"))
    network = converter.make_onnx(model.config, split_params(model)[1], preprocessing, activation)
    about = {"opset": converter.OPSET, "precision": precision}
    if precision == "float16":
        network = to_float16(network)
    elif precision == "int8":
        failed = []
        network = quantize(network, read_views(records, preprocessing, failed))
        about["calibration"] = {
            "input": str(calibrate),
            "num_videos": len(records) - len(failed),
            "num_failed": len(failed),
        }
    data = network.SerializeToString()
    program = OnnxNetwork(data, "the exported network")
    about["test"] = describe_test(clip_shape(preprocessing.spec, 1), program)
    return data, about


def cached_onnx(folder: str | Path) -> bytes:
    """Return a float32 ONNX file of a model folder, which is kept in the user's cache.

    Raises:
        InputError: The folder is unusable, a package is not installed, or the cache cannot be
            written.
    """
    card, model, preprocessing = load_model_and_preprocessing(folder)
    made_with = [CACHE_VERSION, card["activation"], preprocessing.to_json()]
    made_with += [dataclasses.asdict(model.config), fingerprint(split_params(model)[1])]
    name = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
    path = cache_dir() / "onnx" / f"{name}.onnx"
    with contextlib.suppress(FileNotFoundError):
        return read_limited(path, MAX_FILE_BYTES)
    data, _ = export_onnx(model, preprocessing, card["activation"])
    write_file(path, data)
    return data


# ------------------------------------------------------------------ calibration


def list_videos(path: Path) -> Sequence[VideoRecord]:
    """Return at most `CALIBRATION_VIDEOS` videos, evenly spaced in a list or folder.

    Raises:
        InputError: The input is unusable or has no videos; see `open_input`.
    """
    try:
        records = open_input(path).records
    except InputError as error:
        try:  # a data set: its training videos
            records = open_input(path, "train").records
        except InputError:
            raise InputError(f"--calibrate: {error}") from None
    count = min(len(records), CALIBRATION_VIDEOS)
    return Selection(records, np.linspace(0, len(records) - 1, count).astype(int).tolist())


def read_views(
    records: Sequence[VideoRecord], preprocessing: Preprocessing, failed: list[str]
) -> Iterator[np.ndarray]:
    """Yield the views `(v, t, h, w, c)` uint8 of each video, as in evaluation.

    Args:
        records: The videos.
        preprocessing: Their preprocessing and number of views.
        failed: Receives the decode errors.

    Raises:
        InputError: No video can be decoded.
    """
    batches = make_eval_iter(records, spec=preprocessing.spec, batch_size=1, num_threads=2)
    progress = Progress(len(records), title="calibrating", unit="video", write_line=to_stderr)
    try:
        for batch in batches:
            arrays, _, [error] = split_batch(batch)
            if error:
                failed.append(error)
            else:
                yield to_uint8(arrays["video"][0])
            progress.advance(1)
    finally:
        progress.close()
        batches.close()
    if len(failed) == len(records):
        raise InputError(f"--calibrate: no video can be decoded ({failed[0]}); choose other videos")


# ------------------------------------------------------------------ precisions


def to_float16(network: "ModelProto") -> "ModelProto":
    """Return a model with float16 weights and activations.

    The patch embedding, which includes the normalisation of the pixels, stays in float32, as do the
    outputs.
    """
    from onnxruntime.transformers import float16

    nodes = network.graph.node
    [last] = [i for i, node in enumerate(nodes) if node.op_type == "Conv"]
    first_nodes = [node.name for node in nodes[: last + 1]]
    with warnings.catch_warnings():  # about weights below the range of float16
        warnings.simplefilter("ignore")
        return float16.convert_float_to_float16(
            network, keep_io_types=True, node_block_list=first_nodes
        )


def quantize(network: "ModelProto", views: Iterator[np.ndarray]) -> "ModelProto":
    """Return a model that computes the operators `QUANTIZED` with weights in int8, as QDQ nodes.

    Weights have one scale per output channel, activations one per tensor, measured as the largest
    absolute value in `views`. All zero points are 0, as TensorRT requires. The patch embedding,
    attention products, norms and the class head stay in float32.

    Args:
        network: The float32 model.
        views: Clips `(v, t, h, w, c)` uint8 of each calibration video.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            clips = next(views, None)
            return None if clips is None else {"clips": clips}

    weights = {value.name for value in network.graph.initializer}
    weighted = [
        node.name
        for node in network.graph.node
        if node.op_type == QUANTIZED and node.input[1] in weights
    ]
    with tempfile.TemporaryDirectory() as folder, _quiet_logging():
        prepared, output = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        # Without ONNX Runtime's optimisations, which add operators that other engines cannot read.
        quant_pre_process(network, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            output,
            Reader(),
            op_types_to_quantize=[QUANTIZED],
            nodes_to_quantize=weighted,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": [QUANTIZED],
            },
        )
        return onnx.load(output)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Silence the advice that ONNX Runtime's quantisation writes to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
