"""The server's side of decoder processes; `decoder_process` is the other side."""

import asyncio
import contextlib
import functools
import json
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys

import numpy as np

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.serving.decoder_process import HEADER, JOB_HEADER
from jaxvid.serving.decoder_tasks import Message
from jaxvid.serving.errors import RequestError
from jaxvid.serving.limits import Limits

PROCESS = "jaxvid.serving.decoder_process"
MAX_DOCUMENT_BYTES = 2**26  # of a message, without its arrays

# Environment variables that decoder processes inherit, by name and by prefix: those of the system,
# the interpreter and the libraries that decode. Secrets of the server are not among them.
VARIABLES = (
    *("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE"),
    "PYTHONPYCACHEPREFIX",
)
PREFIXES = ("LC_", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "NPY_", "OPENCV_")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Kind of a message → exception. `decoder_process` describes the kinds.
_ERRORS = {
    "decode_error": DecodeError,
    "memory_error": DecodeError,
    "input_error": functools.partial(RequestError, 400),
    "defect": RuntimeError,
}


class Template:
    """The process from which the workers are forked."""

    def __init__(self):
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROCESS, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=_make_environment(),
                start_new_session=True,  # Ctrl-C must not end tasks of requests in progress
            )

    def fork(self, limits: Limits) -> socket.socket:
        """Request a worker; return the connection to it.

        Raises:
            OSError: The template has died. If it dies later, the connection is closed.
        """
        connection, other = socket.socketpair()
        connection.setblocking(False)
        with other:
            try:
                socket.send_fds(self._control, [pickle.dumps(limits)], [other.fileno()])
            except OSError:
                connection.close()
                raise
        return connection

    def close(self) -> None:
        """End the process; its workers are not affected."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def _make_environment() -> dict[str, str]:
    """Return the environment of decoder processes, without secrets of the server."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in VARIABLES or name.startswith(PREFIXES)
    }
    return inherited | {
        **dict.fromkeys(THREAD_VARIABLES, "1"),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),  # "": this folder
        "PYTHONSAFEPATH": "1",  # do not add the working directory
    }


class Worker:
    """The server's side of a decoder process.

    Args:
        connection: Non-blocking socket that is connected to the process.

    Attributes:
        reusable: Whether the process waits for another task.
    """

    def __init__(self, connection: socket.socket):
        self.reusable = False
        self._connection, self._pidfd = connection, -1

    async def start(self) -> None:
        """Wait until the process has started.

        Raises:
            ConnectionError: It has died.
        """
        try:
            await _wait_readable(self._connection.fileno())
            _, fds, _, _ = socket.recv_fds(self._connection, 1, 1)
            if not fds:
                raise ConnectionResetError
            [self._pidfd] = fds
        except BaseException:
            self._connection.close()  # ends the process
            raise

    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        """Kill the process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until the process has ended."""
        pidfd = os.dup(self._pidfd)  # because `close` may be called meanwhile
        try:
            await _wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """Kill the process, and close the connection. No other method may be running."""
        self.kill()
        self._connection.close()
        os.close(self._pidfd)

    async def send(self, job: bytes, fd: int) -> None:
        """Send a pickled job and the descriptor of its file.

        Raises:
            ConnectionError: The process has died.
        """
        self.reusable = False
        data = JOB_HEADER.pack(len(job)) + job
        num_sent = socket.send_fds(self._connection, [data], [fd])
        if num_sent < len(data):
            await asyncio.get_running_loop().sock_sendall(self._connection, data[num_sent:])

    async def receive(self, max_bytes: int) -> Message | None:
        """Return the next message, or None if all were returned.

        After the last message of a task that does not yield, the process is `reusable`.

        Args:
            max_bytes: Maximum size of the arrays of a message.

        Raises:
            DecodeError: The task has raised it.
            RequestError: The task has raised an InputError.
            RuntimeError: The task has raised another exception, whose traceback is the message.
            ConnectionError: The process has died, or has sent an invalid message.
        """
        try:
            kind, message = await self._receive(max_bytes)
            text = str(message["text"]) if kind in _ERRORS else ""
        except OSError:
            raise
        except Exception as error:  # a compromised decoder may send anything
            raise ConnectionError(f"invalid message ({error})") from error
        self.reusable = kind not in ("message", "memory_error")
        if kind in _ERRORS:
            raise _ERRORS[kind](text)
        return message if kind != "end" else None

    async def _receive(self, max_bytes: int) -> tuple[str, Message]:
        """Return the kind and the contents of the next message."""
        size, num_bytes = HEADER.unpack(await self._read(HEADER.size))
        if size > MAX_DOCUMENT_BYTES or num_bytes > max_bytes:
            raise ValueError(f"{size} and {num_bytes} bytes")
        data = await self._read(size + num_bytes)
        document, position = json.loads(bytes(data[:size])), size
        kind, message = document["kind"], dict(document["values"])
        if kind not in ("message", "result", "end", *_ERRORS):
            raise ValueError(f"the kind {kind}")
        for name, dtype, shape in document["arrays"]:
            if min(shape, default=0) < 0:
                raise ValueError(f"the shape {shape}")
            # NumPy refuses a dtype with Python objects, and a shape that exceeds the data.
            array = np.frombuffer(data, dtype, math.prod(shape), position).reshape(shape)
            message[name] = array[()]  # a scalar if 0-d
            position += array.nbytes
        return kind, message

    async def _read(self, num_bytes: int) -> np.ndarray:
        """Return the next bytes from the connection `(num_bytes,)` uint8."""
        data = np.empty(num_bytes, np.uint8)
        loop, view = asyncio.get_running_loop(), memoryview(data)
        while len(view):
            if not (size := await loop.sock_recv_into(self._connection, view)):
                raise ConnectionResetError("the process has ended")
            view = view[size:]
        return data


async def _wait_readable(fd: int) -> None:
    """Wait until a descriptor is readable."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(fd, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(fd)
