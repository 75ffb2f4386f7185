"""The commands and examples of the documentation run, and the files and names in it exist.

The default suite parses every command line of README.md, CONTRIBUTING.md and docs/, builds every
config that is named in these commands, and runs the quick commands and the Python examples in this
process. The suite of tests marked `full` runs the commands in subprocesses, page by page, and the
notebook.
"""

import argparse
import ast
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import jaxvid
from configs import motion, stam_16_k400, xvit_k600
from jaxvid import cli
from jaxvid.command import COMMANDS
from jaxvid.data.synthetic_motion import LABELS, make_motion
from jaxvid.experiment import resolve
from jaxvid.training import outputs
from tests.programs import write_evaluation
from tests.serving.running_server import make_fake_model, running
from tests.xla_flags import FAST_COMPILATION

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
NOTEBOOK = ROOT / "docs" / "finetune.ipynb"
LANGUAGES = ("bash", "python", "text")

# Patterns of commands that no test runs → reasons. Their flags, configs and Makefile targets are
# still checked.
NOT_RUN = {
    r"make ": "installs packages, or runs these tests",
    r"python3 -m (venv|pip) |\.venv/bin/pip ": "installs packages",
    r"srun ": "needs a Slurm cluster",
    r"(sbatch|kubectl) ": "needs a cluster; tests/distributed/test_cluster_files.py checks the "
    "files",
    r"docker ": "needs Docker; make test-container builds and runs the image",
    r"tfds ": "needs TensorFlow",
    r"python main\.py .*--config\.data\.source=tfds ": "needs UCF101; "
    "tests/data/test_tfds.py trains on a miniature",
    r"spark-class ": "needs pyspark; tests/data/test_beam.py starts a cluster if it is installed",
    r"python -m jaxvid .*--runner ": "needs apache-beam; tests/data/test_beam.py runs the programs "
    "if it is installed",
    r"python main\.py .*--num_processes 2 ": "waits for a second process; "
    "tests/distributed starts both processes",
    r"python main\.py --config configs/xvit_k600\.py (?!.*--mode schedule)": "needs Kinetics-600",
    r"python -m jaxvid\.check_labels --model models/xvit_k600 ": "needs released weights; "
    "tests/test_check_labels.py runs the program on small input",
    r"python -m jaxvid(\.| )(predict .*--model stam_16|eval .*init_from=xvit_k600|download )": ""
    "needs a network; tests/weights uses a local server",
    r"python convert/torch_to_flax\.py .*--input (stam_16|xvit_k600|vit_b16_in21k)\.pth": "needs "
    "released weights; tests/test_full.py converts files with the same names and shapes",
    r"python -m jaxvid probe ": "needs scikit-learn, an optional package; "
    "tests/evaluation/test_probing.py runs the program if it is installed",
    r"python -m jaxvid(\.export .*--format onnx| eval .*--onnx )": "needs optional packages; "
    "tests/inference/test_onnx.py runs the programs if they are installed",
    r"python benchmarks/(data|deploy|forward|scale|serve|train|windows)\.py": "takes minutes and "
    "an idle machine; tests/test_benchmarks.py runs them on small input",
    r"python benchmarks/(input_cost|pack_formats)\.py": "takes minutes and an idle machine; "
    "tests/test_benchmarks.py runs them on small input",
    r"(python|jaxvid) .*(gs|s3)://": "needs an object store; "
    "tests/test_object_stores.py runs servers",
    r"python benchmarks/remote\.py": "needs s3fs; "
    "tests/test_object_stores.py runs it on small input",
    r"python -m benchmarks\.gpu ": "takes minutes and a GPU; tests/test_benchmarks.py runs it on "
    "a CPU with tiny sizes",
    r"python -m tests\.mutation ": "needs mutmut and takes minutes",
    r"python -m jaxvid serve ": "runs until a signal; tests/test_serve.py runs it",
}

# Programs whose `main` takes seconds on small input and can be called in this process.
QUICK = (
    *("jaxvid.predict", "jaxvid.visualize", "jaxvid.export", "jaxvid.compare"),
    *("jaxvid.data.check", "jaxvid.data.prepare", "jaxvid.features", "convert.flax_to_torch"),
)

