"""The demo: a tiny XViT learns eight kinds of motion from generated H.264 clips.

    python main.py --config configs/motion.py --workdir runs/motion

The model follows arXiv:2106.05968. The clips come from jaxvid/data/synthetic_motion.py.

    python main.py --config configs/motion.py:blind --workdir runs/motion_blind

is the negative control: the same network without any part that depends on the order of the frames.
The classes are pairs of time reversals, so its accuracy cannot exceed 50 % by more than chance.

    python main.py --config configs/motion.py:stam --workdir runs/motion_stam

is a tiny STAM, arXiv:2103.13915, on the same clips. docs/performance.md lists accuracies and times.
"""

from ml_collections import ConfigDict

from configs import common

BLIND = {"shift": "none", "temporal_embedding_frames": 0, "head": "mean"}


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of the demo.

    Args:
        variant: Empty for XViT; `blind` for XViT without shift and temporal embedding, with a mean
            over the frames; or `stam`.
    """
    common.check_variant("motion.py", variant, ("", "blind", "stam"))
    if variant == "stam":
        config = common.default_config("stam_tiny")
    else:
        config = common.default_config("xvit_tiny", **(BLIND if variant == "blind" else {}))

    config.batch_size = 32
    # In STAM only class tokens attend to other frames, so rotations take longer to learn.
    config.num_epochs = 10.0 if variant == "stam" else 6.0

    config.data.source = "motion"
    config.data.folder = "data/motion"
    config.data.motion = ConfigDict({"num_train": 4000, "num_val": 512, "seed": 0})
    config.data.short_side = 72

    config.eval.short_side = 72
    config.eval.batch_size = 64
    config.eval.every_epochs = 2.0

    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch_size = 32
    config.optimizer.warmup_epochs = 0.8
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0
    return config.lock()
