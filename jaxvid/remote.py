"""Local copies of remote files and folders, so that all other code works with local paths.

Addresses such as `s3://BUCKET/KEY` are translated where they enter a program. In the copy of a
folder, videos and packs are sparse files, whose contents are read when they are needed
(`jaxvid.block_cache`). Messages contain the addresses (`errors.with_addresses`).
"""

import concurrent.futures
import contextlib
import fnmatch
import os
from collections.abc import Iterator, Sequence
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


def local_path(
    path: str | Path, cache: Path | None = None, *, text_folders: Sequence[str] = TEXT_FOLDERS
) -> Path:
    """Return the local copy of a data folder or file. Local paths are returned unchanged.

    The copy is brought up to date. It contains the text files of `TEXT_SUFFIXES`; other files are
    sparse, and must be read with `block_cache.Pinned`.

    Args:
        path: A path or address.
        cache: The cache folder; None: the default.
        text_folders: Patterns of the folders, relative to a data folder, whose text files are
            copied. Those in the data folder itself always are. Other text files are sparse.

    Raises:
        InputError: The store cannot be reached, refuses access, or has no such file or folder; or
            the cache cannot be written.
    """
    if not is_remote(path):
        return Path(path)
    return _copy(to_address(path), cache or default_cache(), text_folders)


def complete_copy(path: str | Path) -> Path:
    """Copy a file or folder with all its contents. Local paths are returned unchanged.

    This is meant for models. These copies are in a folder of their own, and are never removed.

    Args:
        path: A path or address. The copy is brought up to date.

    Raises:
        InputError: As in `local_path`.
    """
    if not is_remote(path):
        return Path(path)
    return _copy(to_address(path), default_cache() / "complete", None)


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
    copy = block_cache.split_path(folder)
    root = copy.root if copy else block_cache.tree(default_cache())
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


def _copy(address: str, cache: Path, text_folders: Sequence[str] | None) -> Path:
    """Bring the copy of a file or folder up to date and return it.

    `text_folders` is as in `local_path`; None: all files are copied completely.
    """
    root = block_cache.tree(cache)
    path = block_cache.path_of(address, root)
    with _cache_errors(root):
        has_key = "/" in address.partition("://")[2]
        if has_key and (info := object_store.info(address)):
            is_text = address.endswith(TEXT_SUFFIXES)
            _copy_file(address, path, info, complete=is_text or text_folders is None)
            if is_text and text_folders is not None:
                _copy_label_files(address.rpartition("/")[0], path.parent)
            return path
        stored = object_store.find(address)
        if not stored:
            raise InputError(f"{address}: no such file or folder; correct the address")
        _copy_folder(address, path, stored, text_folders)
    return path


def _copy_label_files(address: str, folder: Path) -> None:
    """Copy the files of class names that are beside a list."""
    for name in LABEL_FILES:
        if info := object_store.info(f"{address}/{name}"):
            _copy_file(f"{address}/{name}", folder / name, info, complete=True)
        else:
            block_cache.remove(folder / name)


def _copy_folder(
    address: str, folder: Path, stored: dict[str, ObjectInfo], text_folders: Sequence[str] | None
) -> None:
    """Copy the files of a folder, and remove copies of other files.

    `stored` is the result of `object_store.find`, `text_folders` is as in `_copy`.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if str(path.relative_to(folder)) not in stored and not name.endswith(".partial"):
                block_cache.remove(path)

    def is_complete(name: str) -> bool:
        if text_folders is None:
            return True
        parent = os.path.dirname(name)
        is_copied = not parent or any(fnmatch.fnmatch(parent, text) for text in text_folders)
        return is_copied and name.endswith(TEXT_SUFFIXES)

    def copy(name: str) -> None:
        _copy_file(f"{address}/{name}", folder / name, stored[name], is_complete(name))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, stored):
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
