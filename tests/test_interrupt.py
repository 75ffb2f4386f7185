"""Signals, lost output and exhausted memory end every program with one line and an exit code."""

import collections
import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvid.distributed import setup
from tests import programs

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 60  # for what takes 2 s at most on a machine that is not busy

# Each prints a line when it is running, and would then run for minutes.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # one call, without the GIL
BODIES = {
    "import": "import time\nprint('ready', flush=True)\ntime.sleep(300)",
    "sleep": "def main():\n    import time\n    print('ready', flush=True)\n    time.sleep(300)",
    "C call": f"def main():\n    print('ready', flush=True)\n    {BUSY}",
    "garbage collection": """
        import gc, time

        def callback(*_):  # exceptions are swallowed here, and printed
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
GUARDED = "import sys; from jaxvid import entry_point; entry_point.run('program', '; again')"


@pytest.fixture
def start(tmp_path):
    """A function that starts a guarded program and returns it when it is ready."""
    running = []

    def start(body: str) -> subprocess.Popen:
        lines = body.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        (tmp_path / "program.py").write_text("\n".join(line[indent:] for line in lines))
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", GUARDED],
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert running[-1].stdout.readline() == "ready\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("body", BODIES)
def test_signals_end_every_program(start, body):
    for number, line in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        process = start(BODIES[body])
        process.send_signal(number)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert (process.returncode, stderr) == (128 + number, f"{line}; again\n")


def test_signals_are_blocked_in_workers_until_they_ignore_them(start):
    """In those too that a thread starts; the resource tracker would unblock them there."""
    body = """
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
    process = start(body)
    blocked = int(process.stdout.readline(), 16)
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "")
    assert blocked == 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ctrl_c_during_worker_start_saves_and_stops(motion_folder, tmp_path):
    """Ctrl-C signals the workers too. One that died of it made the parent hang."""
    rng = np.random.default_rng(0)
    for count in range(8):
        arguments = programs.PROGRAMS["train"].arguments
        places = {"out": tmp_path / str(count), "data": motion_folder}
        command = [argument.format(**places) for argument in arguments]
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


def test_training_is_not_killed_while_it_saves(start):
    """While `StopSignals` is active, `entry_point` ignores signals."""
    body = """
        import hashlib, sys, time
        from jaxvid.training.signals import StopSignals

        def main():
            with StopSignals() as signals:
                print('ready', flush=True)
                while signals.received is None:
                    time.sleep(0.01)
                start = time.monotonic()
                while time.monotonic() - start < 2.5:  # saves
                    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6)
            if sys.stdin.readline() == 'go on\\n':
                time.sleep(300)
            sys.exit(143)
        """
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert process.communicate("end\n", timeout=WAIT_SECONDS) == ("", "")
    assert process.returncode == 143
    process = start(body)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # before the save is done
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "terminated; again\n")
    assert process.returncode == 143


def test_importing_a_program_installs_no_handlers():
    handlers = "[*map(signal.getsignal, (2, 15))]"
    code = f"import signal; a = {handlers}; from jaxvid.data import check; print(a == {handlers})"
    done = run([sys.executable, "-c", code])
    assert done.stdout == "True\n"


def test_predict_can_be_interrupted_while_importing_jax():
    command = [sys.executable, "-m", "jaxvid.predict", "a.mp4", "--model=there_is_none"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until_guarded(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr) == (130, "interrupted\n")


# ------------------------------------------------------------------ output, memory, user


def run(command: list, **options) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, **({"cwd": ROOT, "timeout": 300} | streams | options))


@pytest.fixture
def run_body(tmp_path):
    """A function that runs the body of a guarded `main` in a shell, with what follows it there."""

    def run_body(body: str, shell: str = "{}") -> subprocess.CompletedProcess:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "program.py").write_text(f"import os, sys\n\n\ndef main():\n{lines}")
        command = shell.format(f'{sys.executable} -c "{GUARDED}"')
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
        return run(["bash", "-o", "pipefail", "-c", command], env=environment, cwd=tmp_path)

    return run_body


MANY_LINES = "for i in range(10**5): print(i)"
LIMITED = "ulimit -v 2000000; {}"


