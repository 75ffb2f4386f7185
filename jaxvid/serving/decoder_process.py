"""Decoder processes: a template, and workers that are forked from it; see `DecoderPool`.

    python -m jaxvid.serving.decoder_process FD     started by DecoderPool

The template imports the decoder once and handles no videos. It forks a worker in milliseconds, so
that a worker that crashed or was killed is replaced without delay. It has one thread, which makes
forking safe. Neither the template nor the workers import JAX.

A malicious video may compromise a worker. Therefore workers have resource limits and see one video
at a time, and the server does not unpickle their messages.

A message from a worker is `HEADER`, a JSON document, and the contents of the arrays that the
document lists. Kinds of messages:

| kind | meaning |
|---|---|
| `message` | item that the task has yielded |
| `end` | the task has yielded all items |
| `result` | what the task has returned, if it is not a generator |
| `decode_error`, `input_error` | the task has raised a DecodeError or InputError: `text` |
| `memory_error` | the task needs too much memory; the worker ends |
| `defect` | the task has raised another exception, whose traceback is `text` |
"""

import contextlib
import gc
import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError, memory_problem
from jaxvid.serving.decoder_tasks import Message, Task, UploadedVideo
from jaxvid.serving.limits import Limits

JOB_HEADER = struct.Struct("!Q")  # size of the pickled job
JOB_BYTES = 2**16  # size of the first piece of a job that is read
HEADER = struct.Struct("!QQ")  # of a message: sizes of the JSON document and of the arrays
REQUEST_BYTES = 2**16  # maximum size of a message to the template
MAX_FILES = 32  # open files of a worker


def main() -> None:
    """Fork a worker for each socket that arrives on the socket `FD`, until it is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead workers need no `wait`
    gc.freeze()  # keep the memory of imported modules shared with the workers
    while True:
        request, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 1)
        if not fds:
            return
        if os.fork() == 0:
            control.close()
            _end_after(_work, socket.socket(fileno=fds[0]), pickle.loads(request))
        os.close(fds[0])


def _end_after(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function, and end the process without returning to its caller."""
    try:
        function(*arguments)
    except ConnectionError:  # the server has closed the connection
        os._exit(0)
    except BaseException:
        traceback.print_exc()  # shown if the worker has not yet started
        os._exit(1)
    os._exit(0)


def _work(connection: socket.socket, limits: Limits) -> None:
    """Run the jobs that arrive on a connection, one after the other.

    The first message on the connection has the worker's pidfd. A pidfd never denotes another
    process, even if the pid is used again.
    """
    pidfd = os.pidfd_open(os.getpid())
    _limit_resources(limits)
    socket.send_fds(connection, [b"."], [pidfd])
    reusable = True
    while reusable:
        data, fds, _, _ = socket.recv_fds(connection, JOB_BYTES, 1)
        if not fds:
            return
        try:
            [size] = JOB_HEADER.unpack_from(data)
            job = _complete(connection, data[JOB_HEADER.size :], size)
            reusable = _run_job(connection, fds[0], job, limits)
        finally:
            os.close(fds[0])


def _limit_resources(limits: Limits) -> None:
    """Limit the resources of this process, and disconnect it from the standard streams."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    with contextlib.suppress(OSError):  # if memory runs out, the kernel kills a worker first
        Path("/proc/self/oom_score_adj").write_text("1000")
    values = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: MAX_FILES,
    }
    for kind, value in values.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _run_job(connection: socket.socket, fd: int, job: bytes, limits: Limits) -> bool:
    """Run a task on the video in a file, and send what it yields.

    Args:
        connection: Connection to the server.
        fd: Descriptor of the file.
        job: Pickled task, arguments and time limit in seconds.
        limits: Limits of the video.

    Returns:
        Whether this process can run another job.
    """
    task: Task
    task, arguments, options, seconds = pickle.loads(job)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (used + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        video = UploadedVideo(f"/proc/self/fd/{fd}", limits, seconds)
        result = task(video, *arguments, **options)
        if isinstance(result, dict):
            _send(connection, "result", result)
            return True
        for message in result:
            _send(connection, "message", message)
    except Exception as error:
        _send(connection, *_describe(error, limits))
        return not memory_problem(error)
    _send(connection, "end", {})
    return True


def _describe(error: Exception, limits: Limits) -> tuple[str, Message]:
    """Return the kind and the contents of the message that reports an exception of a task."""
    if memory_problem(error):
        limit = f"needs more than {limits.memory_bytes / 1e9:g} GB of memory"
        return "memory_error", {"text": f"video: {limit}; reduce its frame size"}
    if isinstance(error, DecodeError):
        return "decode_error", {"text": str(error)}
    if isinstance(error, InputError):
        return "input_error", {"text": str(error)}
    return "defect", {"text": traceback.format_exc()}


def _complete(connection: socket.socket, data: bytes, size: int) -> bytes:
    """Read until there are `size` bytes; raise an OSError if the connection is closed."""
    while len(data) < size:
        if not (chunk := connection.recv(size - len(data))):
            raise ConnectionResetError
        data += chunk
    return data


def _send(connection: socket.socket, kind: str, message: Message) -> None:
    """Send a message to the server; block while the server does not read."""
    arrays = {
        name: np.asarray(value)
        for name, value in message.items()
        if isinstance(value, np.ndarray | np.generic)
    }
    document = {
        "kind": kind,
        "values": {name: value for name, value in message.items() if name not in arrays},
        "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
    }
    data = json.dumps(document).encode()
    contents = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays.values()]
    num_bytes = sum(map(len, contents))
    pieces = [HEADER.pack(len(data), num_bytes), data, *contents]
    num_sent = connection.sendmsg(pieces)  # in one call, which wakes the server once
    if num_sent < HEADER.size + len(data) + num_bytes:  # interrupted
        connection.sendall(b"".join(pieces)[num_sent:])


if __name__ == "__main__":
    main()