# Config → overrides that shorten its training commands in the `full` suite.
SHRINK = {
    "motion": "data.motion.num_train=48 data.motion.num_val=24 "
    "batch_size=16 eval.batch_size=8 num_epochs=2.0 optimizer.warmup_epochs=0.67",
    "finetune": "batch_size=8 num_epochs=1.0 optimizer.warmup_epochs=0.5",
}

# Folders of the repository.
FOLDERS = ("benchmarks", "configs", "convert", "docs", "jaxvid", "tests")
PYTHON = re.compile(r"^(\.venv/bin/)?python ")  # start of a command that runs Python
JAXVID = re.compile(r"^(\.venv/bin/)?jaxvid ")
SERVER = "http://127.0.0.1:7860"  # address of the server in examples
CONFIG_SECTIONS = ("data", "eval", "loss", "model", "optimizer", "mesh", "distill")


class Block(NamedTuple):
    """A fenced block of a page: its location (`docs/data.md:12`), language and text."""

    location: str
    language: str
    text: str

    def commands(self) -> list[str]:
        """Return the commands of a `bash` block, with continuation lines joined.

        `jaxvid` is replaced by `python -m jaxvid`, which does not need an installed package.
        """
        lines = self.text.replace("\\\n", " ").splitlines()
        commands = [" ".join(line.split()) for line in lines if line.strip()]
        return [JAXVID.sub("python -m jaxvid ", command) for command in commands]


def read_page(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def read_blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = read_page(page)
    matches = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{page}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2]) for m in matches]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read_page(page), flags=re.MULTILINE | re.DOTALL)


def reason_not_run(command: str) -> str | None:
    """Return the reason in `NOT_RUN` for a command, or None if the command is run."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), None)


# ------------------------------------------------------------------ command lines


class ParsedError(Exception):
    """Raised by the patched `parse_args` instead of returning, so that the program ends."""


def program_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the arguments of `python` into the program's module and its own arguments."""
    if arguments[:2] == ["-m", "jaxvid"]:
        command = COMMANDS[arguments[2]]
        return command.module, [*command.arguments, *arguments[3:]]
    if arguments[0] == "-m":
        return arguments[1], arguments[2:]
    if arguments[0] == "main.py":
        return "jaxvid.main", arguments[1:]
    return arguments[0].removesuffix(".py").replace("/", "."), arguments[1:]


def absl_flags(source: str) -> flags.FlagValues:
    """Return the flags that the source of a program defines, without registering them globally."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_"):
            node.keywords.append(ast.keyword("flag_values", ast.Name("values", ast.Load())))
            code = compile(ast.fix_missing_locations(ast.Expression(node)), "flags", "eval")
            eval(code, {"flags": flags, "values": values})
    return values


def check_config(config: ConfigDict) -> None:
    """Check the values of a config by resolving it."""
    resolve(config)


def check_command(command: str, monkeypatch) -> None:
    """Check the flags of a command and build its config, if it has one, without running it."""
    name, *arguments = shlex.split(command)
    if name == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    if name == "srun":
        check_command(command[command.index("python ") :], monkeypatch)
        return
    if name in (
        "python3",
        ".venv/bin/pip",
        "docker",
        "curl",
        "tfds",
        "sbatch",
        "kubectl",
        "spark-class",
    ):
        return
    assert PYTHON.match(command), command
    module, arguments = program_of(arguments)
    path = ROOT / module.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    if module.startswith(("benchmarks.", "tests.")):  # importing these changes the environment
        for argument in arguments:
            if argument.startswith("--"):
                option = argument.partition("=")[0]
                assert {f'"{option}"', f'"{option[2:]}"'} & {*re.findall(r'"[\w-]+"', source)}
        return
    if "cli.define_config" in source:
        argv = cli._find_configs([module, *arguments])
        cli._check_config(argv)
        values = absl_flags(source)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", argv)  # config_flags reads overrides from it
            assert values(argv) == [module], command
        check_config(values["config"].value)
        return
    with monkeypatch.context() as patch:
        original = argparse.ArgumentParser.parse_args

        def parse(parser, args=None, namespace=None):
            original(parser, args, namespace)
            raise ParsedError

        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(ParsedError):
            importlib.import_module(module).main()


# ------------------------------------------------------------------ files, names and fields


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Return the paths of the Python files, relative to the root of the repository."""
    paths = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.py")
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page, files):
    text = read_page(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target
    for name in re.findall(r"[\w./-]*\w\.py\b", text):
        known = any(f"/{file}".endswith(f"/{name}") for file in files)
        assert known or name == "FILE.py", name
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_names_occur_in_the_stated_files(page):
    text = prose(page)
    pairs = re.findall(r"`(\w+)`\s+(?:in|\()\s*`?([\w/]+\.py)", text)
    pairs += [(name, file) for file, name in re.findall(r"`([\w/]+\.py)`\s+\(`(\w+)`\)", text)]
    for name, file in pairs:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), (name, file)


