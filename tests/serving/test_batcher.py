"""Batches of items of several requests."""

import asyncio
import threading

import numpy as np
import pytest

from jaxvid.serving.batcher import Batcher, NetworkThread


class Network:
    """Doubles its input, and records the sizes of batches and the threads that run it."""

    def __init__(self):
        self.sizes, self.counts, self.threads = [], [], set()
        self.is_free = threading.Event()
        self.is_free.set()

    def run(self, batch):
        self.sizes.append(len(batch))
        self.threads.add(threading.get_ident())
        assert self.is_free.wait(60)
        if (batch < 0).any():
            raise ValueError("negative")
        return {"twice": 2 * batch}


def run_with_batcher(body, *, max_wait=0.0, sizes=(1, 2, 4)):
    """Call an asynchronous function with a `Batcher` and its `Network`."""
    network = Network()

    async def run():
        thread = NetworkThread()
        batcher = Batcher(
            network.run, thread, sizes=sizes, max_wait=max_wait, observe=network.counts.append
        )
        try:
            return await body(batcher, network)
        finally:
            await batcher.close()
            thread.close()

    return asyncio.run(run())


def values(*numbers):
    return [np.array([number]) for number in numbers]


def test_the_only_request_does_not_wait():
    async def run(num_requests):
        network, thread = Network(), NetworkThread()
        options = {"sizes": (1, 2), "max_wait": 60.0, "in_progress": lambda: num_requests}
        batcher = Batcher(network.run, thread, **options)
        try:
            requests = [batcher.submit(values(i)) for i in range(num_requests)]
            await asyncio.gather(*requests)
        finally:
            await batcher.close()
            thread.close()
        return network.sizes

    assert asyncio.run(run(1)) == [1]
    assert asyncio.run(run(2)) == [2]


def test_items_of_several_requests_share_a_batch_in_one_thread():
    async def body(batcher, network):
        requests = [batcher.submit(values(*numbers)) for numbers in ((1,), (2, 3), (4,))]
        return await asyncio.gather(*requests), network

    results, network = run_with_batcher(body, max_wait=60.0)  # a full batch does not wait
    assert [[row["twice"].item() for row in rows] for rows in results] == [[2], [4, 6], [8]]
    assert network.sizes == [4]
    assert network.threads.isdisjoint({threading.get_ident()})
    assert len(network.threads) == 1


def test_batches_are_padded_to_compiled_sizes():
    async def body(batcher, network):
        for count in (1, 2, 3, 7):
            rows = await batcher.submit(values(*range(count)))
            assert [row["twice"].item() for row in rows] == [2 * i for i in range(count)]
        return network

    network = run_with_batcher(body)
    assert network.counts == [1, 2, 3, 4, 3]
    assert network.sizes == [1, 2, 4, 4, 4]


def test_a_partial_batch_starts_after_max_wait():
    async def body(batcher, network):
        await batcher.submit(values(1))
        return network.sizes

    assert run_with_batcher(body, max_wait=0.01) == [1]


def test_items_join_while_the_network_computes():
    async def body(batcher, network):
        network.is_free.clear()
        first = asyncio.create_task(batcher.submit(values(1)))
        while not network.sizes:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.submit(values(i))) for i in range(3)]
        await asyncio.sleep(0.01)
        network.is_free.set()
        await asyncio.gather(first, *others)
        return network.counts

    assert run_with_batcher(body) == [1, 3]


def test_cancelled_requests_leave_the_batch():
    async def body(batcher, network):
        network.is_free.clear()
        first = asyncio.create_task(batcher.submit(values(1)))
        while not network.sizes:
            await asyncio.sleep(0.001)
        cancelled = asyncio.create_task(batcher.submit(values(2, 3)))
        kept = asyncio.create_task(batcher.submit(values(4)))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        network.is_free.set()
        await first
        assert (await kept)[0]["twice"].item() == 8
        assert cancelled.cancelled()
        return network.counts

    assert run_with_batcher(body) == [1, 1]


def test_an_exception_reaches_all_requests_of_the_batch_and_no_other():
    async def body(batcher, network):
        requests = [batcher.submit(values(number)) for number in (-1, 1)]
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert [str(error) for error in errors] == ["negative", "negative"]
        return await batcher.submit(values(3))

    assert run_with_batcher(body, max_wait=0.01, sizes=(1, 2))[0]["twice"].item() == 6


def test_closing_cancels_requests_that_wait():
    async def body(batcher, network):
        request = asyncio.create_task(batcher.submit(values(1)))
        await asyncio.sleep(0.01)
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await request

    run_with_batcher(body, max_wait=60.0)
