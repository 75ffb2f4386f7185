"""The server conforms to its OpenAPI document: requests that Schemathesis generates from it."""

import importlib.util
import subprocess
import sys

import pytest

from tests.serving.running_server import make_fake_model, running

# Generated bodies are not videos, so that valid requests are refused too.
EXCLUDED = "positive_data_acceptance"


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="make test-api installs schemathesis"
)
def test_schemathesis_finds_no_failure(tmp_path):
    with running([make_fake_model()]) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        options = [
            "--checks=all",
            f"--exclude-checks={EXCLUDED}",
            "--max-examples=50",
            "--no-color",
        ]
        result = subprocess.run(
            [*command, *options, "--suppress-health-check=all", "--continue-on-failure"],
            cwd=tmp_path,  # it writes a cache
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
