"""Command-line parsing for the programs that take a config."""

import difflib
import inspect
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jaxvid.config import RENAMED_FIELDS, flatten
from jaxvid.config_files import config_names, find_config, provide_configs
from jaxvid.errors import InputError

# Prefixes of environment variables that launchers set for one of several processes.
LAUNCHERS = ("SLURM_STEP", "OMPI_", "PMI_", "JOB_COMPLETION_INDEX")

CONFIG_FLAGS = ("--config", "-config")  # the spellings that absl accepts
# Type of a config field → description of its values, for error messages.
VALUES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    tuple: "a tuple, as in '(1, 2)'",
}


def define_config() -> flags.FlagHolder:
    """Define `--config CONFIG[:VARIANT]` and its overrides `--config.FIELD=VALUE`."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file. --config.FIELD=VALUE overrides a field.", lock_config=True
    )


def parse_flags(
    argv: list[str],
    *,
    doc: str,
    module: str,
    needed: Callable[[], dict[str, str]],
    end_other_processes: Callable[[dict[str, str], str], None] | None = None,
) -> list[str]:
    """Parse the command line; print one line and exit with code 2 if it is wrong.

    Also silence the logs of libraries.

    Args:
        argv: The arguments, with the program's name first.
        doc: Text that `--help` shows before the flags.
        module: The module whose flags `--help` shows.
        needed: Called after parsing. Returns required flag → placeholder for its value, e.g.
            `{"workdir": "FOLDER"}`.
        end_other_processes: Called with the distributed flags and the error message if the command
            line is wrong and this is one of several processes, so that the others do not wait for
            it. None: not called.

    Returns:
        The positional arguments: only the program's name.
    """
    if {"--help", "-h"} & {*argv}:
        print(doc + flags.FLAGS.module_help(module))
        sys.exit(0)
    try:
        provide_configs()
        argv = _join_overrides(_find_configs(argv))
        config = _check_config(argv)
        try:
            positional = flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            raise ValueError(_explain_flag(error.flagname, argv, config)) from None
        except flags.IllegalFlagValueError as error:
            raise ValueError(_explain_value(str(error), argv, config)) from None
        if len(positional) > 1:
            raise ValueError(f"{positional[1]!r}: not a flag; see --help")
        for name, value in needed().items():
            if not flags.FLAGS[name].value:
                raise ValueError(f"--{name} {value} is needed; see --help")
    except (flags.Error, ValueError, TypeError, SyntaxError, ImportError) as error:
        cause = str(error).strip().splitlines()[-1]
        print(f"error: {cause}", file=sys.stderr)
        values = _distributed_flags(argv)
        if end_other_processes and (values or any(n.startswith(LAUNCHERS) for n in os.environ)):
            end_other_processes(values, cause)
        sys.exit(2)
    # Silence log lines of JAX, Orbax, Grain and TFDS, which `app.run` would print at level INFO.
    # Failures are raised and printed as one line.
    logging.set_verbosity(logging.FATAL)
    return positional


def _find_configs(argv: list[str]) -> list[str]:
    """Replace the names of configs in `--config NAME` and `--config=NAME` by their files."""
    found = []
    for before, argument in zip(["", *argv], argv, strict=False):
        name, equals, value = argument.partition("=")
        if name in CONFIG_FLAGS and equals:
            argument = f"{name}={find_config(value)}"
        elif before in CONFIG_FLAGS:
            argument = find_config(argument)
        found.append(argument)
    return found


def _join_overrides(argv: list[str]) -> list[str]:
    """Replace `--config.FIELD VALUE` by `--config.FIELD=VALUE`.

    absl reads the first form only for fields with a fixed type other than bool.
    """
    joined = []
    for argument in argv:
        before = joined[-1] if joined else ""
        is_open = before.startswith("--config.") and "=" not in before
        if is_open and not argument.startswith("--"):
            joined[-1] = f"{before}={argument}"
        else:
            joined.append(argument)
    return joined


def _distributed_flags(argv: list[str]) -> dict[str, str]:
    """Return the values of --coordinator, --num_processes and --process_id that are set."""
    names = ("coordinator", "num_processes", "process_id")
    values = {name: _flag_values(argv, f"--{name}", f"-{name}") for name in names}
    return {name: texts[-1] for name, texts in values.items() if texts}


def _explain_flag(name: str, argv: list[str], config: ConfigDict) -> str:
    """Return the error message for a flag that does not exist."""
    fields = flatten(config.to_dict())
    near = difflib.get_close_matches(name, [*flags.FLAGS, *fields], n=1)
    matches = _fields_named(name, config) or [field for field in near if field in fields]
    if matches:
        field = matches[0]
        value = next(iter(_flag_values(argv, f"--{name}", f"-{name}")), "") or "VALUE"
        return f"--{name}: is not a flag; set the field of the config with --config.{field}={value}"
    return f"--{name}: is not a flag; " + (f"did you mean --{near[0]}?" if near else "see --help")


def _explain_value(message: str, argv: list[str], config: ConfigDict) -> str:
    """Return the error message for a value of the wrong type; for other errors, `message`."""
    for argument in argv:
        name, _, value = argument.partition("=")
        if name.startswith("--config.") and message.startswith(f"flag {argument}:"):
            field = config
            for part in name.split(".")[1:]:
                field = field[part]
            if expected := VALUES.get(type(field)):
                return f"{name}: expected {expected}, got {value!r}"
    return message


def _fields_named(name: str, config: ConfigDict) -> list[str]:
    """Return the fields whose dotted name ends with `name`, those with the fewest dots first."""
    fields = flatten(config.to_dict())
    matches = [field for field in fields if f".{field}".endswith(f".{name}")]
    return sorted(matches, key=lambda field: field.count("."))


def _flag_values(argv: list[str], *names: str) -> list[str]:
    """Return the values of a flag, given as `NAME=VALUE` or `NAME VALUE`; empty if one is missing.

    Args:
        argv: The arguments.
        names: The flag with its dashes, in all spellings.
    """
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    split = [(*argument.partition("="), after) for argument, after in pairs]
    return [
        value if equals else after * (not after.startswith("-"))
        for name, equals, value, after in split
        if name in names
    ]


def _check_config(argv: list[str]) -> ConfigDict:
    """Refuse a missing or invalid config file, and overridden fields that do not exist.

    Returns:
        The config, without the overrides.

    Raises:
        ValueError: The message names the file or the field.
    """
    names = config_names()
    available = f"available configs: {', '.join(names) or 'none'}"
    if not (value := next(reversed(_flag_values(argv, *CONFIG_FLAGS)), "")):
        given = [argument for argument in argv[1:] if argument.partition(":")[0] in names]
        hint = f"did you mean --config {given[0]}? " if given else ""
        raise ValueError(f"--config CONFIG is needed; {hint}{available}")
    file, _, variant = value.partition(":")
    if not Path(file).is_file():
        near = difflib.get_close_matches(Path(file).stem, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--config: {file} does not exist; {hint}{available}")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ValueError(f"--config: {file} is not a config file; it has no function get_config()")
    config = get_config(variant) if variant else get_config()
    for argument in argv:
        if argument.startswith("--config."):
            _check_field(config, argument.partition("=")[0].removeprefix("--config."))
    return config


def _check_field(config: ConfigDict, name: str) -> None:
    if name == "model.name":
        raise ValueError("--config.model.name: cannot be changed; use the config of that model")
    if name in RENAMED_FIELDS:
        raise ValueError(f"--config.{name} was renamed to --config.{RENAMED_FIELDS[name]}")
    section = config
    for depth, part in enumerate(name.split(".")):
        names = list(section) if isinstance(section, ConfigDict) else []
        if part not in names:
            prefix = "".join(f".{parent}" for parent in name.split(".")[:depth])
            near = [f"{prefix}.{n}" for n in difflib.get_close_matches(part, names, n=1)]
            near = near or [f".{field}" for field in _fields_named(part, config)]
            options = " or ".join(f"--config{field}" for field in near)
            contents = f"has the fields {', '.join(names)}" if names else "has no fields"
            hint = f"did you mean {options}?" if options else f"--config{prefix} {contents}"
            raise ValueError(f"--config.{name} does not exist; {hint}")
        section = section[part]


def parse_range(name: str) -> tuple[int, int] | None:
    """Return the two numbers of a flag `START:STOP`, or None if the flag is not set.

    Raises:
        InputError: The value is malformed.
    """
    text = flags.FLAGS[name].value
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise InputError(f"--{name}={text}: must be START:STOP, with START < STOP, e.g. 10:20")
    return int(start), int(stop)


def hide_unfinished_saves() -> None:
    """Silence warnings about the unfinished coroutines that Orbax leaves behind if a save fails.

    The failure itself is raised and printed as one line.
    """

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if inspect.iscoroutine(unraisable.object) or "loop is closed" in str(unraisable.exc_value):
            return
        sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
