"""What several configs share."""

import dataclasses

from ml_collections import ConfigDict


def data_section(**overrides) -> ConfigDict:
    """All fields of `data`; `ClipSpec` in jaxvid/data/pipeline.py explains how clips are made."""
    section = ConfigDict()
    section.source = "folder"  # jaxvid/data/sources.py: open_folder
    section.folder = ""
    section.prefix = ""  # what paths in lists are relative to, if not to the list
    section.missing = "error"  # files that a list names; "keep": they fail when they are opened
    section.sampling = "segments"
    section.sampling_rate = 16
    section.by_time = False
    section.resize = "antialiased"
    section.train_crop = "random"
    section.short_side = 256  # of training frames before the crop
    section.short_side_max = 0  # above short_side: drawn between the two
    section.flip = 0.0
    section.augment = ""
    section.randaugment_layers = 2
    section.randaugment_magnitude = 9
    section.mean = 0.5
    section.std = 0.5
    section.max_failed_share = 0.05  # of the training videos; above it the run stops
    section.num_threads = 2
    section.num_workers = 0
    section.update(overrides)
    return section


def model_section(name: str, **overrides) -> ConfigDict:
    """All fields of a model preset, so that each can be overridden on the command line."""
    from jaxvid.models import make_model_config

    return ConfigDict(dataclasses.asdict(make_model_config(name, **overrides)))
