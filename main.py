"""Trains and evaluates.

python main.py --config FILE.py --workdir FOLDER                train, with evaluation; continues
python main.py --config FILE.py --workdir FOLDER --mode eval    evaluate the newest checkpoint
... --config.FIELD=VALUE                           override a field; the config file lists them
"""

import difflib
import runpy
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.FIELD=VALUE overrides a field.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, reports.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "train (with evaluation; continues), or eval only."
)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; what is wrong with it becomes one line and exit code 2."""
    if {"--help", "-h"} & {*argv}:
        print(__doc__ + flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        _check_config(argv)
        positional = flags.FLAGS(argv)
        if len(positional) > 1:
            raise ValueError(f"{positional[1]!r}: not a flag; see --help")
        if not WORKDIR.value:
            raise ValueError("--workdir FOLDER is needed; see --help")
    except (flags.Error, ValueError, TypeError, SyntaxError, ImportError) as error:
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        sys.exit(2)
    return positional


def _check_config(argv: list[str]) -> None:
    """Refuses a config file that is not there and overrides of fields that it does not have."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    values = [
        argument.partition("=")[2] or after
        for argument, after in pairs
        if argument.partition("=")[0] in ("--config", "-config")
    ]
    if not values:
        raise ValueError("--config FILE.py is needed; see --help")
    file, _, variant = values[-1].partition(":")
    if not Path(file).is_file():
        files = sorted(path for path in Path("configs").glob("*.py") if path.stem != "common")
        there = ", ".join(map(str, files))
        raise ValueError(f"--config: {file} does not exist; there are {there or 'no configs'}")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ValueError(f"--config: {file} is no config: it has no get_config()")
    config = get_config(variant) if variant else get_config()
    for argument in argv:
        if argument.startswith("--config."):
            _check_field(config, argument.partition("=")[0].removeprefix("--config."))


def _check_field(config: ConfigDict, name: str) -> None:
    if name == "model.name":
        raise ValueError("--config.model.name: a config is made for one model; take another config")
    section = config
    for depth, part in enumerate(name.split(".")):
        names = list(section) if isinstance(section, ConfigDict) else []
        if part not in names:
            prefix = "".join(f".{parent}" for parent in name.split(".")[:depth])
            near = difflib.get_close_matches(part, names, n=1) or names
            hint = " or ".join(f"--config{prefix}.{option}" for option in near)
            raise ValueError(
                f"--config.{name} does not exist; there is {hint or 'nothing below ' + prefix}"
            )
        section = section[part]


def main(_) -> None:
    """Runs the program that the flags name; bad input becomes one line and exit code 2."""
    logging.set_verbosity(logging.WARNING)  # JAX, Orbax and Grain tell every step they take
    from jaxvid.errors import InputError
    from jaxvid.evaluate import evaluate
    from jaxvid.train import train

    try:
        {"train": train, "eval": evaluate}[MODE.value](CONFIG.value, WORKDIR.value)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(InputError.EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
