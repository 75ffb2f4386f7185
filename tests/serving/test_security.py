"""Checks of the host, the origin and the token."""

import json

import pytest

from jaxvid.serving.limits import Settings
from tests.serving.running_server import make_fake_model, running

TOKEN = "a-secret"


@pytest.fixture(scope="module")
def private():
    """Return a server with a token and a public name."""
    settings = Settings(token=TOKEN, public_hosts=("videos.example.org",))
    with running([make_fake_model()], settings) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:7860", 200),
        ("192.168.1.5", 200),
        ("[::1]:7860", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("videos.example.org", 421),
        ("a@localhost", 400),
        ("localhost/", 400),
        ("localhost:x", 400),
        ("", 400),
    ],
)
def test_the_host_header_is_checked(server, host, status):
    assert server.request("GET", "/healthz", headers={"Host": host})[0] == status


def test_a_public_name_is_accepted(private):
    for host in ("videos.example.org", "Videos.Example.ORG:443"):
        assert private.request("GET", "/healthz", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost"}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost:1"}, 200),
        ({"Origin": "https://localhost", "Host": "localhost"}, 200),  # behind a proxy with TLS
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_requests_of_other_web_sites_are_refused(server, video, headers, status):
    assert server.request("POST", "/v1/predict", video, headers)[0] == status


def test_no_answer_can_be_read_by_other_web_sites(server, video):
    for method, path in (("GET", "/"), ("GET", "/v1/model"), ("OPTIONS", "/v1/predict")):
        _, headers, _ = server.request(method, path, headers={"Origin": "http://evil.example"})
        assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/v1/model", "/nothing", "/static/page.js"])
def test_all_answers_have_security_headers(server, path):
    _, headers, _ = server.request("GET", path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_the_token_is_required(private, video):
    for path in ("/v1/model", "/metrics", "/nothing"):
        status, headers, body = private.request("GET", path)
        assert (status, json.loads(body)["error"]["status"]) == (401, 401)
        assert headers["www-authenticate"].startswith("Bearer")
    for value in ("Bearer wrong", "Bearer", TOKEN, f"Basic {TOKEN}", "Bearer \xff", "Bearer a b"):
        headers = {"Authorization": value}
        assert private.request("POST", "/v1/predict", video, headers)[0] == 401
    for value in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
        assert private.request("POST", "/v1/predict", video, {"Authorization": value})[0] == 200


def test_the_page_and_health_checks_need_no_token(private):
    for path in ("/", "/static/page.js", "/healthz", "/readyz", "/openapi.json"):
        status, _, body = private.request("GET", path)
        assert status == 200
        assert b"fake" not in body  # the name of the model
