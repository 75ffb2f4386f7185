"""Trains and evaluates.

python main.py --config FILE.py --workdir FOLDER                train, with evaluation; continues
python main.py --config FILE.py --workdir FOLDER --mode eval    evaluate the newest checkpoint
... --config.FIELD=VALUE                           override a field; the config file lists them
"""

import functools
import sys

from absl import app, flags, logging

from jaxvid import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, reports.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "train (with evaluation; continues), or eval only."
)


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
    app.run(
        main,
        flags_parser=functools.partial(cli.parse_flags, doc=__doc__, needed={"workdir": "FOLDER"}),
    )
