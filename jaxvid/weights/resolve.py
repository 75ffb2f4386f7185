"""Models by name: a model folder, a released preset, a weights file, a URL or a Hub repository."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import re
import sys
import urllib.parse
from pathlib import Path

import jax
from flax import nnx

from jaxvid import model_path, remote
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
        if name not in _releases():
            known = ", ".join(_releases())
            raise InputError(f"{name} has no released weights; expected one of {known}")
        folder = _fetch(_release_source(str(name)))
    else:
        folder = resolve_model(name, preset=preset)
    return model_folder.load_model(folder, dtype=dtype)


def resolve_model(
    name: str | Path, *, preset: str | None = None, isolated: bool = False
) -> str | Path:
    """Return the model folder that a name stands for; download and convert weights if needed.

    Names are, in this order: an existing folder, an existing PyTorch checkpoint, a preset with
    released weights, an `http://` or `https://` address of a PyTorch checkpoint, a `gs://` or
    `s3://` address of a PyTorch checkpoint or a model folder, and `hf://USER/REPO` or
    `hf://USER/REPO@REVISION`. Copies and converted weights are kept in the cache.

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
    if remote.is_remote(text) and not _is_address(text, "https?"):
        name = remote.complete_copy(text)
        text = os.fspath(name)
    if os.path.isfile(text) and text.endswith(FILE_SUFFIXES):
        source = _file_source(Path(text), preset)
    elif _is_address(text, "https?"):
        source = _url_source(text, preset)
    elif preset is not None:
        raise InputError(
            f"preset={preset}: {text} is not a PyTorch checkpoint ({', '.join(FILE_SUFFIXES)}) or "
            "its URL; omit the preset"
        )
    elif model_path.exists(text):
        return name
    elif text in _releases() and not os.path.lexists(text):
        source = _release_source(text)
    else:
        raise InputError(model_path.describe_unknown(text))
    return _fetch(source, isolated=isolated)


def _is_address(text: str, scheme: str) -> bool:
    return bool(re.match(f"{scheme}://", text, re.IGNORECASE))


def _releases() -> dict[str, str]:
    """Return the presets with released weights → the address of the file."""
    return {
        name: url
        for name, config in PRESETS.items()
        if (url := family_of(config).released_weights.get(name))
    }


# ------------------------------------------------------------------ PyTorch checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A PyTorch checkpoint.

    Attributes:
        slot: The slot of the cache for its weights.
        preset: Its preset; None: the released preset that it fits.
        any_classes: Whether the number of classes may differ from that of the preset.
        path: The file; None: it is downloaded.
        url: Address of the file if it is downloaded.
        remedy: What to do if the URL does not deliver the file.
    """

    slot: Slot
    preset: str | None
    any_classes: bool = True
    path: Path | None = None
    url: str = ""
    remedy: str = "check the address, or download the file in another way and pass its path"


def _release_source(name: str) -> _Source:
    """Return the source of a preset with released weights."""
    slot, url = Slot(name), _releases()[name]
    file = url.rpartition("/")[2]
    remedy = (
        f"download it in another way, and set {FILES_VARIABLE} to the folder that contains {file}"
    )
    path = None if slot.is_ready() else _find_own_file([file, f"{name}.pth"])
    return _Source(slot=slot, preset=name, any_classes=False, path=path, url=url, remedy=remedy)


def _find_own_file(names: list[str]) -> Path | None:
    """Return the first of the files that exists in the folder `JAXVID_WEIGHTS`."""
    folder = os.environ.get(FILES_VARIABLE)
    if not folder:
        return None
    if not os.path.isdir(folder):
        raise InputError(f"{FILES_VARIABLE}={folder}: is not a folder; choose another one")
    paths = [Path(folder) / name for name in names]
    return next((path for path in paths if path.exists()), None)


def _url_source(url: str, preset: str | None) -> _Source:
    """Return the source of a URL."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    name = f"{Path(_file_name(url)).stem}-{digest[:12]}"
    return _Source(slot=Slot(name, preset or "model"), preset=preset, url=url)


def _file_name(url: str) -> str:
    """Return the name of the file at a URL, without unusual characters."""
    name = Path(urllib.parse.urlsplit(url).path).name or "weights.pth"
    return re.sub(r"[^\w.-]", "_", name)[-80:]


def _file_source(path: Path, preset: str | None) -> _Source:
    """Return the source of a file. Its slot depends on the contents of the file."""
    name = f"{path.stem[-80:]}-{sha256(path)[:12]}"
    return _Source(slot=Slot(name, preset or "model"), preset=preset, path=path)


def _fetch(source: _Source, *, isolated: bool = False) -> Path:
    """Return the model folder of a source; download and convert the file if needed.

    Args:
        source: The source.
        isolated: As in `resolve_model`.
    """
    if not source.slot.is_ready() and (isolated or process_group.current()):
        return _run_in_child(source)
    with source.slot.locked_unless_ready() as is_ready:
        if not is_ready and source.path:
            _convert(source.path, source)
        elif not is_ready:
            _download_and_convert(source)
    return source.slot.model


def _run_in_child(source: _Source) -> Path:
    """Call `_fetch` in a child process, on the CPU."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _use_cpu) as pool:
        try:
            return pool.submit(_fetch, source).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                f"{source.path or source.url}: the process that converts the weights was killed; "
                "free memory and try again"
            ) from None


def _use_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


def _download_and_convert(source: _Source) -> None:
    """Download a file, convert it and delete it.

    If the file is intact but does not fit the preset, it is kept for the next attempt.

    Raises:
        InputError: As in `download` and `_convert`.
    """
    path = source.slot.folder / _file_name(source.url)
    if not path.exists():
        print(f"{source.slot.name}: downloading {source.url}", file=sys.stderr, flush=True)
        download(source.url, path, remedy=source.remedy)
    try:
        _convert(path, source)
    except InputError as error:
        if is_complete(path) and source.slot.is_first_file(sha256(path)):
            raise
        path.unlink()
        raise InputError(f"{source.url} cannot be used: {error}; {source.remedy}") from None
    path.unlink()


def _convert(path: Path, source: _Source) -> None:
    """Convert a file to the model folder of the source's slot, which must be locked.

    Raises:
        InputError: The file is unusable, does not fit the preset, or is not that of the first
            download.
    """
    slot = source.slot
    if not slot.is_first_file(digest := sha256(path)):
        raise InputError(
            f"{path} has the SHA-256 {digest}, which is not that of the first download in "
            f"{slot.record}; delete that record if the authors have replaced their file"
        )
    preset = source.preset or infer_preset(path)
    num_classes = read_num_classes(path, preset) if source.any_classes else None
    converted = convert_file(path, preset, num_classes=num_classes)
    if rules.get_source(converted.kind).is_image_model:
        raise InputError(
            f"{path} is an image ViT; convert it with jaxvid convert, which initialises the "
            "remaining weights"
        )
    slot.record_sha256(digest, path.name)
    if source.path is None:
        converted.card["provenance"]["url"] = source.url
    model_folder.save_model_folder(slot.model, converted.params, converted.card)
    origin = source.path or source.url
    print(f"{origin}: SHA-256 {digest}, converted to {slot.model}", file=sys.stderr, flush=True)
