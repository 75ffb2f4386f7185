"""XViT on Kinetics-600: space-time mixing attention, 16 frames, ViT-B/16.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 84.51 / 96.26 % top-1 / top-5 (1 clip × 3 crops), 84.71 / 96.39 % (2 × 3).
Not run here: the data and an ImageNet-21k ViT-B/16 to start from are needed.

    python convert/torch_to_flax.py --model xvit_k600 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k600 --output data/k600_packed
    python main.py --config configs/xvit_k600.py --workdir runs/xvit_k600 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k600_packed

`configs/xvit_k600.py:paper` has the paper's values where they differ from the released ones:
batch 128, no label smoothing. The released weights, converted, are evaluated with

    python main.py --config configs/xvit_k600.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "released") -> ConfigDict:
    """The config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_k600.py", variant, ("released", "paper"))
    config = common.xvit_section("xvit_k600", epochs=30.0, warmup_start_rate=0.01, mixup=0.4)
    config.data.update(folder="data/k600", sampling="dense", train_crop="multiscale", flip=0.5)
    config.optimizer.weight_decay = 1e-5
    if variant == "paper":
        config.batch_size = config.optimizer.reference_batch_size = 128
    else:
        config.label_smoothing = 0.3
    return config.lock()
