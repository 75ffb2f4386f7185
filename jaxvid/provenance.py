"""What a run was made of: versions, devices, code and data."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxvid import sharding
from jaxvid.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def describe_run(mesh, records: dict[str, Sequence]) -> dict:
    """The facts of one start of a run, for its workdir.

    Args:
        mesh: As `sharding.make_mesh` gives it.
        records: Split → its videos.
    """
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "revision": _revision(),
        "data": {
            split: {"videos": len(found), "sha256": fingerprint(found)}
            for split, found in records.items()
        },
    }


def fingerprint(records: Sequence) -> str:
    """SHA-256 over the ids of a split's videos, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.id.encode() + b"\0")
    return digest.hexdigest()


def note_start(workdir: Path, facts: dict) -> None:
    """Adds a start of the run to `WORKDIR/starts.jsonl` (on the first process).

    Raises:
        InputError: An earlier start had other training videos: their order, and so what the run
            computes, would be another. Or another process has other videos.
    """
    first, *others = sharding.gather(facts["data"])
    if odd := [process for process, data in enumerate(others, 1) if data != first]:
        raise InputError(
            f"process {odd[0]} has other videos than process 0; give all of them the same lists"
        )
    path = workdir / "starts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    before = json.loads(lines[-1])["data"]["train"] if lines else facts["data"]["train"]
    if before != facts["data"]["train"]:
        raise InputError(
            f"{workdir} was started with {before['videos']} training videos "
            f"({before['sha256'][:12]}), now there are {facts['data']['train']['videos']} "
            f"({facts['data']['train']['sha256'][:12]}); restore the list or choose another "
            "--workdir"
        )
    if not jax.process_index():
        lines.append(json.dumps(facts, ensure_ascii=False))
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(path)


def _revision() -> str | None:
    """The commit of this code, `+` behind it where files differ; None outside a repository."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if commit.returncode or not (root / ".git").exists():
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
