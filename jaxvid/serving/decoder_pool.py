"""Decoding in processes that are limited in time and memory, and that may crash.

pool = DecoderPool(2, Limits())
async with contextlib.aclosing(pool.run(decoder_tasks.views, fd, spec)) as messages:
    async for message in messages:
        ...
await pool.close()
"""

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
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import numpy as np

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError
from jaxvid.serving.decoder_process import HEADER, JOB_HEADER
from jaxvid.serving.decoder_tasks import Message, Task
from jaxvid.serving.errors import DecodeTimeoutError, OverloadedError, RequestError
from jaxvid.serving.limits import Limits

PROCESS = "jaxvid.serving.decoder_process"
GRACE_SECONDS = 2.0  # a task that exceeds its time limit may report it itself before it is killed
MAX_DOCUMENT_BYTES = 2**26  # of a message, without its arrays
SMOOTHING = 0.1  # weight of the last task in the average duration of tasks


class DecoderPool:
    """Processes that decode videos. Use it in one event loop.

    Every process decodes one video at a time. Tasks with a longer time limit than
    `limits.decode_seconds` leave one process to other tasks, if there are several.

    A task that ends early, because it exceeds a limit, its process crashes or its client has gone
    away, costs a process, which is replaced when the next task starts. Starting a process takes
    milliseconds; see `decoder_process`.

    Args:
        num_processes: Number of videos that are decoded at the same time.
        limits: Limits of a video and of a process, and the length of the queue.

    Attributes:
        num_waiting: Number of tasks that wait for a process.
        num_lost: Number of processes that crashed or were killed.
    """

    def __init__(self, num_processes: int, limits: Limits):
        self.num_waiting = self.num_lost = 0
        self._num_processes, self._limits = num_processes, limits
        self._free = asyncio.Semaphore(num_processes)
        self._free_long = asyncio.Semaphore(max(1, num_processes - 1))
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._task_seconds = 1.0  # average duration
        self._template = _Template()
        self._closed = False

    async def start(self) -> None:
        """Wait until all processes are started.

        Raises:
            InputError: They cannot be started.
        """
        missing = self._num_processes - len(self._idle) - len(self._busy)
        self._idle += [await self._start_worker() for _ in range(missing)]

    async def run(
        self, task: Task, fd: int, *arguments: Any, seconds: float | None = None, **options: Any
    ) -> AsyncIterator[Message]:
        """Run a task in a decoder process.

        Close the generator (`contextlib.aclosing`) if it is not exhausted: this frees the process.

        Args:
            task: Generator function, which the process imports by its name.
            fd: File with the video. It is duplicated, and may be closed after the first message.
            *arguments: Arguments of the task after the video; they are pickled.
            seconds: Time limit, without the time in which the messages are processed; None:
                `limits.decode_seconds`.
            **options: Keyword arguments of the task; they are pickled.

        Yields:
            The messages of the task.

        Raises:
            DecodeError: The video cannot be decoded, exceeds a limit, or crashes the decoder.
            DecodeTimeoutError: Decoding takes too long.
            RequestError: An argument of the task is invalid.
            OverloadedError: Too many tasks are waiting.
            RuntimeError: The task failed in another way, which is a defect; or the pool is closed.
        """
        seconds = self._limits.decode_seconds if seconds is None else seconds
        job = pickle.dumps((task, arguments, options, seconds))
        async with self._slot(is_long=seconds > self._limits.decode_seconds):
            worker = await self._take_worker()
            self._busy.add(worker)
            clock = _Clock(seconds + GRACE_SECONDS)
            try:
                await clock.limit(worker.send(job, fd))
                max_bytes = self._limits.memory_bytes
                while (message := await clock.limit(worker.receive(max_bytes))) is not None:
                    yield message
            except ConnectionError:
                if self._closed:
                    raise RuntimeError("the decoder pool is closed") from None
                raise DecodeError(
                    "video: the decoder process ended unexpectedly; the video is damaged or needs "
                    "too much memory or time"
                ) from None
            finally:
                self._put_back(worker)
                self._task_seconds += SMOOTHING * (clock.seconds - self._task_seconds)

    @contextlib.asynccontextmanager
    async def _slot(self, *, is_long: bool) -> AsyncIterator[None]:
        """Wait until a process is free for a task.

        Args:
            is_long: Whether the task may not use the last free process.

        Raises:
            OverloadedError: Too many tasks are waiting.
        """
        needed = [self._free_long, self._free] if is_long else [self._free]
        is_full = self.num_waiting >= self._limits.queue_length
        if is_full and any(semaphore.locked() for semaphore in needed):
            rounds = (self.num_waiting + 1) / self._num_processes
            raise OverloadedError(max(1, math.ceil(rounds * self._task_seconds)))
        async with contextlib.AsyncExitStack() as stack:
            self.num_waiting += 1
            try:
                for semaphore in needed:
                    await stack.enter_async_context(semaphore)
            finally:
                self.num_waiting -= 1
            yield

    async def _take_worker(self) -> "_Worker":
        """Return an idle worker, or start one."""
        if self._closed:
            raise RuntimeError("the decoder pool is closed")
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive():
                return worker
            self._drop(worker)
        return await self._start_worker()

    async def _start_worker(self) -> "_Worker":
        """Fork a worker from the template; if the template has died, start another one."""
        for _ in range(2):
            template = self._template
            try:
                worker = _Worker(template.fork(self._limits))
                await worker.start()
                return worker
            except OSError:
                if template is self._template:  # otherwise, another task has replaced it
                    template.close()
                    self._template = _Template()
        raise InputError(f"{PROCESS}: cannot be started; see the messages above")

    def _put_back(self, worker: "_Worker") -> None:
        """Keep a worker for the next task, or end it if its task has not ended."""
        self._busy.discard(worker)
        if worker.reusable and not self._closed:
            self._idle.append(worker)
        else:
            self._drop(worker)

    def _drop(self, worker: "_Worker") -> None:
        """End a worker that cannot be used again."""
        self.num_lost += not self._closed
        worker.close()

    async def close(self) -> None:
        """End all processes. Tasks that are running raise a RuntimeError."""
        self._closed = True
        workers = [*self._idle, *self._busy]
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.wait()
        for worker in self._idle:  # busy workers are closed by `run`
            worker.close()
        self._idle.clear()
        self._template.close()


