"""The command `jaxvid`, which runs the programs of this package.

It imports only the standard library, so that `--help` and completion are fast.
"""

import difflib
import multiprocessing
import sys
from typing import NamedTuple, NoReturn

from jaxvid import __version__, entry_point, parsers
from jaxvid.converters import find_converter

if multiprocessing.parent_process():  # each worker process imports the console script first
    entry_point.ignore_signals()

CONTINUE = "; run the same command to continue"


class Command(NamedTuple):
    """A command of `jaxvid`.

    Attributes:
        module: The program's module.
        summary: Description in `jaxvid --help`.
        arguments: Arguments that precede those of the user.
        hint: End of the line that is printed after a signal.
    """

    module: str
    summary: str
    arguments: tuple[str, ...] = ()
    hint: str = ""


COMMANDS = {
    "train": Command("jaxvid.main", "train or resume, then evaluate", ("--mode=train",), CONTINUE),
    "eval": Command("jaxvid.main", "evaluate a run or a model folder", ("--mode=eval",), CONTINUE),
    "compare": Command("jaxvid.compare", "compare two finished evaluations"),
    "schedule": Command("jaxvid.main", "plot the learning rate of a config", ("--mode=schedule",)),
    "plan": Command("jaxvid.main", "print the memory of a training step", ("--mode=plan",)),
    "predict": Command("jaxvid.predict", "classify video files"),
    "features": Command("jaxvid.features", "extract features of videos", hint=CONTINUE),
    "probe": Command("jaxvid.probe", "linear and k-NN accuracy on features"),
    "visualize": Command("jaxvid.visualize", "draw the attention of a network on a video"),
    "serve": Command("jaxvid.serve", "serve models over HTTP, with a page to try them"),
    "export": Command("jaxvid.export", "write a network as StableHLO, ONNX or safetensors"),
    "convert": Command("convert.torch_to_flax", "convert PyTorch weights into a model folder"),
    "convert-to-torch": Command("convert.flax_to_torch", "convert a model folder to PyTorch"),
    "check": Command("jaxvid.data.check", "find videos that cannot be decoded"),
    "prepare": Command("jaxvid.data.prepare", "convert videos to a pack", hint=CONTINUE),
    "browse": Command("jaxvid.data.browse", "draw clips as the network sees them"),
    "check-labels": Command("jaxvid.check_labels", "check the order of a model's class names"),
    "download": Command("jaxvid.download", "download released weights", hint=CONTINUE),
    "models": Command("jaxvid.model_list", "list the networks"),
    "completion": Command("jaxvid.completion", "print a completion script for a shell"),
}


def usage() -> str:
    """Return the text of `jaxvid --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxvid COMMAND ...",
            "",
            "Video transformers in JAX.",
            "",
            *lines,
            "",
            "`jaxvid COMMAND --help` describes a command, `jaxvid --version` prints the version.",
        ]
    )


def main() -> NoReturn:
    """Run the command that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(f"jaxvid {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see jaxvid --help"
        print(f"error: jaxvid {name}: there is no such command; {hint}", file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[name]
    sys.argv[:2] = [f"jaxvid {name}", *command.arguments]
    if make_parser := getattr(parsers, name.replace("-", "_"), None):
        make_parser().parse_args()  # --help and wrong options end here
    module = command.module
    if not module.startswith("jaxvid."):
        module = find_converter(module)
    entry_point.run(module, command.hint)
