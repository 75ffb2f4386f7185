"""Run metadata: versions, devices, code and data of each start of a run."""

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxvid.atomic import write_file
from jaxvid.data.fingerprints import describe_videos
from jaxvid.distributed import collectives
from jaxvid.errors import InputError
from jaxvid.logs import log
from jaxvid.models import Params

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def describe_run(
    mesh: Mesh, records: dict[str, Sequence], left_out: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return the metadata of one start of a run.

    Args:
        mesh: The device mesh.
        records: Split → its videos.
        left_out: Reason → number of training videos that were left out for it.
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
        "data": {split: describe_videos(videos) for split, videos in records.items()},
        "left_out": left_out or {},
    }


def log_network(
    name: str, abstract_params: Params, records: dict[str, Sequence], mesh: Mesh
) -> None:
    """Log one line: the number of parameters, the numbers of videos and the shape of the mesh.

    Args:
        name: The network's name.
        abstract_params: Shapes of its weights.
        records: Split → its videos.
        mesh: The device mesh.
    """
    log.info(
        "%s: %.2f M parameters, %d training and %d validation videos, mesh %s",
        name,
        sum(math.prod(leaf.shape) for leaf in abstract_params.values()) / 1e6,
        len(records["train"]),
        len(records["val"]),
        ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    )


def check_same_videos(described: dict[str, Any]) -> None:
    """Refuse processes whose videos or labels differ from those of the first process.

    Args:
        described: The result of `describe_videos`, or a dict of such results by split.

    Raises:
        InputError: Names the first process that differs.
    """
    first, *others = collectives.gather(described)
    if differing := [process for process, other in enumerate(others, 1) if other != first]:
        raise InputError(
            f"process {differing[0]}: its videos or labels differ from those of process 0; give "
            "all processes the same lists"
        )


def last_start(workdir: Path) -> dict | None:
    """Return the metadata of the last start in `WORKDIR/starts.jsonl`, or None if there is none."""
    path = workdir / "starts.jsonl"
    lines = _read_starts(path)
    return json.loads(lines[-1]) if lines else None


def _read_starts(path: Path) -> list[str]:
    """Return the lines of `starts.jsonl`, split only at newlines: ids may have other breaks."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.split("\n") if line]


def record_start(workdir: Path, metadata: dict[str, Any]) -> None:
    """Append a start of the run to `WORKDIR/starts.jsonl` (on the first process).

    Args:
        workdir: The run's folder.
        metadata: The metadata from `describe_run`.

    Raises:
        InputError: The training videos or their labels differ from those of the last start, so
            that it would be a different run; or videos or labels differ between processes.
    """
    check_same_videos(metadata["data"])
    path = workdir / "starts.jsonl"
    lines = _read_starts(path)
    last = last_start(workdir) or metadata
    now, before = metadata["data"]["train"], last["data"]["train"]
    # Starts that older versions recorded have no fingerprint of the labels.
    changed = [name for name in before if before[name] != now[name]]
    if changed == ["labels_sha256"]:
        raise InputError(
            f"{workdir}: the labels of its {before['videos']} training videos have changed "
            f"(SHA-256 {before['labels_sha256'][:12]} before, {now['labels_sha256'][:12]} now); "
            "restore the list or choose another --workdir"
        )
    if changed:
        raise InputError(
            f"{workdir} was started with {before['videos']} training videos (SHA-256 of their ids: "
            f"{before['sha256'][:12]}), now there are {now['videos']} ({now['sha256'][:12]}); "
            "restore the list or choose another --workdir"
        )
    if "val" in last["data"] and last["data"]["val"] != metadata["data"]["val"]:
        counts = [start["data"]["val"]["videos"] for start in (last, metadata)]
        log.warning(
            "the validation list has changed since the last start (%d videos, now %d): accuracies "
            "before and after cannot be compared",
            *counts,
        )
    if not jax.process_index():
        lines.append(json.dumps(metadata, ensure_ascii=False))
        write_file(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def _revision() -> str | None:
    """Return the git commit of this code, plus `+` if files were changed; None if there is none."""
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
