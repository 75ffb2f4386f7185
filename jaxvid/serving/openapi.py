"""The OpenAPI document of the API."""

from collections.abc import Mapping
from typing import Any

from jaxvid.serving import uploads
from jaxvid.serving.limits import Settings

API_VERSION = "1"
MAX_TOP_K = 1000
TOP_K = 5  # default

Json = dict[str, Any]

# ------------------------------------------------------------------ schemas


def _object(properties: Mapping[str, Json], description: str = "") -> Json:
    """Return the schema of an object that always has all properties."""
    schema = {"type": "object", "properties": dict(properties), "required": [*properties]}
    schema |= {"additionalProperties": False}
    return schema | ({"description": description} if description else {})


def _array(items: Json, description: str = "") -> Json:
    schema = {"type": "array", "items": items}
    return schema | ({"description": description} if description else {})


def _number(description: str, **limits: float) -> Json:
    return {"type": "number", "description": description, **limits}


def _integer(description: str, **limits: int) -> Json:
    return {"type": "integer", "description": description, **limits}


def _string(description: str, **more: Any) -> Json:
    return {"type": "string", "description": description, **more}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


MODEL = _string("Name of the model.")
PADDED = {"type": "boolean", "description": "Whether frames are repeated to fill a clip."}
TOP = _array(_reference("Class"), "The most likely classes, in descending order of probability.")

SCHEMAS = {
    "Error": _object(
        {"error": _object({"status": _integer("HTTP status."), "message": _string("One line.")})}
    ),
    "Class": _object(
        {
            "label": _string("Name of the class."),
            "index": _integer("Index of the class.", minimum=0),
            "probability": _number("Its probability.", minimum=0, maximum=1),
        }
    ),
    "Prediction": _object(
        {
            "model": MODEL,
            "top": TOP,
            "padded": PADDED,
            "seconds": _object(
                {
                    name: _number(text, minimum=0)
                    for name, text in (
                        ("decode", "Waiting for a decoder, and decoding."),
                        ("network", "Waiting for a batch, and computing it."),
                        ("total", "From the headers of the request to the answer."),
                    )
                },
                "Wall time on the server.",
            ),
            "warnings": _array(
                {"type": "string"}, "Unusual properties of the video, one sentence each."
            ),
        }
    ),
    "Features": _object(
        {
            "model": MODEL,
            "vector": _array({"type": "number"}, "Features, averaged over the views."),
        }
    ),
    "Window": _object(
        {
            "start": _number("Seconds from the first frame.", minimum=0),
            "end": _number("Seconds from the first frame.", minimum=0),
            "padded": PADDED,
            "top": TOP,
        },
        "Data of the event `window`.",
    ),
    "ModelCard": _object(
        {
            "name": MODEL,
            "network": _string("Architecture, e.g. xvit_k600."),
            "labels": _array({"type": "string"}, "Class names in the order of their indices."),
            "labels_source": {
                "type": ["string", "null"],
                "description": "Origin of the class names; null: the data of the training.",
            },
            "activation": _string(
                "Function from logits to probabilities.", enum=["softmax", "sigmoid"]
            ),
            "preprocessing": {"type": "object", "description": "How clips are made: docs/data.md."},
            "protocol": _object(
                {
                    name: _integer(text, minimum=1)
                    for name, text in (
                        ("num_clips", "Clips per video."),
                        ("num_crops", "Crops per clip."),
                        ("views", "Views per video: clips times crops."),
                    )
                }
            ),
            "provenance": {"type": "object", "description": "Origin of the weights."},
            "limits": _object(
                {
                    name: _number(text)
                    for name, text in (
                        ("upload_bytes", "Maximum size of a video."),
                        ("video_seconds", "Maximum duration of a video."),
                        ("pixels", "Maximum number of pixels of a frame."),
                        ("views", "Maximum number of views."),
                        ("windows", "Maximum number of windows of a timeline."),
                        ("deadline_seconds", "Maximum time from the upload to the answer."),
                    )
                }
            ),
        }
    ),
    "Status": _object({"status": _string("State.", enum=["ok", "ready", "compiling", "stopping"])}),
}

EVENTS = """Server-sent events. Their data is JSON.

- `plan`: `{"model", "windows", "stride", "seconds"}`: the number of windows, the seconds between
  their starts, which may differ from the requested ones so that windows share frames, and the
  duration of the video
- `window`: the classes of a window (schema `Window`)
- `progress`: `{"done", "total", "seconds"}`
- `done` (last): `{"windows", "seconds"}`
- `error` (last): `{"status", "message"}`
"""

# ------------------------------------------------------------------ answers

