"""Video files in folders: which suffixes count as videos, and what a scan leaves out."""

import collections
import os
from collections.abc import Callable, Iterable

from jaxvid.errors import printable

# Of containers that jaxvid/data/formats/video_reader.py opens (CONTAINERS there).
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2"),
    *(".mkv", ".webm", ".avi", ".divx", ".gif"),
    *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".m2ts", ".mts"),
    *(".wmv", ".asf", ".flv", ".f4v", ".ogv", ".mxf", ".rm", ".rmvb", ".dv", ".nut", ".y4m"),
)
NAMED_SUFFIXES = 5  # that a line about skipped files names

# Why an entry of a folder is left out.
HIDDEN = "hidden"
OTHER_KIND = "not videos by their suffix"
SUBFOLDER = "sub-folders"
LINKED_FOLDER = "links to folders"
BROKEN = "broken links or not regular files"
BESIDE = "files beside the class folders"


class Skipped:
    """Counts the entries of folders that scans leave out, by the reason."""

    def __init__(self):
        self._reasons, self._suffixes = collections.Counter(), collections.Counter()

    def add(self, reason: str, name: str = "") -> None:
        """Count an entry; with `name`, also its suffix."""
        self._reasons[reason] += 1
        if name:
            self._suffixes[os.path.splitext(name)[1].lower() or "no suffix"] += 1

    def __str__(self) -> str:
        """Return the counts as one line, the most frequent first; empty: nothing was left out."""
        suffixes = [f"{suffix} {n}" for suffix, n in _sort(self._suffixes)[:NAMED_SUFFIXES]]
        suffixes += ["…"] if len(self._suffixes) > NAMED_SUFFIXES else []
        named = f" ({', '.join(suffixes)})"
        return printable(
            ", ".join(
                f"{count} {reason}{named if reason == OTHER_KIND else ''}"
                for reason, count in _sort(self._reasons)
            )
        )


def _sort(counts: collections.Counter) -> list[tuple[str, int]]:
    """The most frequent first; the order of a folder's entries depends on the file system."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def pick_videos(
    entries: Iterable[tuple[str, Callable[[], bool]]], skipped: Skipped | None
) -> list[str]:
    """Choose the video files among the entries of a folder that are not folders.

    Args:
        entries: Of each, its name and a function that tells whether it is a regular file, or a
            link to one.
        skipped: Counts the others; None: nobody asks.

    Returns:
        The names of the videos, sorted.
    """
    videos, skipped = [], Skipped() if skipped is None else skipped
    for name, is_file in entries:
        if name.startswith("."):
            skipped.add(HIDDEN)
        elif not name.lower().endswith(VIDEO_SUFFIXES):
            skipped.add(OTHER_KIND, name)
        elif not is_file():
            skipped.add(BROKEN)
        else:
            videos.append(name)
    return sorted(videos)
