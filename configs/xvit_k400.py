"""XViT on Kinetics-400: space-time mixing attention, 16 frames, ViT-B/16.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 80.2 / 94.7 % top-1 / top-5 (1 clip × 3 crops; paper).
Not run here: the data and an ImageNet-21k ViT-B/16 to start from are needed.

    python convert/torch_to_flax.py --model xvit_k400 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k400 --output data/k400_packed
    python main.py --config configs/xvit_k400.py --workdir runs/xvit_k400 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k400_packed

`configs/xvit_k400.py:paper` has the paper's values where they differ from the released ones:
batch 128, no label smoothing. The released weights, converted, are evaluated with

    python main.py --config configs/xvit_k400.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "released") -> ConfigDict:
    """The config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_k400.py", variant, ("released", "paper"))
    config = common.xvit_section("xvit_k400", epochs=30.0, warmup_start_rate=0.01, mixup=0.4)
    config.data.update(folder="data/k400", sampling="dense", train_crop="multiscale", flip=0.5)
    config.optimizer.weight_decay = 1e-5
    if variant == "paper":
        config.batch_size = config.optimizer.reference_batch_size = 128
    else:
        config.label_smoothing = 0.3
    return config.lock()
