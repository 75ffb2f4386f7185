"""A limit of the memory of all requests: a request reserves memory, or waits until it is free."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class MemoryBudget:
    """A limited number of bytes that requests reserve.

    Args:
        limit: The number of bytes.
    """

    def __init__(self, limit: int):
        self._limit, self._reserved = limit, 0
        self._changed = asyncio.Condition()  # notified when `_reserved` decreases

    @contextlib.asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Reserve memory; wait until it is free.

        Args:
            size: Number of bytes. A request for more than the limit gets all of it.
        """
        size = min(size, self._limit)
        async with self._changed:
            await self._changed.wait_for(lambda: self._reserved + size <= self._limit)
        self._reserved += size
        try:
            yield
        finally:
            self._reserved -= size
            async with self._changed:
                self._changed.notify_all()
