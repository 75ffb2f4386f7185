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
    section.color_matrix = "auto"  # or tagged, bt601; auto: the model card's, else tagged
    section.train_crop = "random"
    section.short_side = 256  # of training frames before the crop
    section.short_side_max = 0  # above short_side: drawn between the two
    section.flip = 0.0
    section.augment = ""
    section.randaugment_layers = 2
    section.randaugment_magnitude = 9
    section.mean = 0.5
    section.std = 0.5
    section.skip_broken = False  # training goes on however many videos are broken or missing
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
    config.log_steps = 50  # of a row of metrics.jsonl; at most a tenth of the run
    config.update(overrides)
    return config


def eval_section(**overrides) -> ConfigDict:
    """All fields of `eval`."""
    section = ConfigDict()
    section.num_clips = 1
    section.num_crops = 1
    section.score = "logits"  # summed over the views; or probabilities, averaged
    section.dtype = "float32"  # of the computation; or bfloat16, whatever model.dtype is
    section.short_side = 256
    section.batch_size = 16  # videos of a step, over all devices and processes
    section.every_epochs = 1.0
    section.update(overrides)
    return section


def check_variant(file: str, variant: str, known: tuple[str, ...]) -> None:
    """Refuses a config argument that the file does not know.

    Raises:
        ValueError: Names those that there are.
    """
    if variant not in known:
        *names, last = map(repr, known)
        raise ValueError(f"configs/{file}:{variant}: there are {', '.join(names)} and {last}")


def xvit_section(name: str, *, epochs: float, warmup_start_rate: float, **train) -> ConfigDict:
    """What XViT's recipes share: Nesterov SGD at .03 for 64 clips, cosine, AutoAugment v0.

    Args:
        name: Of the model.
        epochs: Length of the training; 5 of them are warm-up.
        warmup_start_rate: Learning rate at the start.
        **train: Fields of `train_section`.
    """
    config = train_section(num_epochs=epochs, **train)
    config.model = model_section(name, dtype="bfloat16")
    config.data = data_section(resize="bilinear", augment="autoaugment", num_threads=16)
    config.eval = eval_section(num_crops=3, short_side=224, every_epochs=5.0)
    config.optimizer.update(
        name="sgd",
        learning_rate=0.03,
        warmup_start_rate=warmup_start_rate,
        warmup_epochs=5.0,
        decay="released",
    )
    return config


def stam_config(name: str, *, learning_rate: float, batch_size: int) -> ConfigDict:
    """STAM's recipe, from its authors' answers; what they left open is chosen here.

    Theirs: AdamW, weight decay 1e-3, 100 epochs of which 10 are warm-up, a cosine, an average of
    the weights, the learning rate. Chosen here: the average's decay, random crops of 256 px
    frames, flips, and that only matrices decay.

    Args:
        name: Of the model.
        learning_rate: At `batch_size`.
        batch_size: Clips of a step.
    """
    config = train_section(batch_size=batch_size, num_epochs=100.0, ema_decay=0.9999)
    config.model = model_section(name, dtype="bfloat16")
    config.data = data_section(
        folder="data/k400", sampling="rate", flip=0.5, mean=0.0, std=1.0, num_threads=16
    )
    config.eval = eval_section(every_epochs=5.0)
    config.optimizer.update(
        learning_rate=learning_rate,
        reference_batch_size=batch_size,
        warmup_epochs=10.0,
        weight_decay=1e-3,
    )
    return config.lock()


def model_section(name: str, **overrides) -> ConfigDict:
    """All fields of a model preset, so that each can be overridden on the command line."""
    from jaxvid.models import make_model_config

    return ConfigDict(dataclasses.asdict(make_model_config(name, **overrides)))
