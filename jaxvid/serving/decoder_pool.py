"""Decoding in processes that are limited in time and memory, and that may crash.

pool = DecoderPool(2, Limits())
async with contextlib.aclosing(pool.run(decoder_tasks.views, fd, spec)) as messages:
    async for message in messages:
        ...
await pool.close()
"""

import asyncio
import contextlib
import math
import pickle
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from jaxvid.data.formats.video_reader import DecodeError
from jaxvid.errors import InputError
from jaxvid.serving.decoder_tasks import Message, Task
from jaxvid.serving.decoder_worker import Template, Worker
from jaxvid.serving.errors import DecodeTimeoutError, OverloadedError
from jaxvid.serving.limits import Limits

GRACE_SECONDS = 2.0  # time for a task above its time limit to report it, before it is killed
SMOOTHING = 0.1  # weight of the last task in the average duration of tasks


class DecoderPool:
    """Processes that decode videos. Use it in one event loop.

    Every process decodes one video at a time. Tasks with a longer time limit than
    `limits.decode_seconds` leave one process to other tasks, if there are several.

    A process is killed if its task exceeds a limit or its client disconnects. A killed or crashed
    process is replaced when the next task starts, within milliseconds; see `decoder_process`.

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
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._task_seconds = 1.0  # average duration
        self._template = Template()
        self._closed = False

    async def start(self) -> None:
        """Wait until all processes are started.

        Raises:
            InputError: They cannot be started.
        """
        missing = self._num_processes - len(self._idle) - len(self._busy)
        for _ in range(missing):  # one by one, so that `close` finds them if this is cancelled
            self._idle.append(await self._start_worker())

    async def run(
        self, task: Task, fd: int, *arguments: Any, seconds: float | None = None, **options: Any
    ) -> AsyncIterator[Message]:
        """Run a task in a decoder process.

        Close the generator (`contextlib.aclosing`) if it is not exhausted: this frees the process.

        Args:
            task: Function of `decoder_tasks`, which the process imports by its name.
            fd: File with the video. It is duplicated, and may be closed after the first message.
            *arguments: Arguments of the task after the video; they are pickled.
            seconds: Time limit, without the time in which the messages are processed; None:
                `limits.decode_seconds`.
            **options: Keyword arguments of the task; they are pickled.

        Yields:
            The message that the task returns, or the messages that it yields.

        Raises:
            DecodeError: The video cannot be decoded, exceeds a limit, or crashes the decoder.
            DecodeTimeoutError: Decoding takes too long.
            RequestError: An argument of the task is invalid.
            OverloadedError: Too many tasks are waiting.
            RuntimeError: The task raised an unexpected exception, or the pool is closed.
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
                    if worker.reusable:  # the task has ended
                        break
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

    async def _take_worker(self) -> Worker:
        """Return an idle worker, or start one."""
        if self._closed:
            raise RuntimeError("the decoder pool is closed")
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive():
                return worker
            self._drop(worker)
        return await self._start_worker()

    async def _start_worker(self) -> Worker:
        """Fork a worker from the template; if the template has died, start another one."""
        for _ in range(2):
            template = self._template
            try:
                worker = Worker(template.fork(self._limits))
                await worker.start()
                return worker
            except OSError:
                if template is self._template:  # otherwise, another task has replaced it
                    template.close()
                    self._template = Template()
        raise InputError("the decoder processes cannot be started; see the messages above")

    def _put_back(self, worker: Worker) -> None:
        """Keep a worker for the next task, or end it if its task has not ended."""
        self._busy.discard(worker)
        if worker.reusable and not self._closed:
            self._idle.append(worker)
        else:
            self._drop(worker)

    def _drop(self, worker: Worker) -> None:
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
