"""Start and exit of every program: signals, exceptions, closed streams and memory limits.

A program's module begins with

    if __name__ == "__main__":
        entry_point.run("jaxvid.predict")  # never returns

so that the slow imports below happen inside `run`. Therefore this module imports only the standard
library. If a program is imported as a library, no handlers are installed.

| event | stderr | exit code |
|---|---|---|
| SIGINT, SIGTERM | one line | 130, 143 |
| stdout or stderr is a closed pipe (`| head`) | nothing | 141, as from SIGPIPE |
| stdout cannot be written (`> /dev/full`) | one line | 2 |
| uncaught InputError or OSError, exhausted memory, no home directory | one line | 2 |
| crash of a C++ library under `ulimit -v` or `ulimit -d` | one line | 2 |
| another uncaught exception: a bug in the program | traceback | 1 |

A closed stdin, stdout or stderr is replaced by /dev/null.

**Signals.** A signal ends the process at once, without unwinding: no exception is raised, and no
`finally` block or exit handler runs. A KeyboardInterrupt would be lost in JAX's garbage-collection
callback, would wait for XLA's compiler, and has crashed C++ extensions that it passed through.
Therefore outputs must be written atomically. The next run replaces unfinished files
(`.NAME.partial`). The Python handler runs in the main thread between two bytecodes. While the main
thread is in a long C call, a second thread ends the process in the same way; the C-level handler
wakes it up (`signal.set_wakeup_fd`). Neither can run while a C function holds the GIL. Code that
installs its own handlers must also remove the wake-up descriptor (`signal.set_wakeup_fd(-1)`), and
set it again when it restores the handlers.

**Address-space limits.** C++ libraries abort when a thread cannot be started or memory cannot be
mapped. Under `ulimit -v` or `ulimit -d` the program therefore runs in a child process, and the
parent reports a crash of the child in one line.
"""

import atexit
import contextlib
import errno
import glob
import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from jaxvid import memory_limits
from jaxvid.errors import InputError, memory_problem, one_line

PIPE_STATUS = 128 + signal.SIGPIPE
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)

before_stop: Callable[[int], None] | None = None  # called before a signal ends the process


def run(module: str, hint: str = "") -> NoReturn:
    """Import a program's module, call its `main()` and exit with the status that it returns.

    Args:
        module: Name of the module.
        hint: End of the line that is printed after a signal, e.g. "; run the same command again".
    """
    global _process
    _open_closed_descriptors()
    # The resource tracker of `multiprocessing` is a process that inherits this option. Without it,
    # the tracker would warn about shared memory that it removes after `os._exit`.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    supervisor = _supervise() if memory_limits.describe() else _Supervisor()
    for name in ("stdout", "stderr"):
        _replace_stream(name)
    if supervisor.parent_fd is not None:
        # absl enables faulthandler, which calls `sys.stderr.fileno()`. Dumps by faulthandler must
        # go to descriptor 2, whose output the supervisor buffers.
        sys.stderr.reported_fd = 2
    process = _process = _Process(hint, supervisor)
    try:
        process.watch()
        if memory_limits.describe():
            memory_limits.load_openblas()
        process.status = importlib.import_module(module).main() or 0
    except SystemExit as error:
        process.status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            process.print_line(error.code)
    except Exception as error:
        process.status, line = describe(error)
        if process.status == 1:
            raise
        process.print_line(line)
        # Suppress tracebacks of threads and finalizers that fail during the exit.
        sys.unraisablehook = threading.excepthook = lambda _: None
    process.flush()
    sys.exit(process.status)


def describe(error: Exception) -> tuple[int, str]:
    """Return the exit code of an uncaught exception, and the line to print on stderr.

    Code 1 means a bug in the program, to be reported by a traceback. If the line is empty,
    nothing is printed.
    """
    if isinstance(error, BrokenPipeError):
        return PIPE_STATUS, ""
    if problem := memory_problem(error):
        limits = memory_limits.describe()
        remedy = "raise the limit" if limits else "free memory or use a smaller batch"
        return 2, f"error: out of memory ({'; '.join([problem, *limits])}); {remedy}"
    if isinstance(error, InputError):
        return error.EXIT_CODE, f"error: {error}"
    if isinstance(error, OSError):
        subject = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {subject}{error.strerror or one_line(error)}; fix this and try again"
    if type(error).__name__ == "JaxRuntimeError" and (limits := memory_limits.describe()):
        # If XLA cannot allocate memory, it fails with many different errors.
        return 2, f"error: {one_line(error)}; {'; '.join(limits)}: raise the limit"
    if "getpwuid" in str(error) or "home directory" in str(error):
        return 2, f"error: user {os.getuid()} has no passwd entry ({one_line(error)}); set HOME"
    return 1, ""


