"""Check exported files against their descriptions, and how long programs are guaranteed to load.

JAX guarantees that a program from `jax.export` runs with every jaxlib released from 3 weeks before
to 6 months after the jaxlib that exported it. Source:
https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
"""

import calendar
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import safetensors
from jax import export as jax_export
from safetensors.numpy import load as load_safetensors

from jaxvid.config import translate
from jaxvid.errors import InputError, memory_problem, one_line, short_repr
from jaxvid.files import read_limited
from jaxvid.models import abstract_model, make_model_config
from jaxvid.progress import compiling
from jaxvid.storage import model_card
from jaxvid.storage.model_card import MAX_CARD_BYTES
from jaxvid.storage.onnx_network import OnnxNetwork

BACKWARD_MONTHS = 6
FORWARD_WEEKS = 3
# jaxlib → the day on which it was uploaded to PyPI, which the installed package does not contain.
JAXLIB_RELEASES = {
    "0.10.2": "2026-06-17",
    "0.11.0": "2026-07-16",
    "0.11.1": "2026-08-17",
    "0.11.2": "2026-09-17",
    "0.12.0": "2026-10-19",
    "0.12.0.1": "2026-10-21",
}
# `precision` of an ONNX file, or `config.dtype` of another file → largest difference of the logits,
# relative to the largest logit. The order of summation depends on the CPU or GPU. A GPU also rounds
# the factors of a tfloat32 product. Sums of int8 products may saturate on CPUs without VNNI.
TOLERANCES = {"float32": 1e-3, "tfloat32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2, "int8": 1e-1}
MAX_FILE_BYTES = 2**33


def make_test_clips(shape: tuple[int, ...]) -> np.ndarray:
    """Return clips `shape`, `(b, t, h, w, c)` uint8, in which frames and patches differ."""
    return (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)


def describe_program(data: bytes) -> dict[str, Any]:
    """Describe the compatibility of a StableHLO program, and its logits for one test clip.

    Args:
        data: The serialised program, which maps `(b, t, h, w, c)` uint8 to logits. It is run.

    Returns:
        The fields `compatibility` and `test` of a description. If the release date of jaxlib is
        unknown, the dates in `compatibility` are None.
    """
    program = jax_export.deserialize(bytearray(data))
    shape = _clip_shape(program)
    return {
        "compatibility": {
            "written": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "calling_convention_version": program.calling_convention_version,
            "calling_convention_versions_of_jax": list(_supported_versions()),
            "jaxlib": jaxlib.__version__,
            **_guarantee(jaxlib.__version__),
        },
        "test": describe_test(shape, lambda clips: _call(program, clips)),
    }


def describe_test(
    shape: tuple[int, ...], program: Callable[[np.ndarray], jax.Array | np.ndarray]
) -> dict[str, Any]:
    """Run a program on a test clip; return the field `test` of its description.

    Args:
        shape: `(1, t, h, w, c)`.
        program: Maps clips uint8 to logits.
    """
    return {
        "clips": f"(np.arange(np.prod({shape})) % 251).astype(np.uint8).reshape({shape})",
        "logits": np.asarray(program(make_test_clips(shape)))[0].tolist(),
    }


def _clip_shape(program: jax_export.Exported) -> tuple[int, ...]:
    """Return the shape `(1, t, h, w, c)` of one clip."""
    return (1, *map(int, program.in_avals[0].shape[1:]))


def _call(program: jax_export.Exported, clips: np.ndarray) -> np.ndarray:
    """Run a program, and announce a slow compilation; return the logits `(b, num_classes)`."""
    with compiling("the exported program"):
        return np.asarray(program.call(clips))


def check_exported(path: str | Path) -> str:
    """Check that an exported file is unchanged and can be used by the installed packages.

    A program is loaded and run on one clip, so the file and its description must be trusted. The
    names and shapes of weights are compared with the network of this version.

    Args:
        path: The file. Its description is `PATH.json`.

    Returns:
        One line that says what was checked and, for a program, how long it is guaranteed to load.

    Raises:
        InputError: The file or its description is missing, damaged or cannot be used.
    """
    if "://" in str(path):
        raise InputError(f"{path}: is remote; copy it and its .json file to this machine")
    path = Path(path)
    data, about = read_exported(path)
    checks = {"stablehlo": _check_program, "safetensors": _check_weights, "onnx": _check_onnx}
    if about["format"] not in checks:
        raise InputError(
            f"{path}.json: format is {short_repr(about['format'])}, expected one of "
            f"{', '.join(checks)}; update jaxvid or export the model again"
        )
    try:
        return f"{path}: {checks[about['format']](path, data, about)}"
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}.json: a field is missing or invalid ({one_line(repr(error))}); "
            "export the model again"
        ) from None


