"""Mutation testing of selected modules: `python -m tests.mutation [MODULE...]`.

mutmut makes the mutants and this module runs them. mutmut's own runner does not mutate tables and
defaults of dataclasses, and attributes the calls of a shared fixture to only one test. Here, a
process collects the tests of a module and then forks for each mutant, or for several mutants with
`Target.share`. It forks before JAX starts its threads, which do not survive a fork. The child
replaces the code of the module's functions by that of the mutant, and runs the tests up to the
first failure. Mutants of code that runs at import (tables, defaults of dataclasses) are run in a
process that imports the mutated module.

The exit code is 1 if a mutant survives that `docs/mutation.md` does not list.
"""

import argparse
import dataclasses
import importlib.abc
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.xla_flags import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = FAST_COMPILATION
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import cv2  # noqa: F401  slow imports are done once, before the forks
import flax.nnx  # noqa: F401
import grain  # noqa: F401
import jax
import libcst as cst
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import pytest
from libcst import matchers
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider
from mutmut import configuration
from mutmut.mutation import file_mutation

ROOT = Path(__file__).parents[1]
SURVIVORS = ROOT / "docs" / "mutation.md"
MIN_SECONDS = 60  # lower bound of the time limit of a mutant
SHARED = 40  # mutants per process with `Target.share`


@dataclasses.dataclass(frozen=True)
class Target:
    """Functions to mutate, and the tests that run for each mutant.

    Attributes:
        tests: Test files, separated by spaces.
        select: pytest's `-k` expression; empty: all tests of the file.
        functions: Names of functions, classes and variables; empty: the whole module.
        share: Run many mutants in one process, so that JAX starts and compiles only once. Only
            for tests whose compiled functions do not outlive a test, as later mutants would reuse
            them.
    """

    tests: str
    select: str = ""
    functions: tuple[str, ...] = ()
    share: bool = False