@pytest.mark.parametrize(
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
        ("open('/there/is/none')", "{}", (2, "error: /there/is/none: No such file or directory;")),
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
        (MANY_LINES, "ulimit -v 2000000; {} | head -1", (141, "")),
    ],
)  # fmt: skip
def test_external_errors_are_at_most_one_line(run_body, body, shell, expected):
    done = run_body(body, shell)
    if expected is None:  # the reader may end before or after the line
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
def test_signals_under_an_address_space_limit(tmp_path, number, to_group):
    """They reach the child once, so that training can save."""
    (tmp_path / "program.py").write_text(
        "import signal, time\n\n\ndef note(*_):\n    print('noted', flush=True)\n\n\n"
        "def main():\n    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        old = signal.signal(number, note)\n    signal.set_wakeup_fd(-1)\n"
        "    print('ready', flush=True)\n    time.sleep(1)\n    return 9\n"
    )
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "{GUARDED}"'],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stdout, stderr) == (9, "noted\n", "")


def test_the_program_ends_with_its_supervisor(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, time\n\n\ndef main():\n    print(os.getpid(), flush=True)\n"
        "    time.sleep(300)\n"
    )
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit -v 2000000; exec {sys.executable} -c "{GUARDED}"'],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
    )
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)  # ends when the child has closed its stdout