def read_exported(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read an exported file and its description, which has at least `format` and `sha256`.

    Raises:
        InputError: The file or its description is missing, or they do not belong together.
    """
    try:
        data = read_limited(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; choose a file written by jaxvid export") from None
    about = _read_description(path)
    if hashlib.sha256(data).hexdigest() != about["sha256"]:
        size = about.get("bytes", len(data))
        kind = "its contents have" if size == len(data) else f"its size ({len(data)} bytes) has"
        raise InputError(f"{path}: {kind} changed since the export; copy or export it again")
    return data, about


def _read_description(path: Path) -> dict[str, Any]:
    """Read the description of an exported file, which has at least `format` and `sha256`.

    Raises:
        InputError: It is missing or is not the description of an exported file.
    """
    about_path = path.with_name(f"{path.name}.json")
    try:
        about = json.loads(read_limited(about_path, MAX_CARD_BYTES))
    except FileNotFoundError:
        if path.suffix == ".json":
            raise InputError(
                f"{path}: is the description of an exported file; check {path.stem} instead"
            ) from None
        raise InputError(
            f"{about_path}: not found; copy it from the folder in which {path.name} was written, "
            "or export the model again"
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{about_path}: cannot be read ({one_line(error)}); export the model again"
        ) from None
    fields = ("format", "sha256")
    if not isinstance(about, dict) or not all(isinstance(about.get(f), str) for f in fields):
        raise InputError(
            f"{about_path}: does not describe an exported file; export the model again"
        )
    return about


def _check_program(path: Path, data: bytes, about: dict[str, Any]) -> str:
    """Load a program, run it on the test clip and compare the logits; see `check_exported`."""
    try:
        program = jax_export.deserialize(bytearray(data))
        version, (low, high) = program.calling_convention_version, _supported_versions()
        if not low <= version <= high:
            raise InputError(
                f"{path}: has calling convention version {version}, but jax {jax.__version__} "
                f"supports {low} to {high}; "
                f"{'export the model again' if version < low else 'update jax'}"
            )
        platform = jax_export.default_export_platform()
        if platform not in program.platforms:
            raise InputError(
                f"{path}: was exported for {', '.join(program.platforms)}, but JAX uses "
                f"{platform}; set JAX_PLATFORMS={program.platforms[0]}"
            )
        logits = _call(program, make_test_clips(_clip_shape(program)))[0]
    except InputError:
        raise
    except Exception as error:  # flatbuffers, MLIR and XLA raise many types
        if memory_problem(error):
            raise
        raise InputError(
            f"{path}: cannot be loaded or run by jax {jax.__version__} ({one_line(error)}); "
            f"use jax {about.get('jax')} or export the model again"
        ) from None
    result = _compare_logits(path, logits, about)
    return f"runs with jax {jax.__version__} on {platform}; {result}; {describe_guarantee(about)}"


def _compare_logits(path: Path, logits: np.ndarray, about: dict[str, Any]) -> str:
    """Compare logits `(num_classes,)` with those of the description; return the result in words.

    Raises:
        InputError: They differ, or are not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError(f"{path}: computes logits that are not finite; export the model again")
    if "test" not in about:
        return "the logits are finite (the description has none to compare with)"
    expected = np.asarray(about["test"]["logits"], np.float32)
    if expected.shape != logits.shape:
        raise InputError(
            f"{path}: computes {len(logits)} logits, but {path.name}.json has {len(expected)}; "
            "export the model again"
        )
    precision = about.get("precision", about["config"]["dtype"])
    tolerance = TOLERANCES[precision] * np.abs(expected).max()
    difference = np.abs(logits - expected).max()
    if not difference <= tolerance:
        raise InputError(
            f"{path}: its logits differ by {difference:.1e} from those at export (tolerance "
            f"{tolerance:.1e}); use jax {about.get('jax')} or export the model again"
        )
    return f"largest difference from the logits at export: {difference:.1e}"


def _check_weights(path: Path, data: bytes, about: dict[str, Any]) -> str:
    """Compare weights with the description and with the network of this version of jaxvid."""
    try:
        weights = load_safetensors(data)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path}: is not a safetensors file ({one_line(error)}); export the model again"
        ) from None
    shapes = {name: list(value.shape) for name, value in weights.items()}
    config = make_model_config(**translate(about["config"]))
    network = {name: list(leaf.shape) for name, leaf in abstract_model(config)[1].items()}
    for expected, owner in ((about["weights"], f"{path.name}.json"), (network, config.name)):
        for name in sorted(shapes.keys() | expected.keys()):
            if shapes.get(name) != expected.get(name):
                raise InputError(
                    f"{path}: {name} has shape {shapes.get(name)} in the file, "
                    f"{expected.get(name)} in {owner}; export the model again"
                )
    return f"{len(shapes)} weights; names and shapes are those of {config.name} in this jaxvid"


