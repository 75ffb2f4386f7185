"""What several configs share."""

import dataclasses

from ml_collections import ConfigDict


def model_section(name: str, **overrides) -> ConfigDict:
    """All fields of a model preset, so that each can be overridden on the command line."""
    from jaxvid.models import make_model_config

    return ConfigDict(dataclasses.asdict(make_model_config(name, **overrides)))
