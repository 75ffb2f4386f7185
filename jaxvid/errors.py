"""The exception for bad input, and one-line texts for error messages."""

import reprlib


class InputError(ValueError):
    """Bad input. The message is one line for the user: what, where, and the way out.

    The programs print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


def one_line(error: object, length: int = 160) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]


def short_repr(value: object) -> str:
    """The `repr` of an untrusted value, shortened to one line of at most about 100 characters."""
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = 60
    shorten.maxlevel = shorten.maxdict = shorten.maxlist = shorten.maxtuple = 2
    try:
        text = shorten.repr(value)
    except (RecursionError, ValueError):  # an int of more digits than Python prints
        text = f"a {type(value).__name__}"
    return one_line(text, 100)
