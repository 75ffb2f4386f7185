"""What a run was made of: versions, devices, code and data."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxvid.atomic import write_file
from jaxvid.data.fingerprints import describe_videos
from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.logs import log

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def describe_run(
    mesh, records: dict[str, Sequence], left_out: dict[str, int] | None = None
) -> dict:
    """The facts of one start of a run, for its workdir.

    Args:
        mesh: As `sharding.make_mesh` gives it.
        records: Split → its videos.
        left_out: Why training videos were left out → how many.
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
        "data": {split: describe_videos(found) for split, found in records.items()},
        "left_out": left_out or {},
    }


def check_same_videos(described) -> None:
    """Refuses processes that have other videos, or other labels, than the first.

    Args:
        described: Of `describe_videos`, or a tree of these.
    """
    first, *others = collectives.gather(described)
    if odd := [process for process, found in enumerate(others, 1) if found != first]:
        raise InputError(
            f"process {odd[0]} has other videos than process 0, or other labels; give all of them "
            "the same lists"
        )


def last_start(workdir: Path) -> dict | None:
    """Return the facts of the last start in `WORKDIR/starts.jsonl`; None: there was none."""
    path = workdir / "starts.jsonl"
    lines = _read_starts(path)
    return json.loads(lines[-1]) if lines else None


def _read_starts(path: Path) -> list[str]:
    """Return the lines of `starts.jsonl`; other line separators than newline may be in names."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.split("\n") if line]


def record_start(workdir: Path, facts: dict) -> None:
    """Adds a start of the run to `WORKDIR/starts.jsonl` (on the first process).

    Raises:
        InputError: An earlier start had other training videos, so that their order, and with it
            what the run computes, would be another; or other labels. Or another process has other
            videos.
    """
    check_same_videos(facts["data"])
    path = workdir / "starts.jsonl"
    lines = _read_starts(path)
    last = last_start(workdir) or facts
    now, before = facts["data"]["train"], last["data"]["train"]
    # What began before labels were noted has none to compare.
    changed = [name for name in before if before[name] != now[name]]
    if changed == ["labels_sha256"]:
        raise InputError(
            f"{workdir} was started with other labels of its {before['videos']} training videos "
            f"({before['labels_sha256'][:12]}, now {now['labels_sha256'][:12]}); restore the list "
            "or choose another --workdir"
        )
    if changed:
        raise InputError(
            f"{workdir} was started with {before['videos']} training videos "
            f"({before['sha256'][:12]}), now there are {now['videos']} ({now['sha256'][:12]}); "
            "restore the list or choose another --workdir"
        )
    if "val" in last["data"] and last["data"]["val"] != facts["data"]["val"]:
        counts = [start["data"]["val"]["videos"] for start in (last, facts)]
        log.warning(
            "the validation list has changed since the last start (%d videos, now %d): accuracies "
            "before and after cannot be compared",
            *counts,
        )
    if not jax.process_index():
        lines.append(json.dumps(facts, ensure_ascii=False))
        write_file(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def _revision() -> str | None:
    """The commit of this code, `+` behind it where files differ; None outside a repository."""
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if commit.returncode or not (root / ".git").exists():
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
