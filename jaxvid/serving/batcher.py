"""Dynamic batching: items of concurrent requests are computed in one batch."""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class NetworkThread:
    """The thread that runs all networks, one batch at a time, in the order of the calls."""

    def __init__(self):
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "network")
        self.lock = asyncio.Lock()

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return the result of a function that is called in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def close(self) -> None:
        """End the thread after its current call."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Item:
    """An item that waits for a batch.

    Attributes:
        value: Its input.
        result: Receives its output; cancelled if the request was cancelled.
        deadline: Loop time at which its batch is started, even if it is not full.
    """

    value: np.ndarray
    result: asyncio.Future
    deadline: float


class Batcher:
    """Dynamic batching for one program of a network.

    A batch starts when it is full, when its first item has waited for `max_wait` seconds, or at
    once if no other request is in progress. While the network computes, more items may join. A
    batch is padded with zeros to the next size that is compiled. Items of cancelled requests leave
    the batch.

    Args:
        run: Maps a batch to an array or a dict of arrays, whose first axis is the batch.
        thread: Thread in which `run` is called.
        sizes: Sizes of batches for which `run` is compiled, ascending.
        max_wait: Seconds.
        observe: Called with the number of items of each batch, before padding.
        in_progress: Returns the number of requests in progress, whose items may join a batch.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], Any],
        thread: NetworkThread,
        *,
        sizes: Sequence[int],
        max_wait: float,
        observe: Callable[[int], None] = lambda size: None,
        in_progress: Callable[[], float] = lambda: math.inf,
    ):
        self._run, self._thread, self._sizes = run, thread, tuple(sizes)
        self._max_wait, self._observe = max_wait, observe
        self._in_progress, self._num_requests = in_progress, 0
        self._waiting: collections.deque[_Item] = collections.deque()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task | None = None

    async def submit(self, values: Sequence[np.ndarray]) -> list[Any]:
        """Return the output of each item, which may be computed in different batches.

        Raises:
            InputError: The outputs are not finite, because the weights are damaged.
        """
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        deadline = loop.time() + self._max_wait
        items = [_Item(value, loop.create_future(), deadline) for value in values]
        self._waiting.extend(items)
        self._arrived.set()
        self._num_requests += 1
        try:
            return await asyncio.gather(*(item.result for item in items))
        finally:
            self._num_requests -= 1

    def __len__(self) -> int:
        """Return the number of items that wait for a batch."""
        return len(self._waiting)

    async def close(self) -> None:
        """Stop; requests that still wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        for item in self._waiting:
            item.result.cancel()

    async def _work(self) -> None:
        """Compute one batch after the other."""
        while True:
            await self._gather()
            async with self._thread.lock:  # more items may arrive before the network is free
                if batch := self._take():
                    await self._compute(batch)

    async def _gather(self) -> None:
        """Wait until a batch is full, or until its first item has waited long enough."""
        loop = asyncio.get_running_loop()
        while len(self._waiting) < self._sizes[-1]:
            left = self._waiting[0].deadline - loop.time() if self._waiting else None
            is_last = self._in_progress() <= self._num_requests  # no other item can arrive
            if left is not None and (left <= 0 or is_last):
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrived.wait()

    def _take(self) -> list[_Item]:
        """Remove the items of the next batch from the queue."""
        batch = []
        while self._waiting and len(batch) < self._sizes[-1]:
            item = self._waiting.popleft()
            if not item.result.done():
                batch.append(item)
        return batch

    async def _compute(self, batch: list[_Item]) -> None:
        """Compute a batch and return its outputs to the requests."""
        self._observe(len(batch))
        try:
            outputs = await self._thread.call(self._run_padded, [item.value for item in batch])
        except Exception as error:
            for item in batch:
                if not item.result.done():
                    item.result.set_exception(error)
            return
        for i, item in enumerate(batch):
            if not item.result.done():
                item.result.set_result(_row(outputs, i))

    def _run_padded(self, values: list[np.ndarray]) -> Any:
        """Run the network on values, padded to the next compiled size."""
        size = next(size for size in self._sizes if size >= len(values))
        batch = np.zeros((size, *values[0].shape), values[0].dtype)
        np.stack(values, out=batch[: len(values)])
        return self._run(batch)


def _row(outputs: Any, i: int) -> Any:
    """Return row `i` of an array or of each array of a dict."""
    if isinstance(outputs, dict):
        return {name: value[i] for name, value in outputs.items()}
    return outputs[i]
