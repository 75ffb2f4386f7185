"""The OpenAPI document of the API."""

from collections.abc import Mapping, Sequence

from jaxvid.serving import uploads
from jaxvid.serving.limits import Settings
from jaxvid.serving.openapi_schemas import (
    EXPLAIN_EVENTS,
    SCHEMAS,
    TIMELINE_EVENTS,
    Json,
    array_of,
    integer,
    number,
    object_of,
    reference,
    string,
)

API_VERSION = "1"
MAX_TOP_K = 1000
TOP_K = 5  # default
MAX_LIVE_FRAMES = 256

# ------------------------------------------------------------------ responses

ERRORS = {
    400: "A parameter or the body is invalid.",
    401: "The token is missing or wrong.",
    403: "The request is cross-origin, or URLs are not allowed.",
    404: "There is no such path or file.",
    405: "The path does not have this method.",
    408: "The upload is too slow.",
    413: "The body is too large.",
    415: "The content type is not that of a video.",
    421: "The `Host` header does not name this server.",
    422: "The video cannot be decoded or downloaded.",
    429: "Too many requests are waiting.",
    500: "Internal error, or the weights are damaged.",
    503: "The network is being compiled, or the server is stopping.",
    504: "The deadline has passed.",
    507: "The disk of the server is full.",
}
ALWAYS = (400, 401, 421, 500)  # statuses of all paths
OF_VIDEOS = (403, 408, 413, 415, 422, 429, 503, 504, 507)
WITH_RETRY_AFTER = (429, 503)


def _errors(*statuses: int) -> Json:
    """Return the responses with these statuses."""
    answers = {}
    for status in statuses:
        answer = {"description": ERRORS[status], "content": _json(reference("Error"))}
        if status in WITH_RETRY_AFTER:
            schema = {"type": "integer", "minimum": 1}
            description = "Seconds after which to try again."
            answer["headers"] = {"Retry-After": {"description": description, "schema": schema}}
        answers[str(status)] = answer
    return answers


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _text(media_type: str, description: str) -> Json:
    return {media_type: {"schema": string(description)}}


def _events(events: Mapping[str, Json]) -> Json:
    """Return the content of a stream of events.

    Args:
        events: Name of each event → schema of its data. OpenAPI 3.1 has no field for it.
    """
    description = "Server-sent events. Their data is JSON; `x-events` has its schemas."
    # Without a type, because some tools apply the schema to the stream, others to each event.
    return {"text/event-stream": {"schema": {"description": description}, "x-events": dict(events)}}


def _answer(description: str, content: Json) -> Json:
    return {"200": {"description": description, "content": content}}


# ------------------------------------------------------------------ operations


def _get(
    name: str,
    summary: str,
    content: Json,
    *statuses: int,
    parameters: Sequence[Json] = (),
    public: bool = False,
) -> Json:
    """Return a GET operation."""
    answers = _answer(summary, content) | _errors(*ALWAYS, *statuses)
    operation = {"operationId": name, "summary": summary, "responses": answers}
    operation |= {"parameters": [*parameters]} if parameters else {}
    return {"get": operation | ({"security": []} if public else {})}


def _post(name: str, summary: str, parameters: list[Json], bodies: Json, content: Json) -> Json:
    """Return an operation for a video."""
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "parameters": parameters,
            "requestBody": {"required": True, "content": bodies},
            "responses": _answer(summary, content) | _errors(*ALWAYS, *OF_VIDEOS),
        }
    }


def _form(field: Json) -> Json:
    """Return the content of a form with the field `video`; other fields are ignored."""
    schema = object_of({uploads.FIELD: field}) | {"additionalProperties": True}
    return {"multipart/form-data": {"schema": schema}}


def _video_bodies(settings: Settings) -> Json:
    """Return the contents that a request for a video may have."""
    binary = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
    bodies = {"video/*": binary, "application/octet-stream": binary}
    bodies |= _form({"type": "string", "contentMediaType": "video/mp4"})
    if settings.allow_urls:
        bodies |= _json(object_of({"url": string("http or https address.", format="uri")}))
    return bodies


def _picture_bodies() -> Json:
    """Return the content of a request for live frames."""
    picture = {"type": "string", "contentMediaType": "image/jpeg"}
    words = "JPEG images of one size, evenly spaced over the duration of a clip."
    return _form(array_of(picture, words, minItems=1, maxItems=MAX_LIVE_FRAMES))


def _parameter(name: str, schema: Json, *, place: str = "query", required: bool = False) -> Json:
    """Return a parameter, described by its schema."""
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": schema["description"],
        "schema": rest,
    }


