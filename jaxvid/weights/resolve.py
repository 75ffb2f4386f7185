"""Models by name: a model folder, a released preset, a weights file, a URL or a Hub repository."""

import concurrent.futures
import dataclasses
import difflib
import hashlib
import multiprocessing
import os
import re
import sys
import urllib.parse
from pathlib import Path

import jax
from flax import nnx

from jaxvid import model_path
from jaxvid.distributed import process_group
from jaxvid.errors import InputError
from jaxvid.models import PRESETS, family_of, make_model_config
from jaxvid.storage import model_folder
from jaxvid.weights import hub, rules
from jaxvid.weights.cache import Slot
from jaxvid.weights.conversion import (
    convert_file,
    infer_preset,
    is_complete,
    read_num_classes,
    sha256,
)
from jaxvid.weights.http_download import download

FILES_VARIABLE = "JAXVID_WEIGHTS"
FILE_SUFFIXES = (".pth", ".pt", ".pyth")


def load_model(
    name: str | Path,
    *,
    pretrained: bool = False,
    preset: str | None = None,
    dtype: str | None = None,
) -> nnx.Module:
    """Load a network from a model folder, or with released weights.

    Args:
        name: A model folder, a preset with released weights, a PyTorch checkpoint (file or URL), or
            `hf://USER/REPO`; see `resolve_model`.
        pretrained: Whether `name` is a preset with released weights, even if a folder has this
            name.
        preset: The preset of a PyTorch checkpoint; None: the released preset that it fits.
        dtype: Compute dtype, one of `precision.DTYPES`, or None for that of the model card.

    Returns:
        The network in evaluation mode. `model(video)` maps normalised float clips `(b t h w c)` to
        logits `(b, num_classes)`.

    Raises:
        InputError: The model does not exist, cannot be downloaded, or is damaged.
    """
    if pretrained:
        folder = _fetch_release(_check_release(str(name)))
    else:
        folder = resolve_model(name, preset=preset)
    return model_folder.load_model(folder, dtype=dtype)


def resolve_model(
    name: str | Path, *, preset: str | None = None, isolated: bool = False
) -> str | Path:
    """Return the model folder that a name stands for; download and convert weights if needed.

    Names are, in this order: an existing folder, an existing PyTorch checkpoint, a preset with
    released weights, an `http://` or `https://` address of a PyTorch checkpoint, and
    `hf://USER/REPO` or `hf://USER/REPO@REVISION`. Converted weights are kept in the cache.

    Args:
        name: The name.
        preset: The preset of a PyTorch checkpoint; None: the released preset that it fits.
        isolated: Whether to convert in a child process, for a caller before JAX is initialised for
            a run of several processes. In such a run, a child process is always used.

    Returns:
        The model folder. If it is an existing folder, `name` itself.

    Raises:
        InputError: There is no such model; or it cannot be downloaded or converted.
    """
    text = os.fspath(name)
    if preset is not None:
        make_model_config(preset)  # refuses an unknown name before anything is downloaded
    if _is_address(text, "hf"):
        return hub.download_repo(text)
    is_file = os.path.isfile(text) and text.endswith(FILE_SUFFIXES)
    if not (is_file or _is_address(text, "https?")):
        if preset is not None:
            raise InputError(
                f"preset={preset}: {text} is not a PyTorch checkpoint "
                f"({', '.join(FILE_SUFFIXES)}) or its URL; omit the preset"
            )
        if model_path.exists(text):
            return name
        if os.path.lexists(text):
            raise InputError(model_path.describe_wrong_path(text))
        if text not in _releases():
            raise InputError(_describe_unknown(text))
        if (slot := Slot(text)).is_ready():
            return slot.model
    if isolated or process_group.current():
        return _run_in_child(text, preset)
    if is_file:
        return _fetch_file(Path(text), preset)
    return _fetch_release(text) if text in _releases() else _fetch_url(text, preset)


def _is_address(text: str, scheme: str) -> bool:
    return bool(re.match(f"{scheme}://", text, re.IGNORECASE))


def _releases() -> dict[str, str]:
    """Return the presets with released weights → the address of the file."""
    return {
        name: url
        for name, config in PRESETS.items()
        if (url := family_of(config).released_weights.get(name))
    }


def _check_release(name: str) -> str:
    if name not in _releases():
        raise InputError(
            f"{name} has no released weights; expected one of {', '.join(_releases())}"
        )
    return name


def _describe_unknown(text: str) -> str:
    """Return the error message for a name that stands for nothing."""
    if text in PRESETS:
        return (
            f"{text} has no released weights; train it and pass its model folder, or choose one of "
            f"{', '.join(_releases())}"
        )
    if near := difflib.get_close_matches(text, _releases(), n=1):
        return f"{text} does not exist; did you mean {near[0]}?"
    message = model_path.describe_wrong_path(text)
    return message if message.endswith("?") else f"{message}, or one of {', '.join(_releases())}"


