"""Comparison of the outputs of two training runs."""

import json
from pathlib import Path

import jaxvid
from jaxvid.models import split_params
from jaxvid.storage import model_card, model_folder
from jaxvid.training import checkpoint

# Fields of `metrics.jsonl` that depend on time.
TIMES = ("clips_per_second", "input_wait_share")


def weights(workdir: Path, name: str = "model") -> str:
    """Return the fingerprint of a model folder's weights."""
    return model_folder.fingerprint(split_params(jaxvid.load_model(workdir / name))[1])


def measured(report: dict) -> dict:
    """Return the fields of an `eval.json` that depend neither on time nor on the workdir."""
    excluded = ("checkpoint", "seconds", "clips_per_second")
    return {name: value for name, value in report.items() if name not in excluded}


def rows(workdir: Path) -> list[str]:
    """Return the lines of `metrics.jsonl` without the fields that depend on time."""
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k not in TIMES}) for row in parsed]


def check_same_outputs(workdir: Path, expected: Path) -> None:
    """Check that two finished runs have the same files with the same numbers."""
    assert rows(workdir) == rows(expected)
    reports = [json.loads((folder / "eval.json").read_text()) for folder in (workdir, expected)]
    assert measured(reports[0]) == measured(reports[1])
    bests = [model_card.load_card(folder / "best")["provenance"] for folder in (workdir, expected)]
    for name in ("step", "top1"):
        assert bests[0][name] == bests[1][name], name
    for name in ("model", "best"):
        assert weights(workdir, name) == weights(expected, name)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in expected.iterdir()}
    assert not [*workdir.rglob("*.orbax-checkpoint-tmp")]
    assert checkpoint.newest_step(workdir) == checkpoint.newest_step(expected)
