"""The one exception that means "the input is wrong", as opposed to "the program is"."""


class InputError(ValueError):
    """Bad input. The message is one line for the user: what, where, and the way out.

    The programs print it without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2
