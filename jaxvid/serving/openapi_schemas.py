"""JSON schemas of the responses and events of the server; `openapi` has the operations."""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def object_of(properties: Mapping[str, Json], description: str = "") -> Json:
    """Return the schema of an object that always has all properties."""
    schema = {"type": "object", "properties": dict(properties), "required": [*properties]}
    schema |= {"additionalProperties": False}
    return schema | ({"description": description} if description else {})


def array_of(items: Json, description: str = "", **limits: int) -> Json:
    """Return the schema of an array."""
    schema = {"type": "array", "items": items, **limits}
    return schema | ({"description": description} if description else {})


def number(description: str, **limits: float) -> Json:
    """Return the schema of a number."""
    return {"type": "number", "description": description, **limits}


def integer(description: str, **limits: int) -> Json:
    """Return the schema of an integer."""
    return {"type": "integer", "description": description, **limits}


def string(description: str, **more: Any) -> Json:
    """Return the schema of a string."""
    return {"type": "string", "description": description, **more}


def boolean(description: str) -> Json:
    """Return the schema of a boolean."""
    return {"type": "boolean", "description": description}


def reference(name: str) -> Json:
    """Return a reference to one of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Json) -> Json:
    """Return a schema that also allows null."""
    return schema | {"type": [schema["type"], "null"]}


# ------------------------------------------------------------------ responses

MODEL = string("Name of the model.")
PADDED = boolean("Whether frames are repeated to fill a clip.")
TOP = array_of(reference("Class"), "The most likely classes, in descending order of probability.")
ELAPSED = number("Wall time of the timeline so far.", minimum=0)

CARD = {
    "name": MODEL,
    "network": string("Architecture, e.g. xvit_k600."),
    "labels": array_of({"type": "string"}, "Class names in the order of their indices."),
    "labels_source": or_null(string("Origin of the class names; null: the data of the training.")),
    "activation": string("Function from logits to probabilities.", enum=["softmax", "sigmoid"]),
    "preprocessing": {"type": "object", "description": "Preprocessing; see docs/data.md."},
    "protocol": object_of(
        {
            "num_clips": integer("Clips per video.", minimum=1),
            "num_crops": integer("Crops per clip.", minimum=1),
            "views": integer("Views per video: clips times crops.", minimum=1),
        }
    ),
    "provenance": {"type": "object", "description": "Origin of the weights."},
    "limits": object_of(
        {
            "upload_bytes": number("Maximum size of a video."),
            "video_seconds": number("Maximum duration of a video."),
            "pixels": number("Maximum number of pixels of a frame."),
            "views": number("Maximum number of views."),
            "windows": number("Maximum number of windows of a timeline."),
            "deadline_seconds": number("Maximum time from the upload to the response."),
        }
    ),
}
CARD_OF_PAGE = CARD | {
    "description": array_of({"type": "string"}, "Views and preprocessing, one sentence each."),
    "clip_seconds": number("Duration of a clip, or an estimate.", exclusiveMinimum=0),
}
SAMPLE = {
    "name": string("File name."),
    "title": string("What the clip shows."),
    "url": string("Path, relative to the page."),
}

ANSWERS = {
    "Error": object_of({"error": reference("Problem")}),
    "Problem": object_of({"status": integer("HTTP status."), "message": string("One line.")}),
    "Class": object_of(
        {
            "label": string("Name of the class."),
            "index": integer("Index of the class.", minimum=0),
            "probability": number("Its probability.", minimum=0, maximum=1),
        }
    ),
    "Prediction": object_of(
        {
            "model": MODEL,
            "top": TOP,
            "padded": PADDED,
            "seconds": object_of(
                {
                    "decode": number("Waiting for a decoder, and decoding.", minimum=0),
                    "network": number("Waiting for a batch, and computing it.", minimum=0),
                    "total": number("Time until the response is sent.", minimum=0),
                },
                "Wall time on the server.",
            ),
            "warnings": array_of(
                {"type": "string"}, "Unusual properties of the video, one sentence each."
            ),
        }
    ),
    "Features": object_of(
        {
            "model": MODEL,
            "vector": array_of({"type": "number"}, "Features, averaged over the views."),
        }
    ),
    "ModelCard": object_of(CARD),
    "Page": object_of(
        {
            "cards": array_of(object_of(CARD_OF_PAGE), "The cards of all models."),
            "allow_urls": boolean("Whether a request may contain the URL of a video."),
            "samples": array_of(object_of(SAMPLE), "Sample clips."),
            "samples_note": string("Note about the samples; empty if there are none."),
        }
    ),
    "Status": object_of(
        {"status": string("State.", enum=["ok", "ready", "compiling", "stopping"])}
    ),
}

# ------------------------------------------------------------------ events

FRAME = {
    "index": integer("Number of the frame in the video.", minimum=0),
    "time": or_null(number("Seconds from the first frame; null: unknown.")),
    "image": string("JPEG image as a data URL, at most 320 pixels wide and high."),
}

EVENTS = {
    "Plan": object_of(
        {
            "model": MODEL,
            "windows": integer("Number of windows.", minimum=1),
            "window": number("Length of a window in seconds, as requested.", exclusiveMinimum=0),
            "stride": number(
                "Seconds between the starts of windows, which may differ from the requested "
                "stride so that windows share frames.",
                minimum=0,
            ),
            "seconds": number("End of the last window in seconds.", minimum=0),
        }
    ),
    "Window": object_of(
        {
            "start": number("Seconds from the first frame.", minimum=0),
            "end": number("Seconds from the first frame.", minimum=0),
            "padded": PADDED,
            "top": TOP,
        }
    ),
    "Progress": object_of(
        {
            "done": integer("Number of classified windows.", minimum=0),
            "total": integer("Number of windows.", minimum=1),
            "seconds": ELAPSED,
        }
    ),
    "End": object_of({"windows": integer("Number of windows.", minimum=1), "seconds": ELAPSED}),
    "Info": object_of(
        {
            "width": integer("Width of a frame in pixels.", minimum=1),
            "height": integer("Height of a frame in pixels.", minimum=1),
            "frames": integer("Number of frames.", minimum=1),
            "fps": or_null(number("Frames per second; null: unknown.")),
            "seconds": or_null(number("Duration of the video in seconds; null: unknown.")),
            "bytes": integer("Size of the video.", minimum=1),
        }
    ),
    "Frames": object_of(
        {
            "note": string("Description of the frames."),
            "frames": array_of(object_of(FRAME), "The frames of the first clip."),
            "crop_box": array_of(
                {"type": "number"},
                "Top, left, bottom and right edge of the centre crop, relative to the frame.",
                minItems=4,
                maxItems=4,
            ),
        }
    ),
    "Attention": object_of(
        {
            "patches": array_of(
                array_of(array_of({"type": "number"})),
                "Attention to each patch (frames, rows, columns), which sums to 1 in each frame.",
            ),
            "weights": array_of({"type": "number"}, "Attention to each frame, which sums to 1."),
            "notes": array_of({"type": "string"}, "Explanations, one sentence each."),
        }
    ),
    "Empty": object_of({}),
}

SCHEMAS = ANSWERS | EVENTS

# Name of each event → its schema. The last event is `done` or `error`.
WINDOW_EVENTS = {"plan": reference("Plan"), "window": reference("Window")}
ERROR_EVENT = {"error": reference("Problem")}
TIMELINE_EVENTS = (
    WINDOW_EVENTS | {"progress": reference("Progress"), "done": reference("End")} | ERROR_EVENT
)
EXPLAIN_EVENTS = (
    {"prediction": reference("Prediction"), "info": reference("Info")}
    | {"frames": reference("Frames"), "attention": reference("Attention")}
    | WINDOW_EVENTS
    | {"done": reference("Empty")}
    | ERROR_EVENT
)
