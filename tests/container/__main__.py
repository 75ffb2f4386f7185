"""Build the container image and test it: `python -m tests.container`.

The image is built by Docker or Podman. Its programs then run without network, with a read-only root
file system and without root. Predictions are compared with those of this environment.

Where the base image cannot be downloaded, `--base debootstrap` makes one of Debian 12 from a Debian
mirror. This needs the program debootstrap, and root. On a machine that downloads packages through a
proxy with a certificate of its own, mount the certificates into the build:

    --build_options "--network host --volume /etc/pip.conf:/etc/pip.conf:ro --volume ..."
"""

import argparse
import json
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jaxvid
from jaxvid.data.synthetic_motion import LABELS, make_motion
from jaxvid.errors import InputError
from jaxvid.models import PRESETS
from jaxvid.predict import predict

ROOT = Path(__file__).parents[2]
DEBOOTSTRAP = "debootstrap"  # value of --base
MIRROR = "http://deb.debian.org/debian"
PREPROCESSING = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
PREPROCESSING["sampling"] = "segments"
START_SECONDS = 120  # time for `jaxvid serve` to become healthy
STOP_SECONDS = 30
# Prints the user, the files that could be created, and the compilers that are installed.
PROBE = """
import json, os, shutil
created = []
for folder in ("/", "/opt/jaxvid", "/tmp", "/cache"):
    try:
        open(folder + "/probe", "x").close()
        created.append(folder)
    except OSError:
        pass
tools = [name for name in ("gcc", "cc", "g++", "make") if shutil.which(name)]
print(json.dumps({"user": os.getuid(), "created": created, "tools": tools}))
"""
# Prints the answer of the server in the same container.
REQUEST = """
import json, os, jaxvid
client = jaxvid.Client("http://127.0.0.1:7860", token=os.environ["JAXVID_TOKEN"])
top = client.predict("/work/clip.mp4").top
print(json.dumps({entry.label: entry.probability for entry in top}))
"""