def test_no_compilation_cache_without_a_home_directory(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # has no passwd entry
    with pytest.raises(RuntimeError):
        Path.home()
    before = jax.config.jax_compilation_cache_dir
    setup.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


# ------------------------------------------------------------------ every program, at full size

NUM_SIGNALS = 40
TARGET_SECONDS = 2.0  # from a signal to the end
BUSY_FACTOR = 5  # other work on the machine, the second lane included


def is_guarded(process: subprocess.Popen) -> bool:
    """Return whether the handlers are installed: Python itself has none for SIGTERM.

    What comes before is the interpreter's start, in which no line of the project has run.
    """
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait_until_guarded(process: subprocess.Popen) -> float:
    """Wait for the handlers; return the time at which they were seen."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_guarded(process):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return time.monotonic()


def measure(name: str, out: Path, inputs: dict[str, Path]) -> float:
    """Run a program to its end; return the seconds in which signals are sent.

    Of training these are the seconds before the first step: later it saves.
    """
    lines = []
    with programs.start(name, out, inputs) as process:
        begin = wait_until_guarded(process)
        for line in process.stderr:
            lines.append(line)
            if name == "train" and line.startswith("first step"):
                duration = time.monotonic() - begin
    assert process.returncode == 0, "".join(lines)
    return duration if name == "train" else time.monotonic() - begin


def interrupt(name: str, out: Path, inputs, moment: float, number: int) -> tuple[str, float]:
    """Send a signal to a program; return how it ended and seconds until then."""
    with programs.start(name, out, inputs) as process:
        try:
            begin = wait_until_guarded(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(begin + moment - time.monotonic())
            sent = time.monotonic()
            if number == signal.SIGINT:  # as a terminal does
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
    lines, story = stderr.splitlines(), f"{name}, signal {number} after {moment:.3f} s:\n{stderr}"
    assert "Traceback" not in stderr, story
    # Finished, or saved by training, before an evaluation that the signal interrupts too.
    if process.returncode == 0 or re.search("then stopping|stopping; everything", stderr):
        assert not re.search(r"^(interrupted|terminated)", stderr, re.MULTILINE), story
        assert process.returncode in (0, 128 + number), story
        return "finished" if process.returncode == 0 else "saved", 0.0
    assert process.returncode == 128 + number, f"{process.returncode}: {story}"
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert re.fullmatch(rf"{word}(; run the same command to continue)?", lines[-1]), story
    assert all(re.fullmatch(programs.PROGRAMS[name].logs, line) for line in lines[:-1]), story
    assert len([line for line in lines if line.startswith(word)]) == 1, story
    return "stopped", seconds


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, motion_folder):
    """What the programs read."""
    return programs.make_inputs(tmp_path_factory.mktemp("inputs"), motion_folder)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_signals_at_random_moments(name, inputs, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    duration = measure(name, whole, inputs)
    moments = np.random.default_rng(0).uniform(0, duration, NUM_SIGNALS)
    endings, delays = collections.Counter(), []

    def interrupt_one_by_one(lane: int) -> None:
        """Interrupt the same command again and again, then let it finish."""
        for i in range(lane, NUM_SIGNALS, 2):
            out = tmp_path / (f"{name}-{i}" if name == "train" else f"lane{lane}")
            out.mkdir(exist_ok=True)
            number = (signal.SIGINT, signal.SIGTERM)[i // 2 % 2]
            ending, seconds = interrupt(name, out, inputs, moments[i], number)
            endings[ending] += 1
            delays.append(seconds)
        with programs.start(name, out, inputs) as process:
            _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        programs.check_outputs(name, out)
        files, expected = (
            # Orbax draws the names of its files, and a run that was stopped keeps another step.
            {path for path in programs.list_files(folder) if "checkpoints/" not in str(path)}
            for folder in (out, whole)
        )
        assert files == expected

    with concurrent.futures.ThreadPoolExecutor(2) as lanes:
        list(lanes.map(interrupt_one_by_one, range(2)))
    delays = np.sort(delays)[-endings["stopped"] :]
    median, most = np.median(delays), delays[-1]
    late = int((delays > TARGET_SECONDS).sum())
    print(
        f"{name}: {duration:.1f} s; {dict(endings)}; seconds to the end: median {median:.2f}, "
        f"most {most:.2f}, {late} above {TARGET_SECONDS}"
    )
    assert endings["stopped"] >= NUM_SIGNALS / 4
    assert most < TARGET_SECONDS * BUSY_FACTOR


# ------------------------------------------------------------------ limits, at full size

LIMITS = (100, 400, 800, 1100, 1400, 1700, 2000, 2400, 3000, 4000)  # MB of address space


def check_ending(name: str, out: Path, process: subprocess.Popen) -> int:
    """Wait for a program; fail unless it ends well or with one line; return its exit code."""
    with process:
        _, stderr = process.communicate(timeout=600)
    programs.check_outputs(name, out)
    story = f"{name}, {process.returncode}:\n{stderr}"
    assert "Traceback" not in stderr, story
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (process.returncode == 2), story
    if process.returncode == 2:
        *logs, last = stderr.splitlines()
        assert [last] == errors, story
        assert all(re.fullmatch(programs.PROGRAMS[name].logs, line) for line in logs), story
    return process.returncode


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_address_space_limits(name, inputs, tmp_path):
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
def test_lost_standard_streams(name, inputs, tmp_path):
    cases = {
        "reader gone": ('exec "$@" > >(exec <&-)', {0, 141}),
        "full": ('exec "$@" > /dev/full', {0, 2}),
        "closed": ('exec "$@" <&- >&-', {0}),
        "all closed": ('exec "$@" <&- >&- 2>&-', {0}),
    }
    if name in ("predict", "check", "torch_to_flax"):  # print many lines
        cases["reader gone"][1].remove(0)
        cases["full"][1].remove(0)
    for case, (shell, codes) in cases.items():
        out = tmp_path / case
        out.mkdir()
        assert check_ending(name, out, programs.start(name, out, inputs, shell)) in codes, case


# Another user, who may still read and write everything: the interpreter may be in root's home.
HOMELESS = """
    unset HOME XDG_CACHE_HOME
    exec setpriv --reuid=54321 --regid=54321 --clear-groups --inh-caps=+dac_override \\
        --ambient-caps=+dac_override "$@"
    """


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_a_user_without_a_passwd_entry(name, inputs, tmp_path):
    probe = [sys.executable, "-c", "import pwd, os; pwd.getpwuid(os.getuid())"]
    if "uid not found" not in run(["bash", "-c", HOMELESS, "bash", *probe]).stderr:
        pytest.skip("setpriv cannot change the user here: it needs root")
    process = programs.start(name, tmp_path, inputs, HOMELESS)
    assert check_ending(name, tmp_path, process) == 0
