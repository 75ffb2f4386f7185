"""The page, and the routes that it uses in addition to the API."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jaxvid.data.clips.description import describe_views
from jaxvid.serving import decoder_tasks, page_events, query, samples
from jaxvid.serving.api import classify, describe_models, service_of
from jaxvid.serving.errors import RequestError
from jaxvid.serving.event_stream import EventStream
from jaxvid.serving.openapi import MAX_LIVE_FRAMES, MAX_TOP_K, TOP_K
from jaxvid.serving.report import PAGE, make_report
from jaxvid.serving.samples import Sample
from jaxvid.serving.served_model import Event, ServedModel
from jaxvid.serving.service import Service, guard
from jaxvid.serving.uploads import Upload

SCRIPTS = ("results.js", "timeline.js", "webcam.js", "page.js")
FILES = {"page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
MAX_NAME = 200  # characters of the name of a video in a report
SAMPLES_NOTE = (
    "The demo's model distinguishes eight motions of one bright shape. For other videos its "
    "predictions are meaningless."
)
EXPLAIN_OPTIONS = {
    "model": query.text,
    "top_k": query.whole_number(1, MAX_TOP_K),
    "window": query.seconds,
    "stride": query.seconds,
}


async def index(_: Request) -> Response:
    """Return the page."""
    return FileResponse(PAGE / "index.html", media_type="text/html")


async def static(request: Request) -> Response:
    """Return a file of the page."""
    name = request.path_params["name"]
    if name not in FILES:
        raise RequestError(404, f"/static/{name}: not found")
    return FileResponse(PAGE / name, media_type=FILES[name])


# ------------------------------------------------------------------ initial data of the page


async def page_data(request: Request) -> Response:
    """Return the cards of all models, the sample clips, and whether URLs are allowed."""
    service = service_of(request)
    clips = await _find_samples(service)
    return JSONResponse(
        {
            "cards": _describe_cards(service),
            "allow_urls": service.settings.allow_urls,
            "samples": [
                {"name": clip.name, "title": clip.title, "url": f"samples/{clip.name}"}
                for clip in clips.values()
            ],
            "samples_note": SAMPLES_NOTE if clips else "",
        }
    )


async def sample(request: Request) -> Response:
    """Return a sample clip."""
    name, clips = request.path_params["name"], await _find_samples(service_of(request))
    if name not in clips:
        raise RequestError(404, f"/samples/{name}: not found")
    return Response(clips[name].data, media_type="video/mp4")


def _describe_cards(service: Service) -> list[dict[str, Any]]:
    """Return the cards of all models, with a description of their views and of their clips."""
    cards = describe_models(service)
    for card, model in zip(cards, service.models.values(), strict=True):
        card["description"] = describe_views(model.spec)
        card["clip_seconds"] = page_events.clip_seconds(model)
    return cards


async def _find_samples(service: Service) -> dict[str, Sample]:
    """Return the sample clips by name; empty unless one of the models is the demo's."""
    if not any(samples.is_demo(model.labels) for model in service.models.values()):
        return {}
    return await asyncio.to_thread(_make_samples)


@functools.cache
def _make_samples() -> dict[str, Sample]:
    return {clip.name: clip for clip in samples.make_samples()}


# ------------------------------------------------------------------ videos


async def explain(request: Request) -> EventStream:
    """Classify a video, and send the classes, frames, attention and timeline as events."""
    service, options = service_of(request), query.read(request, EXPLAIN_OPTIONS)
    model = service.find_model(options["model"])
    return EventStream(service, request, lambda upload: _explain(service, model, upload, options))


def _explain(
    service: Service, model: ServedModel, upload: Upload, options: dict[str, Any]
) -> AsyncGenerator[Event]:
    return page_events.explain(
        service,
        model,
        upload,
        top_k=options["top_k"] or TOP_K,
        window=options["window"],
        stride=options["stride"],
    )


async def report(request: Request) -> Response:
    """Return the results of one model, or of all models, for a video as an HTML file."""
    service = service_of(request)
    options = query.read(request, EXPLAIN_OPTIONS | {"name": query.text})
    names = [options["model"]] if options["model"] else [*service.models]
    models = [service.find_model(name) for name in names]
    limit, events = service.settings.limits.stream_seconds, []
    async with service.receive(request) as upload, guard(request, limit):
        for model in models:
            async with contextlib.aclosing(_explain(service, model, upload, options)) as items:
                async for name, data in items:
                    events.append((model.name, name, data))
    cards = [card for card in _describe_cards(service) if card["name"] in names]
    text = make_report((options["name"] or "video")[:MAX_NAME], cards, events)
    headers = {"Content-Disposition": 'attachment; filename="report.html"'}
    return Response(text, media_type="text/html", headers=headers)


async def live_frames(request: Request) -> Response:
    """Classify JPEG images, evenly spaced over the duration of a clip, as one clip."""
    service = service_of(request)
    kinds = {name: EXPLAIN_OPTIONS[name] for name in ("model", "top_k")}
    options = query.read(request, kinds)
    model = service.find_model(options["model"])
    return await classify(
        request,
        model,
        model.spec,
        options["top_k"],
        lambda upload: service.decode(decoder_tasks.live_clip, upload, model.spec, upload.parts),
        max_parts=MAX_LIVE_FRAMES,
    )


ROUTES = [
    Route("/", index),
    Route("/static/{name}", static),
    Route("/samples/{name}", sample),
    Route("/v1/page", page_data),
    Route("/v1/explain", explain, methods=["POST"]),
    Route("/v1/report", report, methods=["POST"]),
    Route("/v1/frames", live_frames, methods=["POST"]),
]