ERRORS = {
    400: "A parameter or the body is invalid.",
    401: "The token is missing or wrong.",
    403: "The request comes from another web site, or URLs are not allowed.",
    404: "There is no such path.",
    405: "The path does not have this method.",
    408: "The upload is too slow.",
    413: "The body is too large.",
    415: "The content type is not that of a video.",
    421: "The host name is not one of this server.",
    422: "The video cannot be decoded or downloaded.",
    429: "Too many requests are waiting.",
    500: "A defect of the server, or the weights are damaged.",
    503: "The network is being compiled, or the server is stopping.",
    504: "There was no answer within the deadline.",
    507: "The disk of the server is full.",
}
ALWAYS = (400, 401, 421, 500)  # statuses of all paths
OF_VIDEOS = (403, 408, 413, 415, 422, 429, 503, 504, 507)
WITH_RETRY_AFTER = (429, 503)


def _errors(*statuses: int) -> Json:
    """Return the answers with these statuses."""
    answers = {}
    for status in statuses:
        answer = {"description": ERRORS[status], "content": _json(_reference("Error"))}
        if status in WITH_RETRY_AFTER:
            schema = {"type": "integer", "minimum": 1}
            description = "Seconds after which to try again."
            answer["headers"] = {"Retry-After": {"description": description, "schema": schema}}
        answers[str(status)] = answer
    return answers


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _answer(description: str, content: Json) -> Json:
    return {"200": {"description": description, "content": content}}


# ------------------------------------------------------------------ operations


def _get(name: str, summary: str, content: Json, *statuses: int, public: bool = False) -> Json:
    """Return a GET operation."""
    answers = _answer(summary, content) | _errors(*ALWAYS, *statuses)
    operation = {"operationId": name, "summary": summary, "responses": answers}
    return {"get": operation | ({"security": []} if public else {})}


def _post(
    name: str, summary: str, parameters: list[Json], content: Json, settings: Settings
) -> Json:
    """Return an operation for a video."""
    binary = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
    form = _object({uploads.FIELD: {"type": "string", "contentMediaType": "video/mp4"}})
    bodies = {
        "video/*": binary,
        "application/octet-stream": binary,
        "multipart/form-data": {"schema": form | {"additionalProperties": True}},
    }
    if settings.allow_urls:
        bodies |= _json(_object({"url": _string("http or https address.", format="uri")}))
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "parameters": parameters,
            "requestBody": {"required": True, "content": bodies},
            "responses": _answer(summary, content) | _errors(*ALWAYS, *OF_VIDEOS),
        }
    }


def _parameter(name: str, schema: Json, *, required: bool = False) -> Json:
    """Return a parameter in the query, described by its schema."""
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {
        "name": name,
        "in": "query",
        "required": required,
        "description": schema["description"],
        "schema": rest,
    }


def _seconds(description: str) -> Json:
    return _number(description, exclusiveMinimum=0)


def make_document(models: list[str], settings: Settings) -> Json:
    """Return the OpenAPI document of a server.

    Args:
        models: Names of the models. A server with a token does not publish them.
        settings: Settings of the server.
    """
    description = "Name of the model (default: the first one of /v1/model)."
    model = _string(description) if settings.token else _string(description, enum=models)
    model = _parameter("model", model)
    top_k = _integer("Number of classes.", minimum=1, maximum=MAX_TOP_K, default=TOP_K)
    top_k = _parameter("top_k", top_k)
    views = _integer(
        "Number of views (default: from the model card). A multiple of the model card's crops has "
        "these crops; another number has one crop per clip.",
        minimum=1,
        maximum=settings.limits.views,
    )
    window = [
        _parameter("window", _seconds("Length of a window in seconds."), required=True),
        _parameter("stride", _seconds("Seconds between the starts of windows."), required=True),
    ]
    events = {"text/event-stream": {"schema": _string(EVENTS)}}
    text = {"text/plain": {"schema": _string("Prometheus's text format.")}}
    status = _json(_reference("Status"))
    cards = _json(_array(_reference("ModelCard")))
    ready = _get("is_ready", "Whether all networks are compiled.", status, public=True)
    ready["get"]["responses"]["503"] = {"description": "Not ready.", "content": status}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxvid",
            "version": API_VERSION,
            "description": "Video classification. See docs/serving.md.",
        },
        "paths": {
            "/v1/predict": _post(
                "predict",
                "Classify a video.",
                [model, top_k, _parameter("views", views)],
                _json(_reference("Prediction")),
                settings,
            ),
            "/v1/features": _post(
                "features",
                "Compute the features of a video.",
                [model],
                _json(_reference("Features")),
                settings,
            ),
            "/v1/timeline": _post(
                "timeline",
                "Classify sliding windows of a video.",
                [model, top_k, *window],
                events,
                settings,
            ),
            "/v1/model": _get("list_models", "The cards of all models.", cards),
            "/healthz": _get("is_alive", "The server runs.", status, public=True),
            "/readyz": ready,
            "/metrics": _get("metrics", "Metrics for Prometheus.", text),
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}] if settings.token else [],
    }