def _check_onnx(path: Path, data: bytes, about: dict[str, Any]) -> str:
    """Run an ONNX model on the test clip and compare the logits; see `check_exported`."""
    network = OnnxNetwork(data, str(path))
    logits = network(make_test_clips((1, *network.clip_shape)))[0]
    return f"runs with {network.engine}; {_compare_logits(path, logits, about)}"


def open_onnx(path: Path) -> tuple[OnnxNetwork, dict[str, Any]]:
    """Load an ONNX file, and its description with the fields of a model card.

    Raises:
        InputError: The file or its description is missing or damaged, or has another format.
    """
    data, about = read_exported(path)
    if about["format"] != "onnx":
        raise InputError(
            f"{path}: is a {short_repr(about['format'])} file; choose a file written by jaxvid "
            "export --format onnx"
        )
    try:
        model_card.check_description(about)
    except (InputError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error if isinstance(error, InputError) else repr(error))
        raise InputError(f"{path}.json: {reason}; export the model again") from None
    return OnnxNetwork(data, str(path)), about


def describe_guarantee(about: dict[str, Any]) -> str:
    """Return in words how long a program is guaranteed to load, from its description."""
    compatibility = about.get("compatibility") or {}
    if until := compatibility.get("guaranteed_until"):
        return f"guaranteed for jaxlib released from {compatibility['guaranteed_from']} to {until}"
    jaxlib_version = compatibility.get("jaxlib", about.get("jax"))
    return (
        f"guaranteed for jaxlib released until {BACKWARD_MONTHS} months after jaxlib "
        f"{jaxlib_version}"
    )


def _guarantee(version: str) -> dict[str, str | None]:
    """Return the release date of jaxlib, and those of the first and last jaxlib of the guarantee.

    Args:
        version: Version of the jaxlib that exports.
    """
    released = JAXLIB_RELEASES.get(version)
    dates = (None, None, None)
    if released is not None:
        day = datetime.date.fromisoformat(released)
        first = day - datetime.timedelta(weeks=FORWARD_WEEKS)
        dates = (released, first.isoformat(), _add_months(day, BACKWARD_MONTHS).isoformat())
    return dict(zip(("jaxlib_released", "guaranteed_from", "guaranteed_until"), dates, strict=True))


def _add_months(day: datetime.date, months: int) -> datetime.date:
    """Return the same day of a later month, or that month's last day if it is shorter."""
    years, month = divmod(day.month - 1 + months, 12)
    last = calendar.monthrange(day.year + years, month + 1)[1]
    return day.replace(year=day.year + years, month=month + 1, day=min(day.day, last))


def _supported_versions() -> tuple[int, int]:
    """Return the lowest and highest calling convention version that the installed jax supports."""
    return (
        jax_export.minimum_supported_calling_convention_version,
        jax_export.maximum_supported_calling_convention_version,
    )
