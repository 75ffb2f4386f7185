"""Training videos that cannot be decoded: counted, and listed in WORKDIR/skipped.jsonl."""

import json
from collections.abc import Collection
from pathlib import Path

import jax

from jaxvid.atomic import write_file
from jaxvid.errors import InputError
from jaxvid.logs import log
from jaxvid.training.metric_writer import disk_errors_as_input_errors


class SkippedVideos:
    """Counts the training videos that cannot be decoded and lists them in `WORKDIR/skipped.jsonl`.

    The file lists the videos of all starts of the run. Those of earlier starts do not count against
    the allowed share, as they may have been restored since.

    Args:
        workdir: The run's folder.
        num_videos: Number of training videos.
        max_share: Share of them that may fail before the run stops; 1: all but one video may fail.
        lost: Ids of training videos that the first start used and that are missing now. They are
            not counted.
    """

    def __init__(
        self, workdir: Path, *, num_videos: int, max_share: float, lost: Collection[str] = ()
    ):
        self._path, self._lost = workdir / "skipped.jsonl", set(lost)
        self._num_videos, self._max_share = num_videos - len(lost), max_share
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        # The last line is incomplete if a run was killed while writing it.
        lines = text[: text.rfind("\n") + 1]
        if lines != text and not jax.process_index():
            write_file(self._path, lines.encode())
        self._listed = read_skipped(workdir)
        self._failed: set[str] = set()

    def note(self, failures: list[tuple[str, str]]) -> None:
        """Count failures, each an id and a reason; log and list each video once.

        Raises:
            InputError: More videos than allowed, or all of them, have failed.
        """
        for id_, error in failures:
            if id_ not in self._lost:
                self._failed.add(id_)
            if id_ in self._listed:
                continue
            self._listed.add(id_)
            if jax.process_index():
                continue
            log.warning("skipped: %s", error)
            with (
                disk_errors_as_input_errors(self._path),
                self._path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps({"id": id_, "error": error}) + "\n")
        count, total = len(self._failed), self._num_videos
        if count and count == total:
            raise InputError(
                f"all {total} training videos cannot be decoded; they are listed in {self._path}; "
                "restore them"
            )
        if count > self._max_share * total:
            raise InputError(
                f"{count} of {total} training videos cannot be decoded, more than "
                f"data.max_failed_share={self._max_share} allows; they are listed in {self._path}; "
                "restore them, take them out of the list or set --config.data.skip_broken=True, "
                "then run the same command to resume"
            )

    def summary(self) -> str:
        """Return a line about the videos that this start skipped; empty if there are none."""
        if not self._failed:
            return ""
        return (
            f"{len(self._failed)} of {self._num_videos} training videos could not be decoded and "
            f"were skipped; they are listed in {self._path}"
        )


def read_skipped(workdir: Path) -> set[str]:
    """Return the ids in `WORKDIR/skipped.jsonl`, truncated as by `pipeline.stored_id`.

    Raises:
        InputError: The file is damaged.
    """
    path = workdir / "skipped.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:  # text after the last newline is a line that a killed run did not finish
        return {json.loads(line)["id"] for line in text.split("\n")[:-1]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete it") from None