class _Template:
    """The process from which the workers are forked."""

    def __init__(self):
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {
            **os.environ,
            **dict.fromkeys(threads, "1"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONSAFEPATH": "1",  # do not add the working directory
        }
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROCESS, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C must not end tasks that the server still answers
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


class _Worker:
    """A decoder process, as the server sees it.

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
            self._connection.close()  # upon which the process ends
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
        socket.send_fds(self._connection, [JOB_HEADER.pack(len(job))], [fd])
        await asyncio.get_running_loop().sock_sendall(self._connection, job)

    async def receive(self, max_bytes: int) -> Message | None:
        """Return the next message, or None at the end of the task.

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
        except Exception as error:  # a decoder that a video has taken over may send anything
            raise ConnectionError(f"invalid message ({error})") from error
        self.reusable = kind not in ("message", "memory_error")
        if kind in _ERRORS:
            raise _ERRORS[kind](text)
        return message if kind == "message" else None

    async def _receive(self, max_bytes: int) -> tuple[str, Message]:
        """Return the kind and the contents of the next message."""
        size, num_bytes = HEADER.unpack(await self._read(HEADER.size))
        if size > MAX_DOCUMENT_BYTES or num_bytes > max_bytes:
            raise ValueError(f"{size} and {num_bytes} bytes")
        data = await self._read(size + num_bytes)
        document, position = json.loads(bytes(data[:size])), size
        kind, message = document["kind"], dict(document["values"])
        if kind not in ("message", "end", *_ERRORS):
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


# Kind of a message → exception. `decoder_process` describes the kinds.
_ERRORS = {
    "decode_error": DecodeError,
    "memory_error": DecodeError,
    "input_error": functools.partial(RequestError, 400),
    "defect": RuntimeError,
}


class _Clock:
    """Time limit of a task that counts only the time in which it is awaited.

    Attributes:
        seconds: Time that has been counted.
    """

    def __init__(self, limit: float):
        self.seconds = 0.0
        self._limit = limit

    async def limit(self, awaitable: Awaitable[Any]) -> Any:
        """Await something within the rest of the time.

        Raises:
            DecodeTimeoutError: The time is over.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self._limit - self.seconds):
                return await awaitable
        except TimeoutError:
            raise DecodeTimeoutError(self._limit - GRACE_SECONDS) from None
        finally:
            self.seconds += loop.time() - start


async def _wait_readable(fd: int) -> None:
    """Wait until a descriptor is readable."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(fd, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(fd)
