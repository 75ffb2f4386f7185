"""Local copies of remote files and folders, so that all other code works with local paths.

Addresses such as `s3://BUCKET/KEY` are translated where they enter a program. In the copy of a
folder, videos and packs are sparse files, whose contents are read when they are needed
(`jaxvid.block_cache`). Messages contain the addresses (`errors.with_addresses`).
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxvid import block_cache, files, object_store
from jaxvid.errors import InputError
from jaxvid.object_store import ObjectInfo, is_remote, to_address

# Files that are copied completely with a data folder, if they are in it or in `TEXT_FOLDERS` of it.
TEXT_SUFFIXES = (".csv", ".json", ".txt")
TEXT_FOLDERS = ("annotations", "annotation")
LABEL_FILES = ("labels.txt", "labels.json")  # files of class names, copied with a list beside them
THREADS = 16
BATCH = 4  # ranges of a file that are read at the same time when it is copied


def default_cache() -> Path:
    """Return the default cache folder of remote files.

    Raises:
        InputError: There is no home directory.
    """
    try:
        return files.cache_dir() / "remote"
    except RuntimeError:
        raise InputError("there is no home directory; set JAXVID_CACHE to a folder") from None


def local_path(path: str | Path, cache: Path | None = None) -> Path:
    """Return the local copy of a data folder or file; of a local path, the path itself.

    The copy is brought up to date. It contains the text files of `TEXT_SUFFIXES`; other files are
    sparse, and must be read with `block_cache.Pinned`.

    Args:
        path: A path or address.
        cache: The cache folder; None: the default.

    Raises:
        InputError: The store cannot be reached, refuses access, or has no such file or folder; or
            the cache cannot be written.
    """
    if not is_remote(path):
        return Path(path)
    return _copy(to_address(path), cache or default_cache(), everything=False)


def complete_copy(path: str | Path) -> Path:
    """Return a copy of a file or folder with all contents; of a local path, the path itself.

    It is meant for models. These copies are in a folder of their own, and are never removed.

    Args:
        path: A path or address. The copy is brought up to date.

    Raises:
        InputError: As in `local_path`.
    """
    if not is_remote(path):
        return Path(path)
    return _copy(to_address(path), default_cache() / "complete", everything=True)


def join(folder: str, path: str) -> str:
    """Return a path that is relative to a folder, or the local path of an address.

    Whether the file exists is not checked; see `look_up`. The result is text, because lists have
    hundreds of thousands of paths, and making a `Path` takes much longer.

    Args:
        folder: The folder; empty: the path is returned unchanged.
        path: A path, or an address.
    """
    if ":/" not in path or not is_remote(path):
        is_complete = path.startswith("/") or not folder
        return path if is_complete else f"{folder.removesuffix('/')}/{path}"
    root = block_cache.root_of(folder) or block_cache.tree(default_cache())
    return str(block_cache.path_of(to_address(path), root))


def look_up(path: Path) -> bool:
    """Create the missing local copy of a remote file; return whether there is such a file.

    The result for a local path is False.

    Raises:
        InputError: The store cannot be reached or refuses access, or the cache cannot be written.
    """
    address = block_cache.address_of(path)
    if address is None or (info := object_store.info(address)) is None:
        return False
    with _cache_errors(path):
        block_cache.place(Path(path), info)
    return True


def _copy(address: str, cache: Path, *, everything: bool) -> Path:
    """Bring the copy of a file or folder up to date and return it."""
    root = block_cache.tree(cache)
    path = block_cache.path_of(address, root)
    with _cache_errors(root):
        has_key = "/" in address.partition("://")[2]
        if has_key and (info := object_store.info(address)):
            is_text = address.endswith(TEXT_SUFFIXES)
            _copy_file(address, path, info, everything or is_text)
            if is_text and not everything:
                _copy_label_files(address.rpartition("/")[0], path.parent)
            return path
        found = object_store.find(address)
        if not found:
            raise InputError(f"{address}: no such file or folder; correct the address")
        _copy_folder(address, path, found, everything)
    return path


def _copy_label_files(address: str, folder: Path) -> None:
    """Copy the files of class names that are beside a list."""
    for name in LABEL_FILES:
        if info := object_store.info(f"{address}/{name}"):
            _copy_file(f"{address}/{name}", folder / name, info, complete=True)
        else:
            block_cache.remove(folder / name)


def _copy_folder(
    address: str, folder: Path, found: dict[str, ObjectInfo], everything: bool
) -> None:
    """Copy the files that `object_store.find` found, and remove copies of other files."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if str(path.relative_to(folder)) not in found and not name.endswith(".partial"):
                block_cache.remove(path)

    def copy(name: str) -> None:
        is_text = name.endswith(TEXT_SUFFIXES) and os.path.dirname(name) in ("", *TEXT_FOLDERS)
        _copy_file(f"{address}/{name}", folder / name, found[name], everything or is_text)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, found):
            pass


def _copy_file(address: str, path: Path, info: ObjectInfo, complete: bool) -> None:
    """Create or update the copy of a file: completely, or as a sparse file."""
    if not complete:
        block_cache.place(path, info)
        return
    with contextlib.suppress(OSError):
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (info.size, info.stamp):
            return
    download(address, path, info)


def download(address: str, path: Path, info: ObjectInfo) -> None:
    """Copy a file completely; the copy appears when it is complete.

    Raises:
        FileNotFoundError: There is no such file any more.
        InputError: The store cannot be reached or refuses access.
        OSError: The copy cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    step = block_cache.MAX_RANGE
    ranges = [(start, min(start + step, info.size)) for start in range(0, info.size, step)]
    try:
        with open(partial, "wb") as file:
            for i in range(0, len(ranges), BATCH):
                file.writelines(object_store.read_ranges(address, ranges[i : i + BATCH]))
        os.utime(partial, ns=(info.stamp, info.stamp))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the cache into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{error}: does not exist any more; run the same command again") from None
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be written ({error.strerror}); set JAXVID_CACHE or "
            "data.cache_dir to another folder"
        ) from None
