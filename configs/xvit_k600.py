"""XViT on Kinetics-600: space-time mixing attention, 16 frames, ViT-B/16.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 84.51 / 96.26 % top-1 / top-5 (1 clip × 3 crops), 84.71 / 96.39 % (2 × 3).
This recipe has not been run: it needs the dataset and the weights of an ImageNet-21k ViT-B/16.

    python convert/torch_to_flax.py --model xvit_k600 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k600 --output data/k600_packed
    python main.py --config configs/xvit_k600.py --workdir runs/xvit_k600 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k600_packed

`configs/xvit_k600.py:paper` has the values of the paper where they differ from the released
program: batch size 128 and no label smoothing. To evaluate the released weights after their
conversion to the model folder FOLDER:

    python main.py --config configs/xvit_k600.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "released") -> ConfigDict:
    """Return the config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_k600.py", variant, ("released", "paper"))
    config = common.default_config("xvit_k600", dtype="bfloat16")

    config.batch_size = 64 if variant == "released" else 128
    config.num_epochs = 30.0
    config.label_smoothing = 0.3 if variant == "released" else 0.0
    config.mixup_alpha = 0.4

    config.data.folder = "data/k600"
    config.data.sampling = "dense_stride"
    config.data.resize = "torch_bilinear"
    config.data.train_crop = "multiscale"
    config.data.flip_prob = 0.5
    config.data.augment = "autoaugment"
    config.data.num_threads = 16

    config.eval.num_crops = 3
    config.eval.short_side = 224
    config.eval.every_epochs = 5.0

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.reference_batch_size = config.batch_size
    config.optimizer.warmup_start_rate = 0.01
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay = "released"
    return config.lock()
