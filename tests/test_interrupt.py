"""Programs that are stopped, lose their output or run out of memory print at most one line."""

import collections
import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvid.distributed import setup
from tests import programs

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 60  # timeout of steps that take at most 2 s on an idle machine

# One C call of several minutes, which releases the GIL.
LONG_C_CALL = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
# Programs that print 'ready' and then run for minutes unless they are stopped.
SOURCES = {
    "import": "import time\nprint('ready', flush=True)\ntime.sleep(300)",
    "sleep": "def main():\n    import time\n    print('ready', flush=True)\n    time.sleep(300)",
    "C call": f"def main():\n    print('ready', flush=True)\n    {LONG_C_CALL}",
    "garbage collection": """
        import gc, time

        def callback(*_):  # Python prints exceptions raised here and continues
            time.sleep(0.01)

        def main():
            gc.callbacks.append(callback)
            print('ready', flush=True)
            while True:
                gc.collect()
        """,
    "except": """
        import time

        def main():
            print('ready', flush=True)
            while True:
                try:
                    time.sleep(300)
                except BaseException as error:
                    pass
        """,
    "finally": """
        import time

        def main():
            try:
                print('ready', flush=True)
                time.sleep(300)
            finally:
                time.sleep(300)
        """,
    "thread": """
        import concurrent.futures, time

        def main():
            with concurrent.futures.ThreadPoolExecutor() as pool:
                pool.submit(time.sleep, 300)
                print('ready', flush=True)
        """,
    "exit handler": """
        import atexit, time

        def callback():
            print('ready', flush=True)
            time.sleep(300)

        def main():
            atexit.register(callback)
        """,
}
# Runs the module `program`. The hint "; again" ends the line that is printed after a signal.
RUN_PROGRAM = "import sys; from jaxvid import entry_point; entry_point.run('program', '; again')"


@pytest.fixture
def start(tmp_path):
    """A function that starts a program under `entry_point.run` and waits until it is ready."""
    running = []

    def start(source: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(textwrap.dedent(source))
        process = subprocess.Popen(
            [sys.executable, "-c", RUN_PROGRAM],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", SOURCES)
def test_signals_end_programs_with_one_line(start, name):
    for number, word in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        process = start(SOURCES[name])
        process.send_signal(number)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert (process.returncode, stderr) == (128 + number, f"{word}; again\n")


def test_signals_are_blocked_in_starting_workers(start):
    """Workers inherit the blocked signals from the thread that starts them.

    The resource tracker must already be running, because starting it in the thread would unblock
    the signals.
    """
    source = """
        import multiprocessing, threading, time
        from pathlib import Path
        from jaxvid import entry_point

        def main():
            worker = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(300,))
            with entry_point.signals_blocked():
                thread = threading.Thread(target=worker.start)
                thread.start()
                thread.join()
            status = Path(f'/proc/{worker.pid}/status').read_text()
            worker.kill()
            print('ready', flush=True)
            [line] = [line for line in status.splitlines() if line.startswith('SigBlk')]
            print(line.split()[1])
        """
    process = start(source)
    blocked = int(process.stdout.readline(), 16)  # a mask: bit N - 1 stands for signal N
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "")
    assert blocked == (1 << (signal.SIGINT - 1)) | (1 << (signal.SIGTERM - 1))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ctrl_c_while_workers_start_stops_training(motion_folder, tmp_path):
    """Ctrl-C also signals the workers. They must not die of it, because the parent would hang."""
    rng = np.random.default_rng(0)
    for attempt in range(8):
        arguments = programs.PROGRAMS["train"].arguments
        paths = {"out": tmp_path / str(attempt), "data": motion_folder}
        command = [argument.format(**paths) for argument in arguments]
        command += ["--config.data.num_workers=2", "--config.num_epochs=10.0"]
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            children = Path(f"/proc/{process.pid}/task").glob
            while not any(file.read_text() for file in children("*/children")):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=WAIT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert "Traceback" not in output
        assert process.returncode == 130, output


def test_only_a_second_signal_ends_training_while_it_saves(start):
    """While `StopSignals` is active, the first signal is recorded; the second ends the program."""
    source = """
        import hashlib, sys, time
        from jaxvid.training.signals import StopSignals

        def main():
            with StopSignals() as signals:
                print('ready', flush=True)
                while signals.received is None:
                    time.sleep(0.01)
                start = time.monotonic()
                while time.monotonic() - start < 2.5:  # stands for a save
                    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6)
            sys.exit(143)
        """
    process = start(source)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "")
    assert process.returncode == 143
    process = start(source)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # during the save
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "terminated; again\n")
    assert process.returncode == 143


