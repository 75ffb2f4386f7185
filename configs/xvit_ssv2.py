"""XViT on Something-Something v2: space-time mixing attention over all 16 frames, ViT-B/16.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 67.19 / 91.00 % top-1 / top-5 (2 clips × 3 crops).
Not run here: the data and an ImageNet-21k ViT-B/16 to start from are needed.

    python convert/torch_to_flax.py --model xvit_ssv2 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/ssv2 --output data/ssv2_packed
    python main.py --config configs/xvit_ssv2.py --workdir runs/xvit_ssv2 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/ssv2_packed

`configs/xvit_ssv2.py:paper` has the paper's values where they differ from the released ones:
learning rate .05 at a batch of 128, label smoothing .3. The released weights, converted, are
evaluated with

    python main.py --config configs/xvit_ssv2.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "released") -> ConfigDict:
    """The config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_ssv2.py", variant, ("released", "paper"))
    config = common.xvit_section("xvit_ssv2", epochs=35.0, warmup_start_rate=0.003, erase=0.5)
    config.data.update(folder="data/ssv2", sampling="segments", short_side_max=320)
    config.eval.num_clips = 2
    config.optimizer.weight_decay = 1e-4
    if variant == "paper":
        config.label_smoothing = 0.3
        config.batch_size = config.optimizer.reference_batch_size = 128
        config.optimizer.learning_rate = 0.05
    return config.lock()
