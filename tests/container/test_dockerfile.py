"""Dockerfile fits the command line and the files of the repository. It builds no image."""

import json
import re
from pathlib import Path

from jaxvid import parsers

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    """Return the arguments of all instructions of a kind."""
    return re.findall(rf"^{name} +(.*)", DOCKERFILE, re.MULTILINE)


def test_default_command_is_valid_and_the_health_check_uses_its_port():
    assert instructions("ENTRYPOINT") == ['["jaxvid"]']
    program, *options = json.loads(instructions("CMD")[-1])
    args = getattr(parsers, program)().parse_args(options)
    assert args.models == ["/model"]
    assert args.host == "0.0.0.0"
    assert instructions("EXPOSE") == [str(args.port)]
    assert f"'127.0.0.1', {args.port}," in instructions("HEALTHCHECK")[0]


def test_image_runs_without_root():
    assert all(int(number) > 0 for number in instructions("USER")[-1].split(":"))
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.rindex("\nRUN ")


def test_files_of_the_build_are_not_ignored():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    included = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in included)
    assert {"configs", "convert", "jaxvid", "pyproject.toml", "setup.py"} <= included
    assert {*instructions("COPY")[0].split()[:-1]} <= included
