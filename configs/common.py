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
    section.stall_seconds = 300.0  # a wait longer than this is told, with what waits
    section.num_threads = 2
    section.num_workers = 0
    section.update(overrides)
    return section


def train_section(**overrides) -> ConfigDict:
    """A config's top level, for training: all but `model`, `data` and `eval`."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64  # clips of a step, over all devices and processes
    config.accumulate_steps = 1  # parts that a step's clips are computed in, to save memory
    config.num_epochs = 30.0
    config.init_from = ""  # a model folder to start from (training) or to evaluate
    config.label_smoothing = 0.0
    config.mixup = 0.0  # α of Beta(α, α); 0: off
    config.cutmix = 0.0  # likewise; one of the two
    config.erase = 0.0  # probability that a box of a training clip is erased
    config.ema_decay = 0.0  # of the average of the weights that is evaluated and kept; 0: off

    config.distill = ConfigDict()
    config.distill.teacher = ""  # a model folder; empty: off
    config.distill.weight = 0.5  # of the teacher's part of the loss
    config.distill.temperature = 1.0  # divides both networks' logits

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or sgd (Nesterov; weight decay added to the gradient)
    config.optimizer.learning_rate = 1e-4  # the peak, at reference_batch_size
    config.optimizer.warmup_start_rate = 0.0  # likewise
    config.optimizer.reference_batch_size = 64  # rates are scaled to batch_size
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay = "kernels"  # or released: all but the biases of the heads
    config.optimizer.b1 = 0.9  # adamw
    config.optimizer.b2 = 0.999  # adamw
    config.optimizer.momentum = 0.9  # sgd
    config.optimizer.clip_norm = 0.0  # of the whole gradient; 0: off
    config.optimizer.layer_decay = 1.0  # learning rate of a block over that of the one above it
    config.optimizer.freeze = ""  # or backbone: only the temporal and classification heads learn

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.checkpoint_every_epochs = 1.0
    config.checkpoint_keep = 2  # newest; the best model is kept beside them
    config.log_steps = 50
    config.update(overrides)
    return config


def eval_section(**overrides) -> ConfigDict:
    """All fields of `eval`."""
    section = ConfigDict()
    section.num_clips = 1
    section.num_crops = 1
    section.short_side = 256
    section.batch_size = 16  # videos of a step, over all devices and processes
    section.every_epochs = 1.0
    section.update(overrides)
    return section


def model_section(name: str, **overrides) -> ConfigDict:
    """All fields of a model preset, so that each can be overridden on the command line."""
    from jaxvid.models import make_model_config

    return ConfigDict(dataclasses.asdict(make_model_config(name, **overrides)))