def _run_in_child(name: str, preset: str | None) -> Path:
    """Call `resolve_model` in a child process, on the CPU."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _use_cpu) as pool:
        try:
            return Path(pool.submit(resolve_model, name, preset=preset).result())
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{name}: the process that converts the weights was killed; free memory and try "
                "again"
            ) from None


def _use_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


# ------------------------------------------------------------------ PyTorch checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A PyTorch checkpoint that is to be converted.

    Attributes:
        address: Path or URL.
        slot: The slot of the cache for its weights.
        preset: Its preset; None: the released preset that it fits.
        any_classes: Whether the number of classes may differ from that of the preset.
        remedy: What to do if the URL does not deliver the file.
    """

    address: str
    slot: Slot
    preset: str | None
    any_classes: bool = True
    remedy: str = "check the address, or download the file in another way and pass its path"


def _fetch_release(name: str) -> Path:
    """Return the model folder of a preset with released weights."""
    slot, url = Slot(name), _releases()[name]
    file = url.rpartition("/")[2]
    remedy = (
        f"download it in another way, and set {FILES_VARIABLE} to the folder that contains {file}"
    )
    source = _Source(address=url, slot=slot, preset=name, any_classes=False, remedy=remedy)
    with slot.locked_unless_ready() as is_ready:
        if not is_ready and (path := _find_own_file([file, f"{name}.pth"])):
            _convert(path, dataclasses.replace(source, address=str(path)))
        elif not is_ready:
            _download_and_convert(slot.folder / file, source)
    return slot.model


def _find_own_file(names: list[str]) -> Path | None:
    """Return the first of the files that exists in the folder `JAXVID_WEIGHTS`."""
    folder = os.environ.get(FILES_VARIABLE)
    if not folder:
        return None
    if not os.path.isdir(folder):
        raise InputError(f"{FILES_VARIABLE}={folder}: is not a folder; choose another one")
    paths = [Path(folder) / name for name in names]
    return next((path for path in paths if path.exists()), None)


def _fetch_url(url: str, preset: str | None) -> Path:
    """Return the model folder of a PyTorch checkpoint at a URL."""
    file = Path(urllib.parse.urlsplit(url).path).name or "weights.pth"
    file = re.sub(r"[^\w.-]", "_", file)[-80:]
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    slot = Slot(f"{Path(file).stem}-{digest[:12]}", preset or "model")
    with slot.locked_unless_ready() as is_ready:
        if not is_ready:
            _download_and_convert(
                slot.folder / file, _Source(address=url, slot=slot, preset=preset)
            )
    return slot.model


def _fetch_file(path: Path, preset: str | None) -> Path:
    """Return the model folder of a PyTorch checkpoint."""
    slot = Slot(f"{path.stem[-80:]}-{sha256(path)[:12]}", preset or "model")
    with slot.locked_unless_ready() as is_ready:
        if not is_ready:
            _convert(path, _Source(address=str(path), slot=slot, preset=preset))
    return slot.model


def _download_and_convert(path: Path, source: _Source) -> None:
    """Download a file, convert it and delete it.

    If the file is intact but does not fit the preset, it is kept for the next attempt.

    Args:
        path: The file.
        source: Its URL and preset. The slot must be locked.

    Raises:
        InputError: As in `download` and `_convert`.
    """
    url = source.address
    if not path.exists():
        print(f"{source.slot.name}: downloading {url}", file=sys.stderr, flush=True)
        download(url, path, remedy=source.remedy)
    try:
        _convert(path, source)
    except InputError as error:
        if is_complete(path) and source.slot.is_first_file(sha256(path)):
            raise
        path.unlink()
        raise InputError(f"{url} cannot be used: {error}; {source.remedy}") from None
    path.unlink()


def _convert(path: Path, source: _Source) -> None:
    """Convert a file to the model folder of the source's slot, which must be locked.

    Raises:
        InputError: The file is unusable, does not fit the preset, or is not that of the first
            download.
    """
    slot, address = source.slot, source.address
    if not slot.is_first_file(digest := sha256(path)):
        raise InputError(
            f"{address} has the SHA-256 {digest}, which is not that of the first download in "
            f"{slot.record}; delete this file if the authors have replaced theirs"
        )
    preset = source.preset or infer_preset(path)
    num_classes = read_num_classes(path, preset) if source.any_classes else None
    converted = convert_file(path, preset, num_classes=num_classes)
    if rules.get_source(converted.kind).is_image_model:
        raise InputError(
            f"{address} is an image ViT; convert it with jaxvid convert, which initialises the "
            "remaining weights"
        )
    slot.record_sha256(digest, path.name)
    converted.card["provenance"]["address"] = address
    model_folder.save_model_folder(slot.model, converted.params, converted.card)
    print(f"{address}: SHA-256 {digest}, converted to {slot.model}", file=sys.stderr, flush=True)
