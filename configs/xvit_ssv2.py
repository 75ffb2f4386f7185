"""XViT on Something-Something v2: space-time mixing attention over all 16 frames, ViT-B/16.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 67.19 / 91.00 % top-1 / top-5 (2 clips × 3 crops).
This recipe has not been run: it needs the dataset and the weights of an ImageNet-21k ViT-B/16.

    python convert/torch_to_flax.py --model xvit_ssv2 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/ssv2 --output data/ssv2_packed
    python main.py --config configs/xvit_ssv2.py --workdir runs/xvit_ssv2 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/ssv2_packed

`configs/xvit_ssv2.py:paper` has the values of the paper where they differ from the released
program: learning rate 0.05 at batch size 128, and label smoothing 0.3. To evaluate the released
weights after their conversion to the model folder FOLDER:

    python main.py --config configs/xvit_ssv2.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "released") -> ConfigDict:
    """Return the config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_ssv2.py", variant, ("released", "paper"))
    config = common.default_config("xvit_ssv2", dtype="bfloat16")

    config.batch_size = 64 if variant == "released" else 128
    config.num_epochs = 35.0
    config.label_smoothing = 0.0 if variant == "released" else 0.3
    config.erase_prob = 0.5

    config.data.folder = "data/ssv2"
    config.data.sampling = "segments"
    config.data.resize = "torch_bilinear"
    config.data.short_side_max = 320
    config.data.augment = "autoaugment"
    config.data.num_threads = 16

    config.eval.num_clips = 2
    config.eval.num_crops = 3
    config.eval.short_side = 224
    config.eval.every_epochs = 5.0

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03 if variant == "released" else 0.05
    config.optimizer.reference_batch_size = config.batch_size
    config.optimizer.warmup_start_rate = 0.003
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decay = "released"
    return config.lock()