def test_importing_a_program_installs_no_handlers():
    handlers = "[*map(signal.getsignal, (2, 15))]"
    code = f"import signal; a = {handlers}; from jaxvid.data import check; print(a == {handlers})"
    done = run([sys.executable, "-c", code])
    assert done.stdout == "True\n"


def test_predict_can_be_interrupted_while_importing_jax(tmp_path):
    (tmp_path / "jax.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    (tmp_path / "model.pth").touch()
    command = [sys.executable, "-m", "jaxvid.predict", "a.mp4", f"--model={tmp_path / 'model.pth'}"]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options, **pipes) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (line, process.returncode, stderr) == ("importing\n", 130, "interrupted\n")


# ------------------------------------------------------------------ output, memory


def run(command: list, **options) -> subprocess.CompletedProcess:
    """Run a command until it ends; by default, return its stdout and stderr as text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, **({"cwd": ROOT, "timeout": 300} | streams | options))


@pytest.fixture
def run_body(tmp_path):
    """A function that runs code as a program's `main`; `{}` in `shell` stands for the program."""

    def run_body(body: str, shell: str = "{}") -> subprocess.CompletedProcess:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "program.py").write_text(f"import os, sys\n\n\ndef main():\n{lines}")
        command = shell.format(f'{sys.executable} -c "{RUN_PROGRAM}"')
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
        return run(["bash", "-o", "pipefail", "-c", command], env=environment, cwd=tmp_path)

    return run_body


MANY_LINES = "for i in range(10**5): print(i)"
LIMITED = "ulimit -v 2000000; {}"  # the program then runs in a child process


@pytest.mark.parametrize(
    # expected: exit code and start of the line on stderr; None: 0 or 141, and no line
    ("body", "shell", "expected"),
    [
        (MANY_LINES, "{} | head -1", (141, "")),
        ("print('short')", "{} | sleep 0; exit ${{PIPESTATUS[0]}}", None),
        ("try:\n    " + MANY_LINES + "\nexcept OSError: sys.exit(7)", "{} | head -1", (141, "")),
        ("while True: print('x', file=sys.stderr)", "{} 2>&1 >&- | head -1", (141, "")),
        ("print('short')", "{} > /dev/full", (2, "error: stdout: cannot be written (No space")),
        (MANY_LINES, "{} > /dev/full", (2, "error: stdout: cannot be written (No space")),
        ("print('x', file=sys.stderr)", "{} 2> /dev/full", (2, "")),
        ("print(1); print(2, file=sys.stderr); sys.exit(3)", "{} <&- >&- 2>&-", (3, "")),
        ("assert os.open('new', os.O_CREAT) > 2", "{} <&- >&- 2>&-", (0, "")),
        ("print('\\udcff \\u00e4')", "PYTHONIOENCODING=ascii {}", (0, "")),
        ("sys.exit('a message')", "{}", (1, "a message")),
        ("open('/missing/file')", "{}", (2, "error: /missing/file: No such file or directory;")),
        ("import pwd; pwd.getpwuid(54321)", "{}", (2, "error: user ")),
        ("raise MemoryError", "{}", (2, "error: out of memory (MemoryError); free memory")),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: x')", "{}", (2, "error: out of memory (RESOURC")),
        ("raise ImportError('a') from OSError(12, 'Cannot allocate memory')", "{}",
         (2, "error: out of memory ([Errno 12] Cannot allocate memory)")),
        ("return 5", LIMITED, (5, "")),
        ("os.write(2, b'one\\n'); return 5", LIMITED, (5, "one")),
        ("os.write(2, b'one\\ntwo\\n'); os.abort()", LIMITED,
         (2, "error: out of memory (SIGABRT; ulimit -v is 2048 MB); raise the limit")),
        ("os.write(2, b'one\\n'); os._exit(1)", LIMITED,
         (2, "error: out of memory (a library exited with code 1; ulimit -v is 2048 MB)")),
        ("bytes(2**32)", LIMITED, (2, "error: out of memory (MemoryError; ulimit -v is 2048 MB)")),
        ("sys.exit('a message')", LIMITED, (1, "a message")),
        (MANY_LINES, LIMITED + " | head -1", (141, "")),
    ],
)  # fmt: skip
def test_external_errors_print_at_most_one_line(run_body, body, shell, expected):
    done = run_body(body, shell)
    if expected is None:  # the reader may exit before or after the line is written
        expected = (done.returncode, "")
        assert done.returncode in (0, 141)
    code, line = expected
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == bool(line)