# Fast tests only: training a network takes seconds for each mutant.
TARGETS = {
    "jaxvid/data/clips/sampling.py": [Target("tests/data/test_sampling.py")],
    "jaxvid/data/clips/transforms.py": [Target("tests/data/test_transforms.py")],
    "jaxvid/data/clips/autoaugment.py": [
        Target(
            "tests/data/test_autoaugment.py",
            "published or levels_map or augment_applies or magnitude or depends",
        )
    ],
    "jaxvid/data/clips/image_ops.py": [
        Target(
            "tests/data/test_autoaugment.py",
            "value_operations or histograms or equalize or array_views",
            (
                *("invert", "solarize", "solarize_add", "posterize", "brightness", "contrast"),
                *("autocontrast", "equalize", "_look_up", "_blend_table"),
            ),
        ),
        Target(
            "tests/data/test_autoaugment.py",
            "blends or array_views",
            ("color", "sharpness", "_luma", "_TRUNCATE"),
        ),
        Target(
            "tests/data/test_autoaugment.py",
            "geometric or array_views",
            (
                *("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "_shift"),
                *("_kernel", "_FILL"),
            ),
        ),
    ],
    "jaxvid/training/batch_augmentation.py": [
        Target(
            "tests/training/test_batch_augmentation.py",
            "erased or erasing or dtype",
            ("erase", "draw_boxes"),
        ),
        Target(
            "tests/training/test_batch_augmentation.py",
            "mixup or cutmix or dtype or permutations",
            ("mixup", "cutmix", "_between", "draw_permutation", "permute"),
        ),
    ],
    "jaxvid/training/losses.py": [
        Target("tests/training/test_steps.py", "formula", ("distillation_loss",)),
        Target(
            "tests/training/test_losses.py",
            "",
            (
                *("CLASS_WEIGHTS", "MAX_NAMED_CLASSES", "LossConfig", "describe_weights"),
                *("cross_entropy", "binary_cross_entropy", "total_weight"),
            ),
            share=True,
        ),
    ],
    "jaxvid/training/steps.py": [
        Target(
            "tests/training/test_steps.py tests/training/test_losses.py",
            "linear or fresh_state or each_part or recipes or mixed_within or weighted_step "
            "or weighted_mean or mixed_labels or multi_label_targets",
            (
                "Recipe",
                "Teacher",
                "init_state",
                "eval_params",
                "train_step",
                "_label_losses",
                "_hits",
                "_prepare_clips",
                "_accumulate",
            ),
            share=True,
        ),
    ],
    "jaxvid/storage/eval_step.py": [Target("tests/training/test_steps.py", "eval_step")],
    "jaxvid/storage/preprocessing.py": [
        Target("tests/training/test_steps.py", "normalize", ("normalize",))
    ],
    "jaxvid/training/optim.py": [Target("tests/training/test_optim.py", share=True)],
    "jaxvid/evaluation/metrics.py": [Target("tests/evaluation/test_metrics.py")],
    "jaxvid/training/metric_window.py": [
        Target(
            "tests/training/test_metric_writer.py",
            "",
            ("sum_metrics", "window_steps", "training_row", "describe_row", "MIN_ROWS"),
        )
    ],
    "jaxvid/training/metric_writer.py": [
        Target("tests/training/test_metric_writer.py", "", ("last_evaluation", "_step_of"))
    ],
    "jaxvid/distributed/sharding.py": [
        Target(
            "tests/distributed/test_sharding.py",
            "not equal_one_device and not fsdp_over and not mixing",
            (
                *("make_mesh", "batch_sharding", "check_batch_size", "replicated"),
                *("state_sharding", "with_sharding", "to_global_arrays", "batch_shard"),
            ),
            share=True,
        )
    ],
    "jaxvid/training/checkpoint.py": [
        Target(
            "tests/training/test_checkpoint.py",
            "checkpoints or disk or that_fails or aside",
            share=True,
        )
    ],
    "jaxvid/training/checkpoint_files.py": [
        Target(
            "tests/training/test_checkpoint.py",
            "checkpoints or disk or that_fails or aside",
            share=True,
        )
    ],
    "jaxvid/training/outputs.py": [
        Target(
            "tests/training/test_checkpoint.py",
            "checkpoints or disk or that_fails or aside",
            (
                *("LATE_OUTPUTS", "OUTPUTS", "check_writable", "check_room", "num_bytes"),
                *("starts_over", "tidy_outputs", "_tidy_outputs"),
            ),
            share=True,
        ),
        Target("tests/training/test_outputs.py", "", ("describe_use",), share=True),
    ],
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        where: The function, class or variable that contains the change, or an empty string.
        change: The lines that differ, `old → new`.
        source: Source of the changed module.
        in_function: Whether the change is in a function that is not called at import.
    """

    where: str
    change: str
    source: str
    in_function: bool

    @property
    def name(self) -> str:
        """The mutant's line in the list of survivors."""
        return f"{self.where}: {self.change}" if self.where else self.change


def make_mutants(path: Path, functions: tuple[str, ...] = ()) -> list[Mutant]:
    """Make the mutants of a module.

    `raise` statements and calls of `log` are not mutated.

    Args:
        path: The module's file.
        functions: Names of functions, classes and variables; empty: the whole module.
    """
    source = path.read_text(encoding="utf-8")
    module, mutations, *_ = file_mutation.create_mutations(str(path), source)
    owners, at_import = {}, set()
    for statement in module.body:
        if isinstance(statement, cst.SimpleStatementLine):
            at_import |= {n.value for n in matchers.findall(statement, matchers.Name())}
        owners.update(dict.fromkeys(map(id, _walk(statement)), _name(statement)))
    messages = {id(node) for message in _messages(module) for node in _walk(message)}
    positions = MetadataWrapper(module, unsafe_skip_copy=True).resolve(PositionProvider)
    mutants = {}
    for mutation in mutations:
        old, new = mutation.original_node, mutation.mutated_node
        owner = owners[id(old)]
        if id(old) in messages or (functions and owner not in functions):
            continue
        if isinstance(new, cst.SimpleString) and "XX" not in new.value:
            continue  # mutmut makes three mutants of a string; one is enough
        mutated = _splice(source, positions[old], module.code_for_node(new))
        function = mutation.contained_by_top_level_function
        in_function = isinstance(function, cst.FunctionDef) and owner not in at_import
        mutant = Mutant(owner, _change(source, mutated), mutated, in_function)
        if mutated != source:
            mutants.setdefault(mutated, mutant)
    return list(mutants.values())


def _name(statement: cst.CSTNode) -> str:
    """Return the name that a top-level statement defines, or an empty string if it defines none."""
    if isinstance(statement, cst.SimpleStatementLine):
        [first, *_] = statement.body
        [target, *_] = getattr(first, "targets", [first])
        return getattr(getattr(target, "target", None), "value", "")
    return statement.name.value if hasattr(statement, "name") else ""


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _messages(module: cst.Module) -> list[cst.CSTNode]:
    """Return the `raise` statements and the calls of `log`."""
    log = matchers.Call(func=matchers.Attribute(value=matchers.Name("log")))
    return [*matchers.findall(module, matchers.Raise() | log)]


def _splice(source: str, position: CodeRange, text: str) -> str:
    """Replace a range of the source by a text."""
    lines = source.splitlines(keepends=True)
    first, last = position.start.line - 1, position.end.line - 1
    text = lines[first][: position.start.column] + text + lines[last][position.end.column :]
    return "".join([*lines[:first], text, *lines[last + 1 :]])


def _change(source: str, mutated: str) -> str:
    """Describe the lines that differ: `old → new`."""
    old, new = source.splitlines(), mutated.splitlines()
    for end in (0, -1):  # difflib takes a second per mutant of a long file
        while old and new and old[end] == new[end]:
            del old[end], new[end]
    old, new = (" ".join(line.partition("  #")[0].strip() for line in x) for x in (old, new))
    return f"`{old}` → `{new}`"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Import hook that loads one module from a mutated source."""

    def __init__(self, name: str, path: Path, source: str):
        self._name, self._path, self._source = name, path, source

    def find_spec(self, name, path=None, target=None):
        if name == self._name:
            return importlib.util.spec_from_file_location(name, self._path, loader=self)
        return None

    def get_source(self, name):
        return self._source

    def get_code(self, name):
        return compile(self._source, str(self._path), "exec", dont_inherit=True)


def replace_code(module: types.ModuleType, source: str) -> None:
    """Replace the code of all functions and methods of an imported module by a mutated source."""
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    sys.modules[module.__name__] = changed  # `dataclasses` looks up the module by its name
    try:
        exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(changed))
    finally:
        sys.modules[module.__name__] = module
    _replace_functions(vars(module), vars(changed), module.__name__)


def _replace_functions(old: dict, new: dict, module: str) -> None:
    for name, value in list(old.items()):
        if getattr(value, "__module__", None) != module or name not in new:
            continue
        if isinstance(value, types.FunctionType):
            value, other = inspect.unwrap(value), inspect.unwrap(new[name])
            if value.__code__.co_freevars == other.__code__.co_freevars:
                value.__code__ = other.__code__
                value.__defaults__, value.__kwdefaults__ = other.__defaults__, other.__kwdefaults__
        elif isinstance(value, type):
            _replace_functions(vars(value), vars(new[name]), module)


class _Forks:
    """Forks of this process, with a limited number at a time."""

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._running: dict[int, tuple[Callable, float, float]] = {}

    def fork(self, seconds: float, done: Callable[[int | None, float], None]) -> bool:
        """Fork as soon as fewer than `jobs` children are running.

        Args:
            seconds: Time limit of the child.
            done: Called with the child's exit code (None: killed at the limit) and its duration in
                seconds.

        Returns:
            True in the child, False in the parent.
        """
        self.wait(self._jobs - 1)
        sys.stdout.flush()
        if not (pid := os.fork()):
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            return True
        now = time.monotonic()
        self._running[pid] = done, now, now + seconds
        return False

    def wait(self, most: int = 0) -> None:
        """Wait until at most `most` children are running."""
        while len(self._running) > most:
            for pid, (done, start, deadline) in list(self._running.items()):
                now = time.monotonic()
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and now < deadline:
                    continue
                if not ended:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del self._running[pid]
                done(os.waitstatus_to_exitcode(status) if ended else None, now - start)
            time.sleep(0.005)


class _CacheAll:
    """Pytest plugin that caches all compiled programs, because mutants share most of them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        result = yield
        if fixturedef.argname == "_environment":
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        return result


class _RunMutants(_CacheAll):
    """Pytest plugin that runs the collected tests once per mutant, in forks.

    Args:
        name: Name of the module.
        mutants: Mutants of the module.
        jobs: Number of forks at a time.
        share: As in `Target`.
        note: Called with a mutant, an exit code (0: it survived; None: time limit) and seconds.
    """

    def __init__(self, name: str, mutants: list[Mutant], *, jobs: int, share: bool, note: Callable):
        self._name, self._mutants, self._share, self._note = name, mutants, share, note
        self._forks, self._failed = _Forks(jobs), False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed or not session.items:
            os._exit(1)
        clean = []  # exit code and duration of the tests without a mutation
        if self._forks.fork(3600, lambda *result: clean.append(result)):
            os._exit(self._fails(session))
        self._forks.wait()
        [(code, seconds)] = clean
        if code:
            print(f"{self._name}: the tests fail without a mutation", flush=True)
            os._exit(1)
        print(f"{self._name}: {len(session.items)} tests take {seconds:.1f} s", flush=True)
        limit = max(MIN_SECONDS, 15 * seconds)
        rest = self._run_shared(session, limit) if self._share else self._mutants
        for mutant in rest:
            if self._forks.fork(limit, lambda *result, m=mutant: self._note(m, *result)):
                os._exit(self._is_killed(session, mutant))
        self._forks.wait()
        os._exit(0)

    def _run_shared(self, session, limit: float) -> list[Mutant]:
        """Run many mutants in each process; return those that must be run in separate processes.

        After its mutants, a process runs the tests without a mutation. If they fail, a mutant has
        changed the state of the process, and all mutants of the process are returned. Mutants that
        exceed the time limit are returned too.
        """
        rest = []
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(self._mutants), SHARED):
                mutants, path = self._mutants[start : start + SHARED], Path(folder, str(start))

                def done(code, seconds, mutants=mutants, path=path):
                    codes = json.loads(path.read_text()) if code == 0 else [None] * len(mutants)
                    for mutant, code in zip(mutants, codes, strict=True):
                        if code is None:
                            rest.append(mutant)
                        else:
                            self._note(mutant, code, seconds / len(mutants))

                if self._forks.fork(limit * (len(mutants) + 1), done):
                    signal.signal(signal.SIGALRM, _raise_timeout)
                    original = (ROOT / sys.modules[self._name].__file__).read_text()
                    self._fails(session)  # starts JAX, so that it takes no time of a mutant
                    codes = []
                    for mutant in mutants:
                        signal.alarm(math.ceil(limit))
                        start = time.monotonic()
                        code = self._is_killed(session, mutant)
                        signal.alarm(0)
                        codes.append(code if time.monotonic() - start < limit else None)
                        replace_code(sys.modules[self._name], original)
                    path.write_text(json.dumps(codes))
                    os._exit(self._fails(session))
            self._forks.wait()
        return rest

    def _is_killed(self, session, mutant: Mutant) -> int:
        """Return 1 if a test fails with a mutant, 0 otherwise."""
        try:
            replace_code(sys.modules[self._name], mutant.source)
        except Exception:  # the mutant cannot be imported
            return 1
        return self._fails(session)

    def _fails(self, session) -> int:
        """Run the tests up to the first failure; return 1 if there is one, 0 otherwise."""
        self._failed = False
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                session._setupstate.teardown_exact(None)
                return 1
        return 0

    def pytest_runtest_logreport(self, report):
        self._failed |= report.failed


def _raise_timeout(*_):
    raise TimeoutError


def run_target(path: str, target: Target, jobs: int, only: str) -> list[tuple[Mutant, str]]:
    """Run the mutants of a target.

    Args:
        path: File of the module.
        target: The functions to mutate and their tests.
        jobs: Number of mutants that run at a time.
        only: Run only mutants whose names contain this text.

    Returns:
        The mutants and their outcomes: `killed`, `survived` or `timeout`.
    """
    name = path.removesuffix(".py").replace("/", ".")
    mutants = [m for m in make_mutants(ROOT / path, target.functions) if only in m.name]
    options = ["-q", "-x", "-s", "-n", "0", "-p", "no:cacheprovider", "-o", "timeout=0"]
    options += [*target.tests.split(), "-k", target.select]
    notes = Path(tempfile.mkdtemp(dir=os.environ["PYTEST_DEBUG_TEMPROOT"])) / "notes"

    def note(mutant: Mutant, code: int | None, seconds: float) -> None:
        outcome = "timeout" if code is None else "killed" if code else "survived"
        with notes.open("a") as file:
            file.write(json.dumps([mutants.index(mutant), outcome]) + "\n")
        if outcome != "killed":
            print(f"{outcome}: {path}: {mutant.name} ({seconds:.1f} s)", flush=True)

    if not (pid := os.fork()):
        in_functions = [mutant for mutant in mutants if mutant.in_function]
        runner = _RunMutants(name, in_functions, jobs=jobs, share=target.share, note=note)
        pytest.main(options, plugins=[runner])
        os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{path}: not run")
    forks = _Forks(jobs)
    for mutant in mutants:
        if not mutant.in_function and forks.fork(600, lambda *x, m=mutant: note(m, *x)):
            sys.meta_path.insert(0, _Finder(name, ROOT / path, mutant.source))
            os._exit(int(pytest.main(options, plugins=[_CacheAll()])))
    forks.wait()
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [(mutants[i], outcome) for i, outcome in map(json.loads, lines)]


def main() -> int:
    """Run the mutants of the modules on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="keys of TARGETS (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: CPUs)"
    )
    parser.add_argument("--only", default="", help="run only mutants whose names contain this text")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(TARGETS):
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(TARGETS)}")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    temporary = tempfile.TemporaryDirectory()
    os.environ["PYTEST_DEBUG_TEMPROOT"] = temporary.name
    # Without this, mutmut looks for its own config file, which is not needed here.
    configuration._guess_source_paths = lambda: ["jaxvid"]
    listed = SURVIVORS.read_text(encoding="utf-8") if SURVIVORS.exists() else ""
    rows, missing = [], []
    for path in args.modules or TARGETS:
        start, results = time.monotonic(), []
        for target in TARGETS[path]:
            results += run_target(path, target, args.jobs, args.only)
        survivors = [mutant for mutant, outcome in results if outcome == "survived"]
        slow = sum(outcome == "timeout" for _, outcome in results)
        missing += [f"{path}: {m.name}" for m in survivors if m.name not in listed]
        counts = len(results), len(results) - len(survivors), slow, len(survivors)
        seconds = f"{time.monotonic() - start:.0f}"
        rows.append(f"| `{path}` | {' | '.join(map(str, counts))} | {seconds} |")
        print(rows[-1], flush=True)
    print("| module | mutants | killed | by the time limit | survivors | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", *rows, sep="\n")
    print(f"{len(missing)} survivors are not listed in {SURVIVORS.relative_to(ROOT)}")
    print(*missing, sep="\n")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
