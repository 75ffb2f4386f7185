"""Decoder pool: tasks that decode videos outside the event loop."""

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from jaxvid.serving.limits import Limits


class DecoderPool:
    """Runs the generator functions of `decoder_tasks`.

    Args:
        num_processes: Number of tasks that run at the same time.
        limits: Limits of a task.
    """

    def __init__(self, num_processes: int, limits: Limits):
        self.limits = limits
        self._threads = concurrent.futures.ThreadPoolExecutor(num_processes)

    async def run(
        self, task: Callable[..., Iterator[Any]], fd: int, *args: Any, **options: Any
    ) -> AsyncIterator[Any]:
        """Yield the items of a task, which is called with the path of a file and the limits.

        Args:
            task: Generator function of `decoder_tasks`.
            fd: Descriptor of the uploaded file.
            *args: More arguments of the task.
            **options: Its keyword arguments.

        Raises:
            DecodeError: The video cannot be decoded.
            DecodeTimeoutError: Decoding takes too long.
            OverloadedError: Too many tasks are waiting.
        """
        loop = asyncio.get_running_loop()
        iterator = task(f"/proc/self/fd/{fd}", self.limits, *args, **options)
        while (item := await loop.run_in_executor(self._threads, next, iterator, None)) is not None:
            yield item

    async def close(self) -> None:
        """End all tasks."""
        self._threads.shutdown(cancel_futures=True)
