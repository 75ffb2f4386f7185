"""Every config builds, and so does its model."""

import importlib
from pathlib import Path

import pytest

from jaxvid.models import abstract_model, make_model_config

ROOT = Path(__file__).parents[1]
CONFIGS = [(path.stem, "") for path in sorted((ROOT / "configs").glob("*.py"))]
CONFIGS = [(name, variant) for name, variant in CONFIGS if name != "common"] + [("motion", "blind")]


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_configs_build_and_are_locked(name, variant):
    module = importlib.import_module(f"configs.{name}")
    assert f"configs/{name}.py" in module.__doc__  # says how it is run
    config = module.get_config(variant)
    assert config.is_locked
    with pytest.raises(AttributeError, match="locked"):
        config.batch = 1
    _, params = abstract_model(make_model_config(**config.model))
    assert params
    config.model.num_classes = 5
    assert make_model_config(**config.model).num_classes == 5


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="configs/motion.py:fast: there are '' and 'blind'"):
        importlib.import_module("configs.motion").get_config("fast")
