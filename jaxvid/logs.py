"""Logging to the console and to `WORKDIR/log.txt`, and the progress of a run."""

import logging
import sys
from pathlib import Path

import jax

from jaxvid import progress
from jaxvid.errors import with_addresses

log = logging.getLogger("jaxvid")


def setup_logging(workdir: Path) -> None:
    """Send the `jaxvid` log to the console and `WORKDIR/log.txt`.

    Progress lines have the level `debug`. They are always written to the file. They are written to
    the console only if it is not a terminal, because terminals show a progress bar instead.
    Processes other than the first log only warnings, and only to their consoles.
    """
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.filters[:] = [_use_addresses]
    log.propagate = False
    log.setLevel(logging.DEBUG)
    if process := jax.process_index():
        warnings = logging.StreamHandler()
        warnings.setLevel(logging.WARNING)
        warnings.setFormatter(logging.Formatter(f"process {process}: %(message)s"))
        log.addHandler(warnings)
        return
    file = logging.FileHandler(workdir / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.handleError = lambda _: None  # if the disk is full, writing other files reports it
    console = logging.Handler(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    # A closed console must not end a run: log.txt contains all lines.
    console.emit = lambda record: progress.print_above_bar(record.getMessage())
    log.addHandler(file)
    log.addHandler(console)


def _use_addresses(record: logging.LogRecord) -> bool:
    """Replace the paths of local copies of remote files in a message by their addresses."""
    record.msg, record.args = with_addresses(record.getMessage()), ()
    return True


class RunProgress(progress.Progress):
    """Progress whose bar is shown only by the first process.

    Args:
        total: As in `jaxvid.progress.Progress`.
        done: As in `Progress`.
        unit: As in `Progress`.
        title: As in `Progress`.
        lines: Whether progress lines are logged.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str, title: str, lines: bool = False):
        bar = not jax.process_index()
        write_line = log.debug if lines else None
        super().__init__(total, title=title, unit=unit, done=done, bar=bar, write_line=write_line)
