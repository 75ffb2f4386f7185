"""The routes of the API: predictions, features, timelines, model cards, health and metrics."""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import InputError
from jaxvid.serving import decoder_tasks, query
from jaxvid.serving.errors import RequestError
from jaxvid.serving.event_stream import EventStream
from jaxvid.serving.openapi import MAX_TOP_K, TOP_K, make_document
from jaxvid.serving.served_model import Event, ServedModel
from jaxvid.serving.service import Service, guard
from jaxvid.serving.uploads import Upload


def service_of(request: Request) -> Service:
    """Return the state of the server that received a request."""
    return request.app.state.service


async def classify(
    request: Request,
    model: ServedModel,
    spec: ClipSpec,
    top_k: int | None,
    decode: Callable[[Upload], Awaitable[dict[str, np.ndarray]]],
    *,
    max_parts: int = 1,
) -> Response:
    """Receive a video and return its prediction.

    Args:
        request: The request.
        model: The model.
        spec: Number and sizes of the views.
        top_k: Number of classes; None: `TOP_K`.
        decode: Returns the clips of an upload as `load_eval_views` does.
        max_parts: Maximum number of files in the request.
    """
    service, start = service_of(request), time.perf_counter()
    receiving = service.receive(request, max_parts=max_parts)
    deadline = service.settings.limits.deadline_seconds
    async with receiving as upload, guard(request, deadline), service.reserve(spec):
        received = time.perf_counter()
        clip = await decode(upload)
        decoded = time.perf_counter()
        probabilities = await model.probabilities(clip["video"])
    end = time.perf_counter()
    service.metrics.stages.labels("network").observe(end - decoded)
    seconds = {"decode": decoded - received, "network": end - decoded, "total": end - start}
    return JSONResponse(model.describe_prediction(clip, probabilities, top_k or TOP_K, seconds))


async def predict(request: Request) -> Response:
    """Classify a video."""
    service = service_of(request)
    limits = service.settings.limits
    options = query.read(
        request,
        {
            "model": query.text,
            "top_k": query.whole_number(1, MAX_TOP_K),
            "views": query.whole_number(1, limits.views),
        },
    )
    model = service.find_model(options["model"])
    try:
        spec = model.spec_for(options["views"])
    except InputError as error:
        raise RequestError(400, f"views={options['views']}: {error}") from None
    return await classify(
        request,
        model,
        spec,
        options["top_k"],
        lambda upload: service.decode(decoder_tasks.views, upload, spec),
    )


async def features(request: Request) -> Response:
    """Compute the features of a video."""
    service = service_of(request)
    options = query.read(request, {"model": query.text})
    model = service.find_model(options["model"])
    receiving, seconds = service.receive(request), service.settings.limits.deadline_seconds
    async with receiving as upload, guard(request, seconds), service.reserve(model.spec):
        clip = await service.decode(decoder_tasks.views, upload, model.spec)
        vector = await model.features(clip["video"])
    return JSONResponse({"model": model.name, "vector": vector.tolist()})


async def timeline(request: Request) -> EventStream:
    """Classify sliding windows of a video and send their classes as events."""
    service = service_of(request)
    kinds = {"model": query.text, "top_k": query.whole_number(1, MAX_TOP_K)}
    kinds |= {"window": query.seconds, "stride": query.seconds}
    options = query.read(request, kinds)
    for name in ("window", "stride"):
        if options[name] is None:
            raise RequestError(400, f"{name}: is missing; expected a number of seconds")
    model = service.find_model(options["model"])

    async def events(upload: Upload) -> AsyncIterator[Event]:
        window, top_k = options["window"], options["top_k"] or TOP_K
        items = service.read_windows(model, upload, window, options["stride"])
        async with contextlib.aclosing(items):
            async for event in model.timeline(items, window, top_k):
                yield event

    return EventStream(service, request, events)


def describe_models(service: Service) -> list[dict[str, Any]]:
    """Return the model cards, with the limits of the server."""
    limits = service.settings.limits
    shown = ("upload_bytes", "video_seconds", "pixels", "views", "windows", "deadline_seconds")
    described = {"limits": {name: getattr(limits, name) for name in shown}}
    return [model.describe() | described for model in service.models.values()]


async def list_models(request: Request) -> Response:
    """Return the cards of all models."""
    return JSONResponse(describe_models(service_of(request)))


async def is_alive(_: Request) -> Response:
    """Return status 200 while the server runs."""
    return JSONResponse({"status": "ok"})


async def is_ready(request: Request) -> Response:
    """Return status 200 once all networks are compiled, otherwise 503."""
    status = service_of(request).status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus's text format."""
    text = service_of(request).metrics.to_text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    """Return the OpenAPI document."""
    service = service_of(request)
    return JSONResponse(make_document([*service.models], service.settings))


ROUTES = [
    Route("/v1/predict", predict, methods=["POST"]),
    Route("/v1/features", features, methods=["POST"]),
    Route("/v1/timeline", timeline, methods=["POST"]),
    Route("/v1/model", list_models),
    Route("/healthz", is_alive),
    Route("/readyz", is_ready),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]