def exit_now(status: int) -> NoReturn:
    """End the process at once, without exit handlers."""
    if _process is None:  # the program is used as a library
        os._exit(status)
    _process.end(status)


def stderr_fd() -> int:
    """Return the descriptor of the real stderr; a supervisor buffers the output to descriptor 2."""
    return 2 if _process is None else _process.supervisor.stderr_fd


class _Supervisor(NamedTuple):
    """Descriptors that connect a program with the process that supervises it, if any.

    Attributes:
        stderr_fd: The real stderr.
        parent_fd: Becomes readable when the supervising process has died; None: no supervisor.
        ended_fd: Receives a byte when the program ends without a crash; None: no supervisor.
    """

    stderr_fd: int = 2
    parent_fd: int | None = None
    ended_fd: int | None = None


class _Process:
    """Signal handling and exit of this process.

    Attributes:
        status: Exit code of the program, or None if it is not known yet.
        supervisor: Connection to the supervising process.
    """

    def __init__(self, hint: str, supervisor: _Supervisor):
        self.status: int | None = None
        self._stopping = False
        self._hint, self.supervisor = hint, supervisor
        self._lock = threading.RLock()  # the handler may interrupt itself

    def watch(self) -> None:
        """Install the signal handlers and start the thread that waits for signals."""
        atexit.register(self._at_exit)  # registered first, therefore called last
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        threading.Thread(target=self._wait, args=(read_fd,), daemon=True).start()
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `_supervise` may have blocked them

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._stop(number)

    def _wait(self, read_fd: int) -> None:
        """End the process after a signal, or when the supervisor has died.

        Runs in a thread, because the main thread may be in a C call.
        """
        parent_fd = self.supervisor.parent_fd
        sources = [read_fd] if parent_fd is None else [read_fd, parent_fd]
        while True:
            ready, _, _ = select.select(sources, [], [])
            if parent_fd in ready:
                os._exit(1)
            number = os.read(read_fd, 1)[0]
            if number in SIGNALS and signal.getsignal(number) == self._handle:
                self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        """Print one line and end the process after a signal."""
        with self._lock:
            if not self._stopping:  # otherwise a second signal has interrupted this function
                self._stopping = True
                event = "interrupted" if number == signal.SIGINT else "terminated"
                stderr_fd = self.supervisor.stderr_fd
                erase_bar = "\r\x1b[K" if os.isatty(stderr_fd) else ""
                _kill_workers()  # otherwise they would print errors
                with contextlib.suppress(OSError):
                    os.write(stderr_fd, f"{erase_bar}{event}{self._hint}\n".encode())
                if before_stop is not None:
                    before_stop(number)
            self.end(128 + number)

    def _at_exit(self) -> None:
        """End the process after all other exit handlers.

        The interpreter's teardown is skipped, because daemon threads of C++ libraries may abort it.
        """
        self.flush()
        if self.status is not None:
            self.end(self.status)

    def end(self, status: int) -> NoReturn:
        """End the process at once, and notify the supervisor that it has not crashed."""
        if self.supervisor.ended_fd is not None:
            os.write(self.supervisor.ended_fd, b".")
        os._exit(status)

    def print_line(self, line: str) -> None:
        """Print a line on stderr, unless it is empty or stderr cannot be written."""
        if line:
            with contextlib.suppress(OSError, InputError, SystemExit, AttributeError):
                print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Flush stdout and stderr; if stdout cannot be written, change the exit code."""
        try:
            sys.stdout.flush()
        except SystemExit:
            self.status = PIPE_STATUS
        except InputError as error:
            self.print_line(f"error: {error}")
            self.status = InputError.EXIT_CODE
        with contextlib.suppress(InputError, SystemExit):
            sys.stderr.flush()


_process: _Process | None = None


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread and in the threads and processes that it starts.

    Otherwise, a signal that arrives before a new worker calls `ignore_signals` would end the worker
    with a traceback. The parent would then hang, because `multiprocessing` continues to write to
    the pipe of a dead worker. Other threads of this process still receive signals, and the handlers
    run as soon as the main thread executes Python code.
    """
    from multiprocessing import resource_tracker  # takes longer to import than this module

    resource_tracker.ensure_running()  # starting it later would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM in a worker process, which its parent ends.

    Ctrl-C and cluster managers send signals to every process of a group.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kill the worker processes of `multiprocessing`, including those that are being started.

    The resource tracker is not killed; it removes their shared memory.
    """
    with contextlib.suppress(OSError):  # without /proc, the workers end by themselves
        for file in glob.glob("/proc/self/task/*/children"):
            for child in Path(file).read_text().split():
                if b"multiprocessing.spawn" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)


# ------------------------------------------------------------------ standard streams


class _Stream(io.TextIOWrapper):
    """Stdout or stderr, whose write errors become an InputError that names the stream."""

    label = "stdout"
    reported_fd: int | None = None  # if set, `fileno` returns it instead of the real descriptor

    def fileno(self) -> int:
        return super().fileno() if self.reported_fd is None else self.reported_fd

    def write(self, text: str) -> int:
        with self._convert_errors():
            return super().write(text)

    def flush(self) -> None:
        with self._convert_errors():
            super().flush()

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert write errors: a SystemExit if a pipe is closed, otherwise an InputError."""
        try:
            yield
        except BrokenPipeError:
            raise SystemExit(PIPE_STATUS) from None
        except OSError as error:
            raise InputError(
                f"{self.label}: cannot be written ({error.strerror}); redirect it to another file"
            ) from None


