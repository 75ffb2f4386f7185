"""The exception for bad input, and one-line descriptions of exceptions and values."""

import importlib
import re
import reprlib
import shlex
from collections.abc import Iterable
from types import ModuleType

# Parts of the messages of Python, glibc, XLA, NumPy and PyTorch that report exhausted memory.
MEMORY_WORDS = (
    *("resource_exhausted", "out of memory", "bad_alloc", "cannot allocate", "can't allocate"),
    *("unable to allocate", "can't start new thread", "failed to map segment"),
    "resource temporarily unavailable",
)

# Names of the folders that contain local copies of remote files, as `SCHEME/BUCKET/KEY`.
COPIES, WORKDIRS = "jaxvid-objects", "jaxvid-workdirs"
# A match starts where a word starts; otherwise, long words would take quadratic time.
_COPY = re.compile(rf"(?<![^\s'\"(])[^\s'\"(]*/(?:{COPIES}|{WORKDIRS})/(gs|s3|https?|memory)/")
# Control characters, Unicode's line separators, and surrogates, which represent invalid UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """Invalid input. The message is one line: the location, the problem and how to fix it.

    The programs print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2

    def __str__(self) -> str:
        return with_addresses(super().__str__())


def with_addresses(text: str) -> str:
    """Replace the paths of local copies of remote files by their addresses."""
    return _COPY.sub(r"\1://", text)


class DecodeError(InputError):
    """A video that cannot be decoded. The message is one line with the file and the reason."""

    def __str__(self) -> str:
        return printable(super().__str__())


def check_option(name: str, value: object, options: Iterable) -> None:
    """Check that an option has one of its valid values.

    Raises:
        InputError: The message contains the option, its value and the valid values.
    """
    options = tuple(options)
    if value not in options:
        known = ", ".join(map(repr, options))
        raise InputError(f"{name}={short_repr(value)}: must be one of {known}")


def import_or_explain(module: str, package: str, use: str = "packed frames need") -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Name of the module.
        package: The package that contains it.
        use: Start of the error message: what needs the package.

    Raises:
        InputError: The package is not installed; the message has the `pip` command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{use} {package} ({error}): pip install {shlex.quote(package)}") from None


def memory_problem(error: BaseException | None) -> str | None:
    """Return the line of an error message that reports exhausted memory or threads.

    Args:
        error: An exception; its causes are searched too.

    Returns:
        The line, or None if no message reports it.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return one_line(error)
        if isinstance(error, OSError | RuntimeError | ImportError):
            for line in str(error).splitlines():
                if any(words in line.lower() for words in MEMORY_WORDS):
                    return one_line(line)
        error = error.__cause__ or error.__context__
    return None


def one_line(error: object, length: int = 160) -> str:
    """Return the first line of an error's text, truncated to `length` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


def short_repr(value: object) -> str:
    """Return the `repr` of an untrusted value in one line of at most 100 characters."""
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = 60
    shorten.maxlevel = shorten.maxdict = shorten.maxlist = shorten.maxtuple = 2
    try:
        text = shorten.repr(value)
    except (RecursionError, ValueError):  # e.g. an int with more digits than Python prints
        text = f"a {type(value).__name__}"
    return one_line(text, 100)


def printable(text: object) -> str:
    """Escape line breaks, control characters and the bytes of a file name that are not UTF-8.

    Returns:
        Text that is one line in a terminal and valid UTF-8.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
