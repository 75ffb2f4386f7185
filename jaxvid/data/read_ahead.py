"""Reads the parts of remote videos that the next clips need into the cache, in the background."""

import concurrent.futures
import copy
import functools
import threading
from collections.abc import Sequence

import numpy as np

from jaxvid.block_cache import Pinned, address_of
from jaxvid.data.clips.clip import ClipSpec, clip_frames
from jaxvid.data.formats.packed_videos import PackedVideo, TfdsVideo
from jaxvid.data.protocols import VideoRecord
from jaxvid.errors import DecodeError, InputError

THREADS = 8  # per process

# Id of each video that is being read → the task.
_running: dict[str, concurrent.futures.Future] = {}
_lock = threading.Lock()


def is_read_ahead(records: Sequence[VideoRecord]) -> bool:
    """Return whether the videos are in remote files, judged by the first one."""
    return len(records) > 0 and _is_remote(records[0])


def _is_remote(record: VideoRecord) -> bool:
    return record.path is not None and address_of(record.path) is not None


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="read ahead")


def read_ahead(record: VideoRecord, spec: ClipSpec, rng: np.random.Generator | None = None) -> None:
    """Start to read what a clip needs into the cache: frames of a pack, or a whole file.

    Args:
        record: The video.
        spec: Frame sampling of the clip.
        rng: In training: a generator in the same state as when the clip is loaded, so that the same
            frames are drawn. It is not modified. None: evaluation.
    """
    if not _is_remote(record):
        return
    own_rng = copy.deepcopy(rng)  # Grain uses its generators again
    with _lock:
        _running[record.id] = _pool().submit(_try_to_read, record, spec, own_rng)


def wait(record: VideoRecord) -> None:
    """Wait until the task of a video has ended; cancel it if it has not started.

    Otherwise, the caller and the task could read the same data at the same time.
    """
    with _lock:
        task = _running.pop(record.id, None)
    if task is not None and not task.cancel():
        concurrent.futures.wait([task])


def cancel() -> list[concurrent.futures.Future]:
    """Cancel the tasks that have not started; return those that are running."""
    with _lock:
        tasks = [*_running.values()]
        _running.clear()
    return [task for task in tasks if not task.cancel()]


def _try_to_read(record: VideoRecord, spec: ClipSpec, rng: np.random.Generator | None) -> None:
    """Read what a clip needs; ignore errors, which are raised again when the clip is loaded."""
    try:
        _read(record, spec, rng)
    except (DecodeError, OSError):
        pass
    except InputError:  # the store cannot be reached, so other tasks would only delay the exit
        cancel()


def _read(record: VideoRecord, spec: ClipSpec, rng: np.random.Generator | None) -> None:
    if isinstance(record, TfdsVideo):
        record.fetch()
    elif isinstance(record, PackedVideo):
        with record.open() as video:
            video.fetch(clip_frames(video, spec, rng))
    else:
        Pinned.whole_file(record.path).close()
