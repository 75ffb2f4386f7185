"""The exception that means "the input is wrong", not "the program is"; and how others are told."""

import re

# Control characters, Unicode's line separators, and surrogates: Python's form of invalid UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """Bad input. The message is one line for the user: what, where, and the way out.

    The programs print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


def one_line(error: object, length: int = 160) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


def printable(text: object) -> str:
    """Escape line breaks, control characters and the bytes of a file name that are not UTF-8.

    Returns:
        Text that is one line in a terminal and that every UTF-8 stream takes.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