def field_names(config: ConfigDict, prefix: str = "") -> set[str]:
    """Return the names of the fields of a config, e.g. `batch_size`, `model` and `model.width`."""
    names = set()
    for name, value in config.items():
        names.add(prefix + name)
        if isinstance(value, ConfigDict):
            names |= field_names(value, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("page", PAGES)
def test_config_fields_exist(page):
    configs = (motion.get_config(), xvit_k600.get_config(), stam_16_k400.get_config())
    known = set().union(*map(field_names, configs))
    text = prose(page)
    sections = "|".join(CONFIG_SECTIONS)
    named = {*re.findall(rf"`((?:{sections})\.\w+)(?:=[^`]*)?`", text)}
    named |= {*re.findall(r"--config\.([\w.]+)", text)}
    for table in re.findall(r"^\| field \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            cells = re.findall(r"`(?:--config\.)?([\w.]+)(?:=[^`]*)?`", row.split("|")[1])
            named |= {*cells}
    unknown = {name for name in named - known if not name.endswith((".json", ".html", ".md"))}
    assert not unknown


# ------------------------------------------------------------------ examples


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_known_language(page):
    assert read_page(page).count("```") == 2 * len(read_blocks(page))
    for block in read_blocks(page):
        assert block.language in LANGUAGES, block.location


def link_programs(folder: Path) -> None:
    """Link the programs into a folder, so that commands do not write into the repository."""
    for name in ("main.py", *FOLDERS):
        (folder / name).symlink_to(ROOT / name)


