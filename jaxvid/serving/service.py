"""State of a server, and the common steps of requests with a video."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import short_repr
from jaxvid.serving import decoder_tasks, uploads, url_download
from jaxvid.serving.batcher import NetworkThread
from jaxvid.serving.decoder_pool import DecoderPool
from jaxvid.serving.decoder_tasks import held_bytes
from jaxvid.serving.errors import OverloadedError, RequestError
from jaxvid.serving.limits import Settings
from jaxvid.serving.memory_budget import MemoryBudget
from jaxvid.serving.monitoring import Metrics
from jaxvid.serving.served_model import ServedModel
from jaxvid.serving.uploads import Upload
from jaxvid.storage.preprocessing import clip_shape


class Service:
    """Models, decoder processes and metrics of a server.

    Args:
        models: The models; the first one is the default.
        settings: Settings of the server.

    Attributes:
        models: Name → model.
        settings: Settings of the server.
        metrics: Metrics of the server.
        pool: Decoder processes, from `start` to `close`.
        is_stopping: Whether the server accepts no more requests.
        failure: Why a model cannot be used, or None.
        on_failure: Called when `failure` is set.
    """

    def __init__(self, models: Sequence[ServedModel], settings: Settings):
        self.models = {model.name: model for model in models}
        self.settings, self.metrics = settings, Metrics()
        self.pool: DecoderPool | None = None
        self.is_stopping = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._thread: NetworkThread | None = None
        self._starting: asyncio.Task | None = None
        self._requests: set[asyncio.Task] = set()  # those that receive or process a video
        self._has_ended_requests = False
        self._clip_memory = MemoryBudget(settings.limits.decoded_bytes)
        self._timeline_memory = MemoryBudget(settings.limits.timelines_bytes)
        self.metrics.add_gauge(
            "requests_in_progress", "Videos that are being received or processed", self.num_requests
        )
        self.metrics.add_gauge(
            "decoder_queue_length",
            "Videos that wait for a decoder process",
            lambda: self.pool.num_waiting if self.pool else 0,
        )
        self.metrics.add_gauge(
            "decoders_lost",
            "Decoder processes that crashed or were killed, and were replaced",
            lambda: self.pool.num_lost if self.pool else 0,
        )
        self.metrics.add_gauge(
            "network_queue_length",
            "Views, clips and frames that wait for a network",
            lambda: sum(model.num_waiting() for model in models),
        )

    # -------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Start the decoder processes, and compile the networks in the background."""
        self.pool = DecoderPool(self.settings.num_decoders, self.settings.limits)
        self._thread = NetworkThread()
        self._starting = asyncio.create_task(self._start_models())

    async def _start_models(self) -> None:
        try:
            await self.pool.start()
            for model in self.models.values():
                observe = self.metrics.observe_batch
                await model.start(self.settings, self._thread, observe, self.num_requests)
        except Exception as error:
            self.failure = error
            self.on_failure()

    async def close(self) -> None:
        """Stop the networks and the decoder processes."""
        self._starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._starting
        for model in self.models.values():
            await model.close()
        self._thread.close()
        await self.pool.close()

    @property
    def status(self) -> str:
        """`ready`, `compiling` or `stopping`."""
        if self.is_stopping:
            return "stopping"
        is_ready = all(model.is_ready for model in self.models.values())
        return "ready" if is_ready else "compiling"

    def num_requests(self) -> int:
        """Return the number of videos that are being received or processed."""
        return len(self._requests)

    def end_requests(self) -> int:
        """End all requests in progress with status 503; return their number."""
        self._has_ended_requests = True
        for task in self._requests:
            task.cancel()
        return len(self._requests)

    # -------------------------------------------------------------- requests

    def find_model(self, name: str | None) -> ServedModel:
        """Return the model that a request names; None: the first model.

        Raises:
            RequestError: There is no such model, or it is not compiled yet.
        """
        if name is not None and name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise RequestError(400, f"model={short_repr(name)}: must be one of {known}")
        model = self.models[name] if name else next(iter(self.models.values()))
        if self.status == "stopping":
            raise _stopping()
        if not model.is_ready:
            raise RequestError(
                503, "the network is being compiled; try again", {"Retry-After": "5"}
            )
        return model

    @contextlib.asynccontextmanager
    async def receive(self, request: Request, *, max_parts: int = 1) -> AsyncIterator[Upload]:
        """Receive the video of a request; see `uploads.receive`.

        Raises:
            RequestError: The body is refused, or too many requests are in progress.
            ClientDisconnect: The client has closed the connection.
        """
        if len(self._requests) >= self.settings.limits.requests:
            raise OverloadedError
        task = asyncio.current_task()
        self._requests.add(task)
        try:
            receiving = uploads.receive(request, self.settings.limits, max_parts=max_parts)
            start = time.monotonic()
            async with receiving as upload:
                if upload.url:
                    await self._download(upload)
                self.metrics.stages.labels("upload").observe(time.monotonic() - start)
                yield upload
        except asyncio.CancelledError:
            if not self._has_ended_requests:
                raise
            task.uncancel()
            raise _stopping() from None
        finally:
            self._requests.remove(task)

    async def _download(self, upload: Upload) -> None:
        """Download the video whose URL was sent.

        Raises:
            RequestError: URLs are not allowed, or the download fails.
        """
        if not self.settings.allow_urls:
            raise RequestError(
                403, "url: this server downloads no videos (--allow_urls); send the file itself"
            )
        size = await url_download.download(upload.url, upload.file, self.settings.limits)
        upload.parts.append((0, size))

    @contextlib.asynccontextmanager
    async def reserve(self, spec: ClipSpec) -> AsyncIterator[None]:
        """Reserve memory for the decoded views of a video; wait until it is free.

        Args:
            spec: Number and sizes of the views.
        """
        shape = clip_shape(spec, spec.num_clips * spec.num_crops)
        size = math.prod(shape) * np.dtype(spec.eval_dtype).itemsize
        async with self._clip_memory.reserve(size):
            yield

    async def decode(
        self, task: Callable[..., Iterator[Any]], upload: Upload, *args: Any, **options: Any
    ) -> Any:
        """Return the result of a decoder task that returns one message.

        Raises:
            DecodeError: The video cannot be decoded.
            DecodeTimeoutError: Decoding takes too long.
            OverloadedError: Too many requests are waiting.
        """
        with self.metrics.stages.labels("decode").time():
            items = self.pool.run(task, upload.fd, *args, **options)
            async with contextlib.aclosing(items):
                # Exhausted, because closing a task before its end kills its process.
                [item] = [item async for item in items]
                return item

    async def read_windows(
        self, model: ServedModel, upload: Upload, window: float, stride: float
    ) -> AsyncIterator[Any]:
        """Yield the items of the task `windows`: the plan, and then chunks of frames.

        Wait after the plan until there is memory for the frames that windows share.

        Args:
            model: The model, whose preprocessing is used.
            upload: The video.
            window: Length of a window in seconds.
            stride: Time between the starts of consecutive windows in seconds.

        Raises:
            RequestError: There are too many windows.
            DecodeError: The video cannot be decoded.
        """
        items = self.pool.run(
            decoder_tasks.windows,
            upload.fd,
            model.spec,
            window,
            stride,
            align=model.shares_frames,
            chunk=model.spec.num_frames,
            seconds=self.settings.limits.stream_seconds,
        )
        async with contextlib.aclosing(items):
            plan = await anext(items)
            # Windows that share features of frames need much less memory.
            size = 0 if model.shares_frames else held_bytes(plan["indices"], model.spec)
            async with self._timeline_memory.reserve(size):
                yield plan
                async for item in items:
                    yield item


def _stopping() -> RequestError:
    return RequestError(503, "the server is stopping", {"Retry-After": "5"})


@contextlib.asynccontextmanager
async def guard(request: Request, seconds: float) -> AsyncIterator[None]:
    """Cancel the body of the context at a deadline, or when the client disconnects.

    Args:
        request: A request whose body has been received.
        seconds: The deadline.

    Raises:
        RequestError: The deadline has passed.
        ClientDisconnect: The client has closed the connection.
    """
    task, is_gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise RequestError(
            504, f"no response within {seconds:g} s; send a shorter video, or try again later"
        ) from None
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
