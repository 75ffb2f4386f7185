"""Folders of outputs in an object store, e.g. the workdir of a run.

A program works in a local copy of the folder. Changed files are uploaded when a checkpoint is
complete and when the program ends, then the list of files, `MANIFEST`. A reader on another machine
copies only the files in this list, so that it never sees a part of a checkpoint. The local copy is
kept if the program fails or is killed, and used again if the folder has not been changed from
another machine since. A lock excludes other runs (`jaxvid.remote_lock`).
"""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxvid import object_store, remote, remote_lock
from jaxvid.atomic import output_path, write_json
from jaxvid.block_cache import address_of, path_of
from jaxvid.errors import WORKDIRS, InputError

MANIFEST = ".jaxvid-files.json"
# Unfinished files, and files that are useful only on this machine.
IGNORED = (
    *("*.partial", "*.partial/*", "*.lock", "*.orbax-checkpoint-tmp*", "*.old/*"),
    *(f"*{remote_lock.LOCK}", f"*{MANIFEST}"),
)
THREADS = 8
MAX_ROUNDS = 3  # repetitions of an upload during which files were changed
_push_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class _OpenFolder:
    """A folder that a program writes to.

    Attributes:
        lock: The lock that this process holds.
        sparse: As in `opened`.
    """

    lock: remote_lock.RemoteLock
    sparse: tuple[str, ...]

    def is_sparse(self, name: str) -> bool:
        """Return whether the local copy of a file needs no contents."""
        return _matches(name, self.sparse)


_open_folders: dict[str, _OpenFolder] = {}  # by address


def local_folder(folder: str | Path) -> Path:
    """Return the path of the local copy of a folder. Local paths are returned unchanged."""
    if not remote.is_remote(folder):
        return Path(folder)
    return path_of(remote.to_address(folder), remote.default_cache() / WORKDIRS)


@contextlib.contextmanager
def opened(folder: str | Path, *, sparse: tuple[str, ...] = ()) -> Iterator[Path]:
    """Lock a folder of outputs, yield its local copy, and upload its changes at the end.

    If the body raises an exception, the changes are uploaded too, and the local copy is kept.
    Otherwise, it is removed. A local folder is yielded unchanged, without a lock.

    Args:
        folder: Path or address.
        sparse: Patterns of large files that are not read again. In the local copy they are sparse
            files of the same size, so that they need no disk space once they are uploaded.

    Raises:
        InputError: The store cannot be reached or refuses access, or another run uses the folder.
    """
    local = local_folder(folder)
    if not remote.is_remote(folder):
        yield local
        return
    address = str(output_path(folder))
    with remote_lock.held(address, local) as lock:
        _open_folders[address] = _OpenFolder(lock, sparse)
        try:
            _pull(address, local)
            try:
                yield local
            except BaseException:
                with contextlib.suppress(InputError):  # the exception of the body is raised
                    push(local)
                raise
            push(local)
        finally:
            del _open_folders[address]
        shutil.rmtree(local, ignore_errors=True)
        _state_path(local).unlink(missing_ok=True)


def _state_path(local: Path) -> Path:
    return local.with_name(f".{local.name}.state.json")