def make_videos(folder: Path, motion_folder: Path) -> None:
    """Create the videos that are named in the pages, with the content of `motion_folder`."""
    for split in ("train", "val"):
        for i, line in enumerate((motion_folder / f"{split}.csv").read_text().splitlines()):
            name, label = line.split()
            target = folder / "MY_VIDEOS" / split / LABELS[int(label)] / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            if i < 24:
                target.symlink_to(motion_folder / name)
    (folder / "MY_CLASSES").symlink_to("MY_VIDEOS/train")
    (folder / "MY_LIST").symlink_to(motion_folder)
    (folder / "more" / "of" / "them").mkdir(parents=True)
    clip = motion_folder / "val" / "00000.mp4"
    (folder / "more" / "of" / "them" / "clip.mp4").symlink_to(clip)
    with av.open(str(clip)) as source:
        frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    with av.open(str(folder / "long.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i in range(300):  # 20 s
            picture = av.VideoFrame.from_ndarray(frames[i % len(frames)], format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, motion_folder) -> Path:
    """Return a folder for quick commands: small videos, an untrained model and two evaluations."""
    folder = tmp_path_factory.mktemp("docs")
    link_programs(folder)
    make_videos(folder, motion_folder)
    (folder / "data").mkdir()
    (folder / "data" / "motion").symlink_to(motion_folder)
    preprocessing = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
    preprocessing["sampling"] = "segments"
    model = jaxvid.create_model("xvit_tiny", width=16, depth=1)
    for name in ("model", "best"):
        target = folder / "runs" / "motion" / name
        jaxvid.save_model(model, target, preprocessing=preprocessing, labels=list(LABELS))
    for name in ("motion", "eval"):
        write_evaluation(folder / "runs" / name, {"a.mp4": ("left", "left")})
    return folder


@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")  # raised by absl
@pytest.mark.parametrize("page", PAGES)
def test_commands_have_valid_flags(page, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    for block in read_blocks(page):
        for command in block.commands() if block.language == "bash" else ():
            try:
                check_command(command, monkeypatch)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{block.location}: {command}: {error!r}")


def commands_after_the_demo() -> list[str]:
    """Return the commands that the demo prints at its end."""
    text = outputs.describe_use(Path("runs/motion/model"), generated=True)
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return [f"python {arguments}" for _, arguments in lines]


@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")  # raised by absl
def test_commands_after_the_demo_have_valid_flags(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    classify, train = commands_after_the_demo()
    for command in (classify, train):
        check_command(command, monkeypatch)
    assert classify.split()[-1] in jaxvid.list_models(pretrained=True)


def test_every_pattern_in_not_run_matches_a_command():
    commands = [c for page in PAGES for b in read_blocks(page) for c in b.commands()]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in commands), pattern


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """Yield the address of a running server, which replaces `SERVER` in examples."""
    with running([make_fake_model()]) as server:
        yield server.url


def run_in_process(command: str, monkeypatch, server_url: str) -> None:
    """Run `curl`, or call the `main` of a quick program. Other commands are ignored."""
    if command.startswith("curl "):
        run_command(command.replace(SERVER, server_url).replace("curl ", "curl -sSf ", 1), ".")
        return
    if not PYTHON.match(command) or reason_not_run(command):
        return
    module, arguments = program_of(shlex.split(command)[1:])
    if module not in QUICK:
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    status = 0
    try:
        status = importlib.import_module(module).main()
    except SystemExit as error:
        status = error.code
    assert not status, command


def run_python(block: Block, server_url: str) -> None:
    """Run a `python` block in this process."""
    text = block.text.replace(SERVER, server_url)
    exec(compile(text, block.location, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES)
def test_quick_examples_run(page, checkout, monkeypatch, server_url):
    monkeypatch.chdir(checkout)
    for block in read_blocks(page):
        if block.language == "python":
            run_python(block, server_url)
        elif block.language == "bash":
            for command in block.commands():
                run_in_process(command, monkeypatch, server_url)


# ------------------------------------------------------------------ all examples


def run_command(command: str, folder: str | Path) -> None:
    """Run a command in a folder, on one CPU device. `SHRINK` shortens training commands."""
    for config, fields in SHRINK.items():
        if re.search(rf"--config (configs/)?{config}\b", command):
            command += "".join(f" --config.{field}" for field in fields.split())
    done = subprocess.run(
        ["bash", "-c", PYTHON.sub(f"{shlex.quote(sys.executable)} ", command, count=1)],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with small videos and a shortened run of the demo, for all commands."""
    folder = tmp_path_factory.mktemp("trained")
    link_programs(folder)
    make_motion(folder / "data" / "motion", num_train=48, num_val=24, seed=0)
    make_videos(folder, folder / "data" / "motion")
    run_command("python main.py --config configs/motion.py --workdir runs/motion", folder)
    return folder


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES)
def test_all_examples_run(page, trained, monkeypatch, server_url):
    monkeypatch.chdir(trained)
    for block in read_blocks(page):
        if block.language == "python":
            run_python(block, server_url)
        elif block.language == "bash":
            for command in block.commands():
                if not reason_not_run(command):
                    run_command(command.replace(SERVER, server_url), trained)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_fine_tuning_after_the_demo_runs(trained):
    _, train = commands_after_the_demo()
    shutil.rmtree(trained / "runs/mine", ignore_errors=True)  # of the examples in the docs
    run_command(train, trained)
    assert (trained / "runs" / "mine" / "eval.json").exists()


# ------------------------------------------------------------------ the notebook


@functools.cache
def notebook_code() -> list[str]:
    """Return the code cells of the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_notebook_is_valid_python_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    for code in notebook_code():
        compile(code, "cell", "exec")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_notebook_runs(tmp_path):
    link_programs(tmp_path)
    (tmp_path / "cells.py").write_text("\n\n".join(notebook_code()), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    report = json.loads((tmp_path / "runs/notebook/finetuned/eval.json").read_text())
    assert report["num_videos"] == 48
    assert report["top1"] > 50  # chance level of four classes: 25 %
