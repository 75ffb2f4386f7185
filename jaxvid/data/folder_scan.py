"""Video files in folders: recognized suffixes, and counts of the entries that scans skip."""

import collections
import functools
import os
from collections.abc import Callable, Iterable

from jaxvid.errors import printable

# Suffixes of the containers in CONTAINERS of jaxvid/data/formats/video_reader.py.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2"),
    *(".mkv", ".webm", ".avi", ".divx", ".gif"),
    *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".m2ts", ".mts"),
    *(".wmv", ".asf", ".flv", ".f4v", ".ogv", ".mxf", ".rm", ".rmvb", ".dv", ".nut", ".y4m"),
)
NAMED_SUFFIXES = 5  # number of suffixes of skipped files in the log line, most frequent first

# Reasons for skipping an entry of a folder. The log line shows the number of entries before each.
HIDDEN = "hidden"
OTHER_KIND = "files without a video suffix"
SUBFOLDER = "sub-folders"
LINKED_FOLDER = "links to folders"
BROKEN = "broken links or not regular files"
NOT_IN_CLASS_FOLDER = "files beside the class folders"
# Reason → the reason if there is one such entry.
SINGULAR = {
    HIDDEN: "hidden",
    OTHER_KIND: "file without a video suffix",
    SUBFOLDER: "sub-folder",
    LINKED_FOLDER: "link to a folder",
    BROKEN: "broken link or not a regular file",
    NOT_IN_CLASS_FOLDER: "file beside the class folders",
}


class Skipped:
    """Counter of the folder entries that scans skip, by reason."""

    def __init__(self):
        self._reasons, self._suffixes = collections.Counter(), collections.Counter()

    def add(self, reason: str, name: str = "") -> None:
        """Count an entry; if its `name` is given, count the suffix too."""
        self._reasons[reason] += 1
        if name:
            self._suffixes[os.path.splitext(name)[1].lower() or "no suffix"] += 1

    def __str__(self) -> str:
        """Return the counts as one line, most frequent first; empty if nothing was skipped."""
        suffixes = [f"{suffix} {n}" for suffix, n in _sort(self._suffixes)[:NAMED_SUFFIXES]]
        if len(self._suffixes) > NAMED_SUFFIXES:
            suffixes.append("…")
        suffix_counts = f" ({', '.join(suffixes)})"
        return printable(
            ", ".join(
                f"{count} {SINGULAR[reason] if count == 1 else reason}"
                f"{suffix_counts if reason == OTHER_KIND else ''}"
                for reason, count in _sort(self._reasons)
            )
        )


def _sort(counts: collections.Counter) -> list[tuple[str, int]]:
    """Sort by descending count, then by name, so that the order is the same on all file systems."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def is_video(name: str) -> bool:
    """Return whether the name of a file is that of a video, and is not hidden."""
    return name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")


def pick_videos(
    entries: Iterable[tuple[str, Callable[[], bool]]], skipped: Skipped | None
) -> list[str]:
    """Select the video files among the entries of a folder.

    Args:
        entries: The name of each entry that is not a sub-folder, and a function that returns
            whether the entry is a regular file or a link to one.
        skipped: Counter of the entries that are not selected, or None.

    Returns:
        The names of the videos, sorted.
    """
    skipped = Skipped() if skipped is None else skipped
    videos = []
    for name, is_file in entries:
        if name.startswith("."):
            skipped.add(HIDDEN)
        elif not is_video(name):
            skipped.add(OTHER_KIND, name)
        elif not is_file():
            skipped.add(BROKEN)
        else:
            videos.append(name)
    return sorted(videos)


def list_videos(folder: str, skipped: Skipped | None = None) -> tuple[list[str], list[str]]:
    """List the videos below a folder.

    Args:
        folder: The folder.
        skipped: Counter of the files and subfolders that are skipped.

    Returns:
        The videos, sorted within each folder; and one error message per folder that cannot be read.
        If all folders can be read but contain no videos, one error message says so.
    """
    unreadable, files = [], []
    skipped = Skipped() if skipped is None else skipped
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        paths = {name: os.path.join(root, name) for name in names}
        for name in folders:
            if os.path.islink(os.path.join(root, name)):  # not followed, as links may form a loop
                skipped.add(LINKED_FOLDER)
        entries = ((name, functools.partial(os.path.isfile, path)) for name, path in paths.items())
        files += [paths[name] for name in pick_videos(entries, skipped)]
    errors = [f"{error.filename}: cannot be read ({error.strerror})" for error in unreadable]
    if not files and not errors:
        errors.append(f"{folder}: contains no videos ({', '.join(VIDEO_SUFFIXES)})")
    return files, errors
