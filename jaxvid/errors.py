"""The exception that means "the input is wrong", not "the program is"; and how others are told."""


class InputError(ValueError):
    """Bad input. The message is one line for the user: what, where, and the way out.

    The programs print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


def one_line(error: object, length: int = 160) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:length]
