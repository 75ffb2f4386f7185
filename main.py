"""Trains and evaluates: python main.py --config FILE --workdir FOLDER [--mode eval]."""

import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; --config.FIELD=VALUE overrides a field.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, reports.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "train (with evaluation; continues) or eval only."
)


def main(_):
    from jaxvid.evaluate import evaluate
    from jaxvid.train import train

    {"train": train, "eval": evaluate}[MODE.value](CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
