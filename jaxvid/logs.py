"""The project's log: on the console and in `WORKDIR/log.txt`; and the progress bar of a run."""

import contextlib
import logging
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from jaxvid import progress
from jaxvid.errors import InputError

log = logging.getLogger("jaxvid")


def setup_logging(workdir: Path) -> None:
    """Sends the `jaxvid` log to the console and `WORKDIR/log.txt`.

    Progress is logged as `debug`: the file gets it always, the console where there is no bar. Of
    other processes than the first, warnings alone are told, on their consoles.
    """
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
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
    file.handleError = lambda _: None  # a full disk is told by what cannot do without it
    console = logging.Handler(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    console.emit = _write_to_console
    log.addHandler(file)
    log.addHandler(console)


def _write_to_console(record: logging.LogRecord) -> None:
    """Print a line; a console that is gone must not end a run, as log.txt has everything."""
    with contextlib.suppress(SystemExit, InputError, OSError):
        tqdm.write(record.getMessage(), file=sys.stderr)


class RunProgress(progress.Progress):
    """Of the first process, a bar; `lines=True`: lines in the log too.

    Arguments: `jaxvid.progress.Progress`.
    """

    def __init__(self, total: int, *, done: int = 0, unit: str, title: str, lines: bool = False):
        bar, tell = not jax.process_index(), log.debug if lines else None
        super().__init__(total, title=title, unit=unit, done=done, bar=bar, tell=tell)
