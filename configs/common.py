"""Default values of every config field. A recipe starts from `default_config` and changes some."""

import dataclasses

from ml_collections import ConfigDict, FieldReference

from jaxvid.models import make_model_config


def default_config(model: str, **model_fields) -> ConfigDict:
    """Return a config with all fields at their default values.

    Args:
        model: Name of a model preset (`jaxvid.models.PRESETS`).
        **model_fields: Fields of the preset to replace.
    """
    config = ConfigDict()
    config.seed = 0
    # Fields with "-1: chosen": training chooses a value from the number of training videos.
    config.batch_size = 64  # clips per step, over all devices and processes; -1: chosen
    config.accumulate_steps = 1  # microbatches per batch, for gradient accumulation; 1: off
    config.num_epochs = 30.0  # -1: chosen
    config.deterministic = False  # on GPUs: bit-identical results and resume, at some speed
    config.init_from = ""  # model folder or name: initial weights, or weights to evaluate
    config.loss = ConfigDict()
    config.loss.name = "softmax"  # or sigmoid, for multi-label data
    config.loss.class_weights = "none"  # balanced: by 1 / number of videos; or numbers: 1,2.5,1
    config.label_smoothing = 0.0
    config.mixup_alpha = 0.0  # λ is drawn from Beta(alpha, alpha); 0: off
    config.cutmix_alpha = 0.0  # λ is drawn from Beta(alpha, alpha); 0: off; not with mixup
    config.mix_within = "device"  # mix clips of the same device; or batch
    config.erase_prob = 0.0  # probability of erasing a box of a training clip
    config.ema_decay = 0.0  # decay of the moving average of weights, which is evaluated; 0: off
    # Training steps per row of metrics.jsonl; at most a tenth of the run; -1: chosen.
    config.log_steps = 50
    config.checkpoint_every_epochs = 1.0  # -1: chosen
    config.checkpoint_keep = 2  # number of newest checkpoints to keep, beside the best model
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
    # model.dtype may also be auto: the faster of float32 and bfloat16, measured at the first start.
    config.model = ConfigDict(dataclasses.asdict(make_model_config(model, **model_fields)))
    config.data = _default_data()
    config.eval = _default_eval()
    config.optimizer = _default_optimizer()
    config.distill = ConfigDict()
    config.distill.teacher = ""  # model folder or name; empty: no distillation
    config.distill.weight = 0.5  # weight of the distillation loss
    config.distill.temperature = 1.0  # divides the logits of teacher and student
    return config


def _default_data() -> ConfigDict:
    """Source and preprocessing of videos; `ClipSpec` in jaxvid/data/clips/clip.py documents it."""
    data = ConfigDict()
    data.source = "folder"  # motion, folder, class_folders, xvit_h5, pack or tfds
    data.folder = ""
    data.name = ""  # of a TFDS data set, for data.source=tfds, as in ucf101/ucf101_1:2.0.0
    data.tfds_dir = ""  # folder of TFDS data sets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets
    # TFDS splits or slices, as in train[:90%]; empty: train; the first of val, validation, test.
    data.splits = ConfigDict({"train": "", "val": ""})
    data.list = ""  # list of all videos below data.folder; empty: train.csv and val.csv in it
    data.prefix = ""  # directory that paths in lists are relative to; empty: the list's
    data.cache_dir = ""  # cache of remote files; empty: in $JAXVID_CACHE or ~/.cache/jaxvid
    data.cache_gb = 20.0  # size limit of the cache
    data.val_share = 0.0  # validation share of videos that are not divided into splits; 0: off
    data.group = ""  # regular expression; videos with the same match are in the same split
    data.sampler = "uniform"  # balanced: every class equally often per epoch
    data.repeats = 1  # clips of each training video in a batch (repeated augmentation)
    data.missing = "error"  # refuse missing listed files; or keep: count as decode errors
    data.skip_broken = False  # True: train without broken and missing videos, however many
    data.max_failed_share = 0.05  # training stops if a larger share cannot be decoded
    data.stall_seconds = 300.0  # a stage that blocks longer is logged
    data.num_threads = 2  # decoding threads per process, or per worker process
    data.num_workers = 0  # worker processes; 0: threads only
    data.sampling = "segments"  # or uniform_10s, dense_stride
    data.sampling_rate = 16  # of dense_stride: distance between sampled frames, at 30 fps
    data.by_time = False  # sample by timestamp, for videos with a variable frame rate
    data.resize = "pil_bilinear"  # antialiased as in Pillow; or torch_bilinear, not antialiased
    data.color_matrix = "auto"  # tagged or bt601; auto: the model card's in evaluation, else tagged
    data.train_crop = "random"  # or multiscale
    data.short_side = 256  # of training frames before the crop, in pixels
    data.short_side_max = 0  # if above short_side: drawn uniformly between the two
    data.flip_prob = 0.0
    data.augment = ""  # autoaugment or randaugment
    data.randaugment_layers = 2
    data.randaugment_magnitude = 9
    # Normalisation of pixels in [0, 1]: a number, three numbers (RGB) or "imagenet".
    data.mean = FieldReference(0.5, field_type=object)
    data.std = FieldReference(0.5, field_type=object)
    return data


def _default_eval() -> ConfigDict:
    section = ConfigDict()
    section.num_clips = 1  # per video
    section.num_crops = 1  # per clip: 1 or 3
    section.score = "logits"  # summed over the views; or probabilities, averaged
    section.dtype = "float32"  # or tfloat32, bfloat16; independent of model.dtype
    section.short_side = 256  # of frames before the crop, in pixels
    section.batch_size = 16  # videos per step, over all devices and processes
    section.every_epochs = 1.0  # -1: chosen
    return section


def _default_optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "adamw"  # or sgd, with Nesterov momentum and weight decay in the gradient
    optimizer.learning_rate = 1e-4  # peak of the cosine, at reference_batch_size
    optimizer.reference_batch_size = 64  # learning rates are scaled by batch_size over this
    optimizer.warmup_start_rate = 0.0  # first rate of the warm-up, at reference_batch_size
    optimizer.warmup_epochs = 0.0  # linear warm-up, then a cosine to 0; -1: chosen
    optimizer.weight_decay = 0.0
    optimizer.decay = "kernels"  # weight decay of matrices; or released: all but heads' biases
    optimizer.b1 = 0.9  # of adamw
    optimizer.b2 = 0.999  # of adamw
    optimizer.momentum = 0.9  # of sgd
    optimizer.clip_norm = 0.0  # of the global gradient norm; 0: off
    optimizer.layer_decay = 1.0  # learning rate of a block / that of the next block; 1: off
    optimizer.freeze = ""  # or backbone: train only the temporal and classification heads
    return optimizer


def check_variant(file: str, variant: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError if a config file does not have a variant."""
    if variant not in known:
        *names, last = map(repr, known)
        raise ValueError(f"configs/{file}:{variant}: must be {', '.join(names)} or {last}")
