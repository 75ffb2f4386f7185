"""Helpers for tests that compare packs."""

from pathlib import Path


def read_pack(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return file name → contents of a pack; its report contains durations and is left out."""
    names = {"report.json", *without}
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name not in names
    }
