"""The demo: a tiny XViT learns eight kinds of motion from H.264 clips that it makes itself.

    python main.py --config configs/motion.py --workdir runs/motion

The model follows arXiv:2106.05968; the clips are jaxvid/data/motion.py's.

    python main.py --config configs/motion.py:blind --workdir runs/motion_blind

is the negative control: the same network without anything that tells frames apart in time. The
classes come in pairs of time reversals, so it cannot do better than 50 %.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The demo's config.

    Args:
        variant: `` or `blind` (no shift, no temporal embedding, mean over frames).
    """
    if variant not in ("", "blind"):
        raise ValueError(f"configs/motion.py:{variant}: there are '' and 'blind'")
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 32
    config.num_epochs = 8.0
    config.init_from = ""  # a model folder to start from (training) or to evaluate
    config.label_smoothing = 0.0
    config.mixup = 0.0  # α of Beta(α, α); 0: off
    config.cutmix = 0.0  # likewise; one of the two
    config.erase = 0.0  # probability that a box of a training clip is erased

    time_blind = {"shift": "none", "temporal_embedding_frames": 0, "head": "mean"}
    config.model = common.model_section("xvit_tiny", **(time_blind if variant == "blind" else {}))

    config.data = common.data_section(source="motion", folder="data/motion", short_side=72)
    config.data.motion = ConfigDict({"num_train": 4000, "num_val": 512, "seed": 0})

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 0.8
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0

    config.eval = ConfigDict()
    config.eval.num_clips = 1
    config.eval.num_crops = 1
    config.eval.short_side = 72
    config.eval.batch_size = 64
    config.eval.every_epochs = 2.0

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.checkpoint_every_epochs = 1.0
    config.checkpoint_keep = 2
    config.log_steps = 50
    return config.lock()
