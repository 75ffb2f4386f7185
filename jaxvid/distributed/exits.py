"""Error messages and exit codes for the processes of a run."""

import atexit
import contextlib
import multiprocessing
import sys
import traceback

import jax

from jaxvid import entry_point
from jaxvid.errors import InputError, one_line

COLLECTIVE_LIBRARIES = ("Gloo", "NCCL", "RCCL")


class PeerError(InputError):
    """Another process of the run failed.

    Args:
        process: Index of the process.
        cause: The cause, in one line.
        host: Name of its machine; empty: unknown.
        code: Exit code of the processes that end because of it.
    """

    def __init__(self, process: int, cause: str, host: str = "", code: int = InputError.EXIT_CODE):
        super().__init__(f"{describe_process(process, host)}: {cause}")
        self.process, self.cause, self.host, self.EXIT_CODE = process, cause, host, code

    def copy(self) -> "PeerError":
        """Return an equal exception without a traceback."""
        return PeerError(self.process, self.cause, self.host, self.EXIT_CODE)


def describe_process(process: int, host: str) -> str:
    """Return the index of a process and the name of its machine, for messages."""
    return f"process {process} on {host}" if host else f"process {process}"


def describe_silence(seconds: float) -> str:
    """Describe the loss of a process that has sent no heartbeat for a time in seconds."""
    return (
        f"no heartbeat for {seconds:.0f} s; the process was killed or hangs, or the network is down"
    )


def is_of_runtime(error: BaseException | None) -> bool:
    """Return whether JAX's runtime raised an exception; another process may have caused it."""
    while error is not None:
        # XLA also raises ValueErrors: "UNKNOWN: Gloo AllGather failed".
        in_collective = any(library in str(error) for library in COLLECTIVE_LIBRARIES)
        if isinstance(error, jax.errors.JaxRuntimeError) or in_collective:
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """Describe an exception in one line, to be printed by the other processes."""
    match error:
        case InputError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted"
        case SystemExit():
            return f"ended with exit code {exit_code(error)}"
        case Exception() if entry_point.describe(error)[0] == InputError.EXIT_CODE:
            return entry_point.describe(error)[1].removeprefix("error: ")
    return f"{type(error).__name__}: {one_line(error)}; see the traceback in its output"


def report(error: BaseException) -> str:
    """Return the error line or traceback, to be printed if the main thread cannot print it."""
    if isinstance(error, Exception) and exit_code(error) == 1:
        return "".join(traceback.format_exception(error))
    return f"error: {describe(error)}\n"


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends with an exception."""
    match error:
        case KeyboardInterrupt():
            return 130
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case Exception():
            return entry_point.describe(error)[0]
    return 1


def end_now(code: int) -> None:
    """End the process at once. Exit handlers are skipped: they would wait for other processes."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        # The streams of `entry_point` raise a SystemExit if a pipe is closed.
        with contextlib.suppress(OSError, ValueError, SystemExit):
            stream.flush()
    entry_point.exit_now(code)


def end_at_exit(code: int) -> None:
    """End the process with `code` when the interpreter exits, before other exit handlers."""
    atexit.register(end_now, code)
