"""Model folders on the Hugging Face Hub, against a stub of its API on this machine."""

import base64
import hashlib
import http.server
import json
import re
import sys
import threading

import numpy as np
import pytest

import jaxvid
from jaxvid.errors import InputError
from jaxvid.models import split_params
from jaxvid.storage import model_card
from jaxvid.weights.resolve import load_model, resolve_model

REPO = "someone/motion"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests that `huggingface_hub` makes for one repository of small files."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    exists = False

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if f"/api/models/{REPO}" not in path and not path.startswith(f"/{REPO}/"):
            return self.reply(404, X_Error_Code="RepoNotFound")
        if not self.exists:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if match := re.fullmatch(rf"/{REPO}/resolve/\w+/(.+)", path):
            if match[1] not in self.files:
                return self.reply(404, X_Error_Code="EntryNotFound")
            data = self.files[match[1]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.reply(200, data, ETag=etag, X_Repo_Commit=SHA)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in self.files.items()
                ]
            )
        siblings = [{"rfilename": name} for name in self.files]
        return self.reply_json({"id": REPO, "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.reply(401)
        if self.path == "/api/repos/create":
            type(self).exists = True
            return self.reply_json({"url": f"http://{self.headers['Host']}/{REPO}"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.reply_json({"files": [{"path": name} | modes for name in names]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.files[value["path"]]
            url = f"http://{self.headers['Host']}/{REPO}/commit/{SHA}"
            return self.reply_json({"commitUrl": url, "commitOid": SHA, "success": True})
        return self.reply_json({})


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Run the stub, and point `huggingface_hub` to it and to an empty cache."""
    name = "huggingface_hub.constants"
    constants = pytest.importorskip(name, reason="needs pip install huggingface_hub")
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "exists", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    """Save a tiny network; return its folder."""
    model = jaxvid.create_model("xvit_tiny", num_classes=3, width=16, depth=1)
    jaxvid.save_model(model, tmp_path / "model", labels=["a", "b", "c"])
    return tmp_path / "model"


def refusal_of(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_model_is_uploaded_and_downloaded(hub, folder):
    assert jaxvid.push_to_hub(folder, REPO) == f"hf://{REPO}"
    assert b'jaxvid.Classifier("hf://someone/motion")' in hub.files["README.md"]
    hub.files["README.md"] = b"mine"
    hub.files["notes.txt"] = hub.files["params/old"] = b"x"
    jaxvid.push_to_hub(folder, f"hf://{REPO}")
    assert (hub.files["README.md"], hub.files["notes.txt"]) == (b"mine", b"x")
    assert "params/old" not in hub.files
    expected, actual = (split_params(load_model(name))[1] for name in (folder, f"hf://{REPO}@main"))
    for name, array in expected.items():
        np.testing.assert_array_equal(array, actual[name])
    downloaded = resolve_model(f"hf://{REPO}")
    assert model_card.load_card(downloaded)["labels"] == ["a", "b", "c"]
    assert not (downloaded / "notes.txt").exists()


def test_missing_repositories_and_folders_are_reported(hub, folder, monkeypatch, tmp_path):
    assert "hf://someone/other cannot be downloaded (" in refusal_of(
        load_model, "hf://someone/other"
    )
    hub.exists = True
    hub.files["notes.txt"] = b"x"
    assert "contains no model folder" in refusal_of(load_model, f"hf://{REPO}")
    assert "is not a model folder" in refusal_of(jaxvid.push_to_hub, tmp_path, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"{REPO} cannot be written (" in refusal_of(jaxvid.push_to_hub, folder, REPO)


def test_a_missing_library_is_reported(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    calls = (load_model, [f"hf://{REPO}"]), (jaxvid.push_to_hub, [folder, REPO])
    for function, arguments in calls:
        assert "install it with pip install huggingface_hub" in refusal_of(function, *arguments)