def _read_state(local: Path) -> dict:
    """Return the version of the uploaded manifest, and the size and time of each uploaded file."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_state_path(local).read_text(encoding="utf-8"))
    return {"manifest": None, "files": {}}


def _pull(address: str, local: Path) -> None:
    """Make the local copy equal to the folder, unless the local copy is newer."""
    manifest = object_store.info(f"{address}/{MANIFEST}")
    state = _read_state(local)
    if local.is_dir() and state["manifest"] == (manifest and manifest.stamp):
        return
    shutil.rmtree(local, ignore_errors=True)
    stored = object_store.find(address)
    names = [name for name in stored if not _matches(name, IGNORED)]
    if manifest:
        [data] = object_store.read_ranges(f"{address}/{MANIFEST}", [(0, manifest.size)])
        names = [name for name in json.loads(data) if name in stored]

    def copy(name: str) -> None:
        if _open_folders[address].is_sparse(name):
            _write_sparse(local / name, stored[name].size, stored[name].stamp)
        else:
            remote.download(f"{address}/{name}", local / name, stored[name])

    try:
        local.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(copy, names):
                pass
        _write_state(local, manifest and manifest.stamp, _scan(local))
    except OSError as error:
        raise InputError(
            f"{address}: cannot be copied to {local.parent} ({error.strerror}); set JAXVID_CACHE "
            "to another folder"
        ) from None


def _write_sparse(path: Path, size: int, modified: int) -> None:
    """Write, or replace a file by, a sparse file with a size and modification time in ns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.truncate(size)
    os.utime(partial, ns=(modified, modified))
    partial.replace(path)


def _write_state(local: Path, manifest: int | None, files: dict[str, list[int]]) -> None:
    write_json(_state_path(local), {"manifest": manifest, "files": files})


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _scan(local: Path) -> dict[str, list[int]]:
    """Return the size and modification time of each file that is uploaded."""
    files = {}
    for folder, _, names in os.walk(local):
        for name in names:
            path = Path(folder, name)
            relative = str(path.relative_to(local))
            if _matches(relative, IGNORED):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files[relative] = [status.st_size, status.st_mtime_ns]
    return files


def push(local: Path) -> None:
    """Upload the changes of a local copy; do nothing for another folder.

    Raises:
        LostLockError: Another run has taken over the folder. Nothing was uploaded.
        InputError: The store cannot be reached or refuses access.
    """
    address = address_of(local, WORKDIRS)
    if (folder := _open_folders.get(address)) is None:
        return
    with _push_lock:
        folder.lock.check()
        state = _read_state(local)
        uploaded = state["files"]
        for _ in range(MAX_ROUNDS):
            files = _scan(local)
            changed = [name for name, version in files.items() if uploaded.get(name) != version]
            if not changed:
                break
            uploaded = uploaded | _upload(address, local, changed, files)
        if uploaded == state["files"] == files:
            return
        names = sorted(files.keys() & uploaded.keys())
        manifest = f"{address}/{MANIFEST}"
        object_store.write(manifest, json.dumps(names).encode())
        stamp = object_store.info(manifest).stamp
        object_store.delete(f"{address}/{name}" for name in uploaded.keys() - files.keys())
        _write_state(local, stamp, {name: uploaded[name] for name in names})
        # Only now: otherwise, a process that is killed here would later upload the sparse file.
        for name in names:
            if folder.is_sparse(name) and uploaded[name] != state["files"].get(name):
                _write_sparse(local / name, *uploaded[name])


def _upload(
    address: str, local: Path, names: list[str], versions: dict[str, list[int]]
) -> dict[str, list[int]]:
    """Upload files; return the versions of those that were not removed in the meantime."""

    def upload(name: str) -> bool:
        try:
            object_store.upload(local / name, f"{address}/{name}")
        except FileNotFoundError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(upload, names)
        return {name: versions[name] for name, is_done in zip(names, done, strict=True) if is_done}


def replace(address: str, folder: Path, mark: str) -> None:
    """Replace the files at an address by those of a local folder.

    Args:
        address: Address of the folder.
        folder: The local folder.
        mark: Name of the file without which the others are not read. It is deleted first and
            written last, so that a reader never sees files of both versions.

    Raises:
        InputError: The store cannot be reached or refuses access, or there is no such bucket.
    """
    stored, files = object_store.find(address), _scan(folder)
    object_store.delete([f"{address}/{mark}"])
    _upload(address, folder, [name for name in files if name != mark], files)
    object_store.upload(folder / mark, f"{address}/{mark}")
    object_store.delete(f"{address}/{name}" for name in stored.keys() - files.keys())
