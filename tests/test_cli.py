"""Overrides of config fields on the command line."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import motion
from jaxvid import cli


@pytest.mark.parametrize("form", ["{}={}", "{} {}"])
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("data.mean", "0.25", 0.25),
        ("data.mean", "0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        ("data.std", "imagenet", "imagenet"),
        ("deterministic", "True", True),
        ("mesh.data", "-1", -1),
        ("data.folder", "-videos", "-videos"),
    ],
)
def test_values_of_config_fields(monkeypatch, form, field, text, value):
    override = form.format(f"--config.{field}", text).split()
    argv = ["main.py", *override, "--config.seed=3"]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags reads the names of the fields from it
    values, config = flags.FlagValues(), motion.get_config()
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    assert values(cli._join_overrides(argv)) == ["main.py"]
    section, _, name = field.rpartition(".")
    assert getattr(config[section] if section else config, name) == value
    assert config.seed == 3


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("batch_size", "4.5", "an integer"),
        ("mesh.data", "", "an integer"),
        ("optimizer.learning_rate", "1e-3x", "a number"),
        ("deterministic", "perhaps", "true or false"),
    ],
)
def test_values_of_the_wrong_type_are_refused(monkeypatch, field, text, expected):
    argv = ["main.py", f"--config.{field}={text}"]
    monkeypatch.setattr(sys, "argv", argv)
    values, config = flags.FlagValues(), motion.get_config()
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError) as info:
        values(argv)
    message = cli._explain_value(str(info.value), argv, config)
    assert message == f"--config.{field}: expected {expected}, got {text!r}"