def _replace_stream(name: str) -> None:
    """Replace `sys.stdout` or `sys.stderr` by a `_Stream`, which escapes unencodable characters."""
    stream = getattr(sys, name)
    settings = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    encoding = stream.encoding
    stream = _Stream(stream.detach(), encoding, "backslashreplace", **settings)
    stream.label = name
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _open_closed_descriptors() -> None:
    """Open /dev/null in place of a closed standard stream.

    Otherwise, the next opened file would get this descriptor, and messages would be written to it.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free one: `fd`
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115


# ------------------------------------------------------------------ address-space limits


def _supervise() -> _Supervisor:
    """Fork: the child runs the program, and the parent reports a crash of the child in one line.

    Output of C++ libraries to the child's stderr is buffered until the child has ended. It is
    dropped if the child has crashed, has printed an error line or was ended by SIGINT or SIGTERM.

    Returns:
        The child's descriptors. Only the child returns; the parent ends as the child did.
    """
    noise_fd = os.memfd_create("stderr")
    parent_fd, alive_fd = os.pipe()  # the system closes `alive_fd` when the parent dies
    read_fd, ended_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # Each process unblocks the signals after it has installed its handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # Ctrl-C signals only the parent, which forwards it once
        os.close(alive_fd)
        stderr_fd = os.dup(2)
        sys.stderr = open(stderr_fd, "w", buffering=1)  # noqa: SIM115
        os.dup2(noise_fd, 2)
        return _Supervisor(stderr_fd, parent_fd, ended_fd)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.close(ended_fd)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    # A C++ library may also call exit(); no byte has been written to `ended_fd` then.
    is_crash = -code in CRASHES or (code >= 0 and not os.read(read_fd, 1))
    if is_crash:
        reason = signal.Signals(-code).name if code < 0 else f"a library exited with code {code}"
        limits = "; ".join(memory_limits.describe())
        print(f"error: out of memory ({reason}; {limits}); raise the limit", file=sys.stderr)
        code = InputError.EXIT_CODE
    elif code not in (InputError.EXIT_CODE, *(128 + number for number in SIGNALS)):
        os.lseek(noise_fd, 0, os.SEEK_SET)
        while block := os.read(noise_fd, 2**16):
            os.write(2, block)
    if code < 0:  # e.g. SIGKILL
        os.kill(os.getpid(), -code)
    os._exit(code)