def test_defects_print_a_traceback(run_body):
    for shell in ("{}", LIMITED):
        done = run_body("raise ValueError('a defect')", shell)
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert done.stderr.endswith("ValueError: a defect\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False])
def test_the_child_receives_signals_once_under_an_address_space_limit(tmp_path, number, to_group):
    """The child receives a signal only once: a second one would end training before it saves."""
    source = """
        import signal, time

        def handler(*_):
            print('received', flush=True)

        def main():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            print('ready', flush=True)
            time.sleep(1)
            return 9
        """
    (tmp_path / "program.py").write_text(textwrap.dedent(source))
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "{RUN_PROGRAM}"'],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stdout, stderr) == (9, "received\n", "")


def test_the_child_ends_when_its_supervisor_is_killed(tmp_path):
    source = """
        import os, time

        def main():
            print(os.getpid(), flush=True)
            time.sleep(300)
        """
    (tmp_path / "program.py").write_text(textwrap.dedent(source))
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "{RUN_PROGRAM}"'],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
    )
    assert int(process.stdout.readline()) != process.pid  # the child's id
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)  # returns when the child has closed its stdout


def test_no_compilation_cache_without_a_home_directory(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # a user without a passwd entry
    with pytest.raises(RuntimeError):
        Path.home()
    before = jax.config.jax_compilation_cache_dir
    setup.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


# ------------------------------------------------------------------ signals at full size

NUM_SIGNALS = 40  # per program
TARGET_SECONDS = 2.0  # from a signal to the program's exit, on an idle machine
BUSY_FACTOR = 5  # allowance for other work on the machine, e.g. of the second thread


def has_signal_handlers(process: subprocess.Popen) -> bool:
    """Return whether the program has installed its handlers; Python installs none for SIGTERM."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait_for_signal_handlers(process: subprocess.Popen) -> float:
    """Wait until the handlers are installed; return the value of `time.monotonic()`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not has_signal_handlers(process):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return time.monotonic()


def measure_duration(name: str, out: Path, inputs: dict[str, Path]) -> float:
    """Run a program; return the seconds from the installation of its handlers to its end.

    For training, return the seconds until the first step. Training that receives a signal later
    saves before it stops.
    """
    lines = []
    with programs.start(name, out, inputs) as process:
        begin = wait_for_signal_handlers(process)
        for line in process.stderr:
            lines.append(line)
            if name == "train" and line.startswith("the first step"):
                duration = time.monotonic() - begin
    assert process.returncode == 0, "".join(lines)
    return duration if name == "train" else time.monotonic() - begin


def interrupt(name: str, out: Path, inputs, moment: float, number: int) -> tuple[str, float]:
    """Send a signal to a program.

    Args:
        name: The program.
        out: Folder for its outputs.
        inputs: The result of `programs.make_inputs`.
        moment: Time of the signal, in seconds after the handlers are installed.
        number: The signal.

    Returns:
        How the program ended, "finished", "saved" (only training) or "stopped", and the seconds
        from the signal to the end.
    """
    with programs.start(name, out, inputs) as process:
        try:
            begin = wait_for_signal_handlers(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(begin + moment - time.monotonic())
            sent = time.monotonic()
            if number == signal.SIGINT:  # sent to the process group, as by a terminal
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, stderr = process.communicate(timeout=WAIT_SECONDS)
            seconds = time.monotonic() - sent
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    programs.check_outputs(name, out)
    lines = stderr.splitlines()
    context = f"{name}, signal {number} after {moment:.3f} s, {process.returncode}:\n{stderr}"
    assert "Traceback" not in stderr, context
    # The program finished, or training logged that it will save before it stops, or has saved.
    if process.returncode == 0 or re.search("then stopping|stopping; everything", stderr):
        assert not re.search(r"^(interrupted|terminated)", stderr, re.MULTILINE), context
        assert process.returncode in (0, 128 + number), context
        return "finished" if process.returncode == 0 else "saved", seconds
    assert process.returncode == 128 + number, context
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert re.fullmatch(rf"{word}(; run the same command to continue)?", lines[-1]), context
    assert all(re.fullmatch(programs.PROGRAMS[name].logs, line) for line in lines[:-1]), context
    assert len([line for line in lines if line.startswith(word)]) == 1, context
    return "stopped", seconds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, motion_folder):
    """Input files of the programs."""
    return programs.make_inputs(tmp_path_factory.mktemp("inputs"), motion_folder)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_signals_at_random_moments(name, inputs, tmp_path):
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    duration = measure_duration(name, uninterrupted, inputs)
    moments = np.random.default_rng(0).uniform(0, duration, NUM_SIGNALS)
    endings, delays = collections.Counter(), []

    def interrupt_repeatedly(thread: int) -> None:
        """Interrupt a command at half of the moments, then let it finish and check its files.

        Each training gets a new folder; the other programs are run in the same folder again.
        """
        for i in range(thread, NUM_SIGNALS, 2):
            out = tmp_path / (f"{name}-{i}" if name == "train" else f"thread{thread}")
            out.mkdir(exist_ok=True)
            number = (signal.SIGINT, signal.SIGTERM)[i // 2 % 2]
            ending, seconds = interrupt(name, out, inputs, moments[i], number)
            endings[ending] += 1
            if ending == "stopped":
                delays.append(seconds)
        with programs.start(name, out, inputs) as process:
            _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        programs.check_outputs(name, out)
        files, expected = (
            # Orbax's file names are random, and a resumed run may keep other checkpoints.
            {path for path in programs.list_files(folder) if "checkpoints/" not in str(path)}
            for folder in (out, uninterrupted)
        )
        assert files == expected

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(interrupt_repeatedly, range(2)))
    assert len(delays) >= NUM_SIGNALS / 4, endings
    median, maximum = np.median(delays), max(delays)
    late = sum(seconds > TARGET_SECONDS for seconds in delays)
    print(
        f"{name}: {duration:.1f} s; {dict(endings)}; seconds to the end: median {median:.2f}, "
        f"maximum {maximum:.2f}, {late} above {TARGET_SECONDS}"
    )
    assert maximum < TARGET_SECONDS * BUSY_FACTOR


# ------------------------------------------------------------------ limits at full size

LIMITS = (100, 400, 800, 1100, 1400, 1700, 2000, 2400, 3000, 4000)  # MB of address space


def check_ending(name: str, out: Path, process: subprocess.Popen) -> int:
    """Wait for a program, check that it prints at most one error, and return its exit code."""
    with process:
        _, stderr = process.communicate(timeout=600)
    programs.check_outputs(name, out)
    context = f"{name}, {process.returncode}:\n{stderr}"
    assert "Traceback" not in stderr, context
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (process.returncode == 2), context
    if process.returncode == 2:
        *logs, last = stderr.splitlines()
        assert [last] == errors, context
        assert all(re.fullmatch(programs.PROGRAMS[name].logs, line) for line in logs), context
    return process.returncode


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_address_space_limits_end_programs_with_at_most_one_error(name, inputs, tmp_path):
    codes = {}
    for limit in LIMITS:
        shell = f'ulimit -v {limit * 1000}; exec "$@"'
        process = programs.start(name, tmp_path, inputs, shell)
        codes[limit] = check_ending(name, tmp_path, process)
    print(name, codes)
    assert {*codes.values()} <= {0, 2}
    assert codes[LIMITS[0]] == 2


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_lost_standard_streams_end_programs_with_at_most_one_error(name, inputs, tmp_path):
    cases = {  # shell script and allowed exit codes
        "reader gone": ('exec "$@" > >(exec <&-)', {0, 141}),
        "full": ('exec "$@" > /dev/full', {0, 2}),
        "closed": ('exec "$@" <&- >&-', {0}),
        "all closed": ('exec "$@" <&- >&- 2>&-', {0}),
    }
    if name in ("predict", "compare", "check", "torch_to_flax", "download"):  # these need stdout
        cases["reader gone"][1].remove(0)
        cases["full"][1].remove(0)
    for case, (shell, codes) in cases.items():
        out = tmp_path / case
        out.mkdir()
        assert check_ending(name, out, programs.start(name, out, inputs, shell)) in codes, case


# Runs a command as a user without a passwd entry. The capability lets the user read and write all
# files, because the interpreter may be in the home directory of root.
WITHOUT_PASSWD_ENTRY = """
    unset HOME XDG_CACHE_HOME
    exec setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_override \\
        --ambient-caps=+dac_override "$@"
    """


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_programs_run_for_a_user_without_a_passwd_entry(name, inputs, tmp_path):
    probe = [sys.executable, "-c", "import pwd, os; pwd.getpwuid(os.getuid())"]
    if "uid not found" not in run(["bash", "-c", WITHOUT_PASSWD_ENTRY, "bash", *probe]).stderr:
        pytest.skip("setpriv needs root to change the user")
    process = programs.start(name, tmp_path, inputs, WITHOUT_PASSWD_ENTRY)
    assert check_ending(name, tmp_path, process) == 0
