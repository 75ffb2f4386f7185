"""Local copies of the remote files and folders that a data config names."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from jaxvid import block_cache, remote
from jaxvid.block_cache import DEFAULT_GB
from jaxvid.errors import InputError

__all__ = ["DEFAULT_GB", "use_local_copies"]

Config = TypeVar("Config")


def use_local_copies(data: Config) -> Config:
    """Return a `sources.DatasetConfig` with the paths of up-to-date copies instead of addresses.

    Raises:
        InputError: As in `remote.local_path`; or videos would be written to an address.
    """
    paths = {name: getattr(data, name) for name in ("folder", "list", "prefix")}
    paths = {name: path for name, path in paths.items() if remote.is_remote(path)}
    has_tfds = remote.is_remote(data.tfds_dir)
    if not paths and not has_tfds:
        return data
    if data.source == "motion":
        raise InputError(f"data.folder={data.folder}: must be a local folder; choose another")
    cache = Path(data.cache_dir) if data.cache_dir else remote.default_cache()
    block_cache.set_limit(cache, data.cache_gb)
    copies = {name: str(remote.local_path(path, cache)) for name, path in paths.items()}
    if has_tfds:  # of the data sets in this folder, only the one that is used
        name = data.location.partition("/")[0].partition(":")[0]
        # The metadata is in folders of the configs and versions.
        folder = remote.local_path(f"{data.tfds_dir}/{name}", cache, text_folders=("*",))
        copies["tfds_dir"] = str(folder.parent)
    return dataclasses.replace(data, **copies)
