"""The demo: a tiny XViT learns eight kinds of motion from H.264 clips that it makes itself.

    python main.py --config configs/motion.py --workdir runs/motion

The model follows arXiv:2106.05968; the clips are jaxvid/data/synthetic_motion.py's.

    python main.py --config configs/motion.py:blind --workdir runs/motion_blind

is the negative control: the same network without anything that tells frames apart in time. The
classes come in pairs of time reversals, so it cannot do better than 50 %.

    python main.py --config configs/motion.py:stam --workdir runs/motion_stam

is a tiny STAM, arXiv:2103.13915, on the same clips: 99.6 % and 99.2 % top-1 with seeds 0 and 1
(`--config.seed=1`), in 290 seconds of CPU time.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The demo's config.

    Args:
        variant: ``, `blind` (no shift, no temporal embedding, mean over frames) or `stam`.
    """
    models = {
        "": ("xvit_tiny", {}),
        "blind": (
            "xvit_tiny",
            {"shift": "none", "temporal_embedding_frames": 0, "head": "mean"},
        ),
        "stam": ("stam_tiny", {}),
    }
    common.check_variant("motion.py", variant, tuple(models))
    # Frames of STAM meet only in their class tokens; it takes longer to see turns.
    config = common.train_section(batch_size=32, num_epochs=10.0 if variant == "stam" else 8.0)
    name, overrides = models[variant]
    config.model = common.model_section(name, **overrides)
    config.data = common.data_section(source="motion", folder="data/motion", short_side=72)
    config.data.motion = ConfigDict({"num_train": 4000, "num_val": 512, "seed": 0})
    config.eval = common.eval_section(short_side=72, batch_size=64, every_epochs=2.0)
    config.optimizer.update(
        learning_rate=1e-3, reference_batch_size=32, warmup_epochs=0.8, weight_decay=0.05
    )
    config.optimizer.update(b2=0.98, clip_norm=1.0)
    return config.lock()