def _model_parameter(default: str, models: list[str], settings: Settings) -> Json:
    """Return the parameter `model`. A server with a token does not publish the names."""
    description = f"Name of the model (default: {default})."
    return _parameter(
        "model", string(description) if settings.token else string(description, enum=models)
    )


def _window_parameters(window: str, stride: str, *, required: bool) -> list[Json]:
    """Return the parameters `window` and `stride`; their defaults are described."""
    descriptions = {
        "window": f"Length of a window in seconds{window}.",
        "stride": f"Seconds between the starts of windows{stride}.",
    }
    return [
        _parameter(name, number(description, exclusiveMinimum=0), required=required)
        for name, description in descriptions.items()
    ]


def _top_k_parameter() -> Json:
    schema = integer("Number of classes.", minimum=1, maximum=MAX_TOP_K, default=TOP_K)
    return _parameter("top_k", schema)


# ------------------------------------------------------------------ paths


def _api_paths(models: list[str], settings: Settings) -> Json:
    """Return the operations of `api.ROUTES`."""
    model = _model_parameter("the first one of /v1/model", models, settings)
    top_k, bodies = _top_k_parameter(), _video_bodies(settings)
    views = integer(
        "Number of views (default: from the model card). If it is a multiple of the model card's "
        "number of crops, each clip has these crops; otherwise one.",
        minimum=1,
        maximum=settings.limits.views,
    )
    status = _json(reference("Status"))
    ready = _get("is_ready", "Whether all networks are compiled.", status, public=True)
    ready["get"]["responses"]["503"] = {"description": "Not ready.", "content": status}
    return {
        "/v1/predict": _post(
            "predict",
            "Classify a video.",
            [model, top_k, _parameter("views", views)],
            bodies,
            _json(reference("Prediction")),
        ),
        "/v1/features": _post(
            "features",
            "Compute the features of a video.",
            [model],
            bodies,
            _json(reference("Features")),
        ),
        "/v1/timeline": _post(
            "timeline",
            "Classify sliding windows of a video.",
            [model, top_k, *_window_parameters("", "", required=True)],
            bodies,
            _events(TIMELINE_EVENTS),
        ),
        "/v1/model": _get(
            "list_models", "The cards of all models.", _json(array_of(reference("ModelCard")))
        ),
        "/healthz": _get("is_alive", "Whether the server runs.", status, public=True),
        "/readyz": ready,
        "/metrics": _get(
            "metrics", "Metrics for Prometheus.", _text("text/plain", "Prometheus's text format.")
        ),
        "/openapi.json": _get("openapi", "This document.", _json({"type": "object"}), public=True),
    }


def _page_paths(models: list[str], settings: Settings) -> Json:
    """Return the operations of `page_routes.ROUTES`."""
    model = _model_parameter("the first one of /v1/model", models, settings)
    all_models = _model_parameter("all models", models, settings)
    windows = _window_parameters(
        " (default: the duration of a clip)",
        " (default: a quarter of a window, or more for long videos)",
        required=False,
    )
    top_k, bodies = _top_k_parameter(), _video_bodies(settings)
    title = _parameter("name", string("Name of the video in the title.", default="video"))
    file = _parameter("name", string("File name."), place="path", required=True)
    html = _text("text/html", "HTML page.")
    files = _text("text/css", "Style sheet.") | _text("text/javascript", "Script.")
    clip = {"video/mp4": {"schema": string("MP4 file.", format="binary")}}
    return {
        "/": _get("index", "The page.", html, public=True),
        "/static/{name}": _get(
            "static", "A file of the page.", files, 404, parameters=[file], public=True
        ),
        "/samples/{name}": _get(
            "sample", "A sample clip of the page.", clip, 404, parameters=[file], public=True
        ),
        "/v1/page": _get("page_data", "Initial data of the page.", _json(reference("Page"))),
        "/v1/explain": _post(
            "explain",
            "Classify a video; send its classes, frames, attention and timeline.",
            [model, top_k, *windows],
            bodies,
            _events(EXPLAIN_EVENTS),
        ),
        "/v1/report": _post(
            "report",
            "Make a report of the results for a video, as one HTML file.",
            [all_models, top_k, *windows, title],
            bodies,
            html,
        ),
        "/v1/frames": _post(
            "live_frames",
            "Classify images as the frames of one clip.",
            [model, top_k],
            _picture_bodies(),
            _json(reference("Prediction")),
        ),
    }


def make_document(models: list[str], settings: Settings) -> Json:
    """Return the OpenAPI document of a server.

    Args:
        models: Names of the models. A server with a token does not publish them.
        settings: Settings of the server.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxvid",
            "version": API_VERSION,
            "description": "Video classification. See docs/serving.md.",
        },
        "paths": _api_paths(models, settings) | _page_paths(models, settings),
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}] if settings.token else [],
    }
