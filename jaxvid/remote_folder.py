"""Folders of outputs in an object store, e.g. the workdir of a run.

A program works in a local copy of the folder. Changed files are uploaded when a checkpoint is
complete and when the program ends, then the list of files, `MANIFEST`. A reader on another machine
copies only the files in this list, so that it never sees a part of a checkpoint. The local copy is
kept if the program fails or is killed, and used again if the folder has not been changed from
another machine since.
"""

import concurrent.futures
import contextlib
import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from jaxvid import object_store, remote
from jaxvid.atomic import write_json
from jaxvid.errors import WORKDIRS, InputError

MANIFEST = ".jaxvid-files.json"
# Unfinished files, and files that are useful only on this machine.
IGNORED = (
    "*.partial",
    "*.partial/*",
    "*.lock",
    "*.orbax-checkpoint-tmp*",
    "xla_cache/*",
    "*.old/*",
)
THREADS = 8
MAX_ROUNDS = 3  # repetitions of an upload during which files were changed
_push_lock = threading.Lock()


def local_folder(folder: str | Path) -> Path:
    """Return the path of the local copy of a folder; of a local folder, the folder itself."""
    if not remote.is_remote(folder):
        return Path(folder)
    scheme, _, key = remote.to_address(folder).partition("://")
    return remote.default_cache() / WORKDIRS / scheme / key


def _address_of(folder: Path) -> str | None:
    """Return the address of a local copy, or None if the folder is not one."""
    _, marker, rest = str(folder).rpartition(f"/{WORKDIRS}/")
    scheme, _, key = rest.partition("/")
    return f"{scheme}://{key}" if marker else None


@contextlib.contextmanager
def opened(folder: str | Path) -> Iterator[Path]:
    """Yield the local copy of a folder of outputs, and upload its changes at the end.

    They are also uploaded if the body raises an exception. Only if it does not, the copy is removed
    afterwards. A local folder is yielded itself.

    Raises:
        InputError: The store cannot be reached or refuses access.
    """
    local = local_folder(folder)
    if not remote.is_remote(folder):
        yield local
        return
    _pull(remote.to_address(folder), local)
    try:
        yield local
    except BaseException:
        with contextlib.suppress(InputError):  # the exception of the body is raised
            push(local)
        raise
    push(local)
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
    """Make the local copy equal to the folder, unless it is a newer version of it."""
    manifest = object_store.info(f"{address}/{MANIFEST}")
    state = _read_state(local)
    if local.is_dir() and state["manifest"] == (manifest and manifest.stamp):
        return
    shutil.rmtree(local, ignore_errors=True)
    found = object_store.find(address)
    names = [name for name in found if name != MANIFEST]
    if manifest:
        [data] = object_store.read_ranges(f"{address}/{MANIFEST}", [(0, manifest.size)])
        names = [name for name in json.loads(data) if name in found]
    try:
        local.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            jobs = [
                pool.submit(remote.download, f"{address}/{name}", local / name, found[name])
                for name in names
            ]
            for job in jobs:
                job.result()
        _write_state(local, manifest and manifest.stamp, _scan(local))
    except OSError as error:
        raise InputError(
            f"{address}: cannot be copied to {local.parent} ({error.strerror}); set JAXVID_CACHE "
            "to another folder"
        ) from None


def _write_state(local: Path, manifest: int | None, files: dict[str, list[int]]) -> None:
    write_json(_state_path(local), {"manifest": manifest, "files": files})


def _scan(local: Path) -> dict[str, list[int]]:
    """Return the size and modification time of each file that is uploaded."""
    files = {}
    for folder, _, names in os.walk(local):
        for name in names:
            path = Path(folder, name)
            relative = str(path.relative_to(local))
            if any(fnmatch.fnmatch(relative, pattern) for pattern in IGNORED):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files[relative] = [status.st_size, status.st_mtime_ns]
    return files


def push(local: Path) -> None:
    """Upload the changes of a local copy; do nothing for another folder.

    Raises:
        InputError: The store cannot be reached or refuses access.
    """
    if (address := _address_of(local)) is None:
        return
    with _push_lock:
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