class Engine:
    """Docker or Podman.

    Args:
        command: The program and its global options.
        run_options: Options of `run`.
    """

    def __init__(self, command: list[str], run_options: list[str]):
        self.command, self.run_options = command, run_options

    def __call__(self, *arguments: str, stdin=None) -> str:
        """Run a command of the engine; return its stdout.

        Raises:
            InputError: It fails.
        """
        done = subprocess.run(
            [*self.command, *arguments], stdin=stdin, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            shown = shlex.join([*self.command, *arguments])
            raise InputError(f"exit code {done.returncode}: {shown}")
        return done.stdout.strip()

    def run(self, image: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Run a container without network and with a read-only root file system."""
        isolation = ("--network", "none", "--read-only", "--tmpfs", "/tmp")
        return self("run", *isolation, *self.run_options, *options, image, *arguments)


def find_engine() -> list[str]:
    """Return the command of the first engine that works.

    Raises:
        InputError: There is none.
    """
    for name in ("docker", "podman"):
        if shutil.which(name) and not subprocess.call(
            [name, "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ):
            return [name]
    raise InputError("neither docker nor podman works on this machine; start or install one")


def make_base(engine: Engine, folder: Path) -> str:
    """Make a base image of Debian 12 with Python; return its name.

    Raises:
        InputError: The program debootstrap is not installed or fails.
    """
    if shutil.which("debootstrap") is None:
        raise InputError("--base debootstrap: install the program debootstrap")
    name, root = "localhost/jaxvid-base", folder / "base"
    packages = "--include=python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", root, MIRROR]
    if status := subprocess.call(command, stdout=subprocess.DEVNULL):
        raise InputError(f"--base debootstrap: exit code {status}")
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
        engine("import", "-", name, stdin=archive.stdout)
    return name


def make_inputs(folder: Path) -> tuple[str, ...]:
    """Write a model folder and a clip; return the options of `run` that mount them."""
    model = jaxvid.create_model("xvit_tiny", num_classes=len(LABELS), seed=1)
    jaxvid.save_model(model, folder / "model", preprocessing=PREPROCESSING, labels=list(LABELS))
    make_motion(folder / "data", num_train=len(LABELS), num_val=len(LABELS), seed=0)
    (folder / "work").mkdir()
    shutil.copy(folder / "data" / "val" / "00000.mp4", folder / "work" / "clip.mp4")
    folder.chmod(0o755)  # the user of the container has no rights of its own
    mounts = (f"{folder / 'model'}:/model:ro", f"{folder / 'work'}:/work:ro")
    return tuple(option for mount in mounts for option in ("--volume", mount))


def check_environment(engine: Engine, image: str) -> None:
    """Check the version, the user, the writable folders and the installed programs."""
    assert engine.run(image, "--version", options=("--rm",)) == f"jaxvid {jaxvid.__version__}"
    table = engine.run(image, "models", options=("--rm",))
    assert {*PRESETS} <= {*re.findall(r"^\w+", table, re.MULTILINE)}
    options = ("--rm", "--entrypoint", "python")
    found = json.loads(engine.run(image, "-c", PROBE, options=options))
    assert found == {"user": 10001, "created": ["/tmp", "/cache"], "tools": []}, found
    labels = json.loads(engine("inspect", "--format", "{{json .Config.Labels}}", image))
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def check_predictions(engine: Engine, image: str, mounts: tuple[str, ...], expected: dict) -> None:
    """Compare `jaxvid predict` with predictions of this environment."""
    arguments = ("predict", "clip.mp4", "--model", "/model", "--top_k", str(len(expected)))
    result = json.loads(engine.run(image, *arguments, "--json", options=("--rm", *mounts)))
    compare({entry["label"]: entry["probability"] for entry in result["top"]}, expected)


def compare(probabilities: dict[str, float], expected: dict[str, float]) -> None:
    """Compare probabilities by class, of which some may be missing.

    Another version of Python installs another version of JAX, whose results differ by rounding.
    """
    for label, probability in probabilities.items():
        assert abs(probability - expected[label]) < 1e-4, (probabilities, expected)


def check_server(engine: Engine, image: str, mounts: tuple[str, ...], expected: dict) -> None:
    """Start the default command, wait until it is healthy, send it a clip, and stop it."""
    environment = ("--env", f"JAXVID_TOKEN={secrets.token_hex(16)}")
    container = engine.run(image, options=("--detach", *environment, *mounts))
    try:
        health = engine("inspect", "--format", "{{json .Config.Healthcheck.Test}}", container)
        kind, *command = json.loads(health)
        assert kind == "CMD"
        deadline = time.monotonic() + START_SECONDS
        probe = [*engine.command, "exec", container, *command]
        while subprocess.run(probe, capture_output=True).returncode:
            assert time.monotonic() < deadline, engine("logs", container)
            time.sleep(1)
        compare(json.loads(engine("exec", container, "python", "-c", REQUEST)), expected)
        engine("stop", "--time", str(STOP_SECONDS), container)
        status = engine("inspect", "--format", "{{.State.ExitCode}}", container)
        assert status == "0", engine("logs", container)
    finally:
        engine("rm", "--force", "--volumes", container)


def build(engine: Engine, args: argparse.Namespace, folder: Path) -> None:
    """Build the image."""
    base = make_base(engine, folder) if args.base == DEBOOTSTRAP else args.base
    options = ["--build-arg", f"BASE={base}"] if base else []
    if Path(engine.command[0]).name == "podman":
        options += ["--format", "docker"]  # the default format has no health check
    options += ["--build-arg", f"VERSION={jaxvid.__version__}"]
    engine("build", *options, *shlex.split(args.build_options), "--tag", args.tag, str(ROOT))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engine", help="docker or podman, with global options (default: the first that works)")
    add("--base", help=f"base image, or {DEBOOTSTRAP} (default: that of Dockerfile)")
    add("--tag", default="jaxvid:test", help="name of the image (default: jaxvid:test)")
    add("--build_options", default="", help="further options of `build`")
    add("--run_options", default="", help="further options of `run`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxvid_container_") as temporary:
        folder = Path(temporary)
        command = shlex.split(args.engine) if args.engine else find_engine()
        engine = Engine(command, shlex.split(args.run_options))
        mounts = make_inputs(folder)
        [result] = predict([folder / "work" / "clip.mp4"], folder / "model", top_k=len(LABELS))
        expected = {entry["label"]: entry["probability"] for entry in result["top"]}
        steps: dict[str, Callable[[], None]] = {
            "build": lambda: build(engine, args, folder),
            "environment": lambda: check_environment(engine, args.tag),
            "predict": lambda: check_predictions(engine, args.tag, mounts, expected),
            "serve": lambda: check_server(engine, args.tag, mounts, expected),
        }
        for name, step in steps.items():
            start = time.monotonic()
            step()
            print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
