"""Requests wait for memory that other requests have reserved."""

import asyncio
import contextlib
import tempfile

from jaxvid.serving.limits import Limits, Settings
from jaxvid.serving.memory_budget import MemoryBudget
from jaxvid.serving.service import Service
from jaxvid.serving.uploads import Upload
from tests.serving.running_server import make_fake_model


async def is_waiting(task: asyncio.Task) -> bool:
    """Return whether a task has not ended after the others have run."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


async def enter(budget: MemoryBudget, size: int) -> None:
    """Reserve memory, and free it."""
    async with budget.reserve(size):
        pass


def test_a_request_waits_until_there_is_enough_memory():
    async def test():
        budget = MemoryBudget(10)
        async with budget.reserve(4):
            async with budget.reserve(6):
                waiting = asyncio.create_task(enter(budget, 5))
                assert await is_waiting(waiting)
            await waiting
            cancelled = asyncio.create_task(enter(budget, 7))
            assert await is_waiting(cancelled)
            cancelled.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled
            await enter(budget, 6)

    asyncio.run(test())


def test_a_request_for_more_than_the_limit_is_alone():
    async def test():
        budget = MemoryBudget(10)
        async with budget.reserve(100):
            waiting = asyncio.create_task(enter(budget, 1))
            assert await is_waiting(waiting)
        await waiting

    asyncio.run(test())


def test_timelines_share_a_limit(video):
    model = make_fake_model()
    settings = Settings(num_decoders=3, limits=Limits(timelines_bytes=1000))

    async def test():
        service = Service([model], settings)
        service.start()
        try:
            with tempfile.TemporaryFile(buffering=0) as file:
                file.write(video)
                first, second = (
                    service.read_windows(model, Upload(file), 0.5, 0.1) for _ in range(2)
                )
                assert "indices" in await anext(first)
                waiting = asyncio.create_task(anext(second))
                await anext(first)
                while service.pool.num_waiting or len(service.pool._busy) < 2:
                    await asyncio.sleep(0.01)
                assert await is_waiting(waiting)
                await first.aclose()
                assert "indices" in await waiting
                await second.aclose()
        finally:
            await service.close()

    asyncio.run(test())
