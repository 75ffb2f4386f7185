"""The OpenAPI document describes all routes and their answers."""

import json
import re

import pytest

from jaxvid.serving.app import make_app
from jaxvid.serving.limits import Limits, Settings
from jaxvid.serving.openapi import ERRORS, SCHEMAS, make_document
from jaxvid.serving.security import PUBLIC_FOLDERS, PUBLIC_PATHS
from tests.serving.hostile_bodies import make_jpeg
from tests.serving.running_server import make_attentive_model, make_fake_model, running
from tests.serving.test_api import make_form

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "null": type(None),
}
KEYWORDS = {
    *("type", "description", "properties", "required", "additionalProperties", "items", "enum"),
    *("minimum", "maximum", "exclusiveMinimum", "default", "format", "minLength"),
    *("contentMediaType", "$ref", "minItems", "maxItems"),
}


def check(value, schema: dict) -> None:
    """Check a value against a schema with the keywords `KEYWORDS`."""
    if "$ref" in schema:
        check(value, SCHEMAS[schema["$ref"].rpartition("/")[2]])
        return
    assert {*schema} <= KEYWORDS
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(isinstance(value, TYPES[kind]) for kind in kinds), (value, schema)
    assert value in schema.get("enum", [value])
    if "minimum" in schema:
        assert value >= schema["minimum"]
    if "exclusiveMinimum" in schema:
        assert value > schema["exclusiveMinimum"]
    if "maximum" in schema:
        assert value <= schema["maximum"]
    if "properties" in schema:
        assert {*schema["required"]} <= {*value}
        assert schema["additionalProperties"] or {*value} <= {*schema["properties"]}
        for name, inner in value.items():
            check(inner, schema["properties"].get(name, {"type": [*TYPES]}))
    if "items" in schema and isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        for inner in value:
            check(inner, schema["items"])


@pytest.fixture(scope="module")
def document() -> dict:
    return make_document(["fake"], Settings())


def schema_of(document: dict, method: str, path: str, status: int) -> dict:
    """Return the schema of an answer."""
    operation = document["paths"][path][method.lower()]
    return operation["responses"][str(status)]["content"]["application/json"]["schema"]


def test_all_routes_are_described(document):
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    routes = {
        (route.path, method.lower())
        for route in make_app([make_fake_model()], Settings()).routes
        for method in route.methods - {"HEAD"}
    }
    assert described == routes
    names = [o["operationId"] for item in document["paths"].values() for o in item.values()]
    assert len({*names}) == len(names)


def test_all_references_exist(document):
    names = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert {*names} == {*SCHEMAS}


def test_answers_fit_their_schemas(server, document, video):
    form, headers = make_form({"video": video})
    cases = [
        ("POST", "/v1/predict", "?top_k=2", form, headers, 200),
        ("POST", "/v1/features", "", video, {}, 200),
        ("GET", "/v1/model", "", None, {}, 200),
        ("GET", "/healthz", "", None, {}, 200),
        ("GET", "/readyz", "", None, {}, 200),
        ("GET", "/v1/page", "", None, {}, 200),
        ("GET", "/openapi.json", "", None, {}, 200),
        ("POST", "/v1/frames", "", *make_form({"video": make_jpeg(72, 72)}), 200),
        ("POST", "/v1/frames", "", video, {}, 422),
        ("POST", "/v1/report", "?window=0", video, {}, 400),
        ("POST", "/v1/predict", "?top_k=x", video, {}, 400),
        ("POST", "/v1/predict", "", video, {"Origin": "http://evil.example"}, 403),
        ("POST", "/v1/features", "", b"x", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/timeline", "?window=1&stride=1", b"not a video", {}, 422),
        ("GET", "/v1/model", "", None, {"Host": "evil.example"}, 421),
    ]
    for method, path, query, body, headers, expected in cases:
        status, answer_headers, answer = server.request(method, path + query, body, headers)
        assert status == expected, answer
        assert answer_headers["content-type"] == "application/json"
        check(json.loads(answer), schema_of(document, method, path, status))


@pytest.mark.parametrize(
    ("path", "query"),
    [("/v1/timeline", "?window=1&stride=0.5"), ("/v1/explain", "?window=1"), ("/v1/explain", "")],
)
def test_events_fit_their_schemas(document, video, path, query):
    model = make_attentive_model()
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    with running([model]) as server:
        events = server.post_events(path + query, video)
    for name, data in events:
        check(data, content["x-events"][name])
    if query:
        assert {name for name, _ in events} == {*content["x-events"]} - {"error"}


def test_the_events_of_a_failure_fit_their_schemas(document, video):
    content = document["paths"]["/v1/explain"]["post"]["responses"]["200"]["content"]
    with running([make_fake_model()], Settings(limits=Limits(windows=1))) as server:
        *_, (name, data) = server.post_events("/v1/explain?window=0.5&stride=0.1", video)
    assert name == "error"
    check(data, content["text/event-stream"]["x-events"]["error"])


def test_the_served_document_has_the_settings(document):
    with running([make_fake_model("a"), make_fake_model("b")], Settings(allow_urls=True)) as server:
        served = server.get("/openapi.json")
    operation = served["paths"]["/v1/predict"]["post"]
    assert operation["parameters"][0]["schema"]["enum"] == ["a", "b"]
    assert "application/json" in operation["requestBody"]["content"]
    assert served["security"] == document["security"] == []


def test_a_server_with_a_token_does_not_name_its_models():
    document = make_document(["secret_name"], Settings(token="a"))
    assert document["security"] == [{"token": []}]
    assert "secret_name" not in json.dumps(document)


def test_operations_that_need_no_token_are_marked(document):
    for path, item in document["paths"].items():
        is_public = path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDERS)
        for operation in item.values():
            assert (operation.get("security") == []) == is_public, path


def test_every_described_error_is_possible(document):
    used = {
        int(status)
        for item in document["paths"].values()
        for operation in item.values()
        for status in operation["responses"]
    }
    assert used - {200} == {*ERRORS} - {405}  # of methods that are not described
