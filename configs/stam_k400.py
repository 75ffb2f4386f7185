"""STAM on Kinetics-400: an image ViT on frames sampled from 10 s, then a temporal transformer.

Sharir et al., "An Image is Worth 16x16 Words, What is a Video Worth?", 2021, arXiv:2103.13915.
Published top-1 (1 view, 224 px): 77.5 % with 8 frames, 79.3 % with 16, 79.95 % with 32 and
80.5 % with 64.
The training code was never released. In replies to questions on GitHub (Alibaba-MIIL/STAM), the
authors gave these values for 16 and 64 frames: AdamW, weight decay 1e-3, 100 epochs including 10 of
warm-up, cosine decay, a moving average of the weights, the batch sizes and the learning rates. The
rest was chosen for this recipe: the values of 16 frames for 8 and 32 frames, the decay of the
moving average, random crops of frames with a shorter side of 256 pixels, flips, and weight decay on
kernels only.
This recipe has not been run: it needs the dataset and the weights of an ImageNet-21k ViT-B/16.

    python convert/torch_to_flax.py --model stam_16 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k400 --output data/k400_packed
    python main.py --config configs/stam_k400.py:16 --workdir runs/stam_16 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k400_packed

The variants `8`, `16`, `32` and `64` differ in the number of frames. To evaluate the released
weights after their conversion to the model folder FOLDER:

    python main.py --config configs/stam_k400.py:16 --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "16") -> ConfigDict:
    """Return the config.

    Args:
        variant: Number of frames: `8`, `16`, `32` or `64`.
    """
    common.check_variant("stam_k400.py", variant, ("8", "16", "32", "64"))
    config = common.default_config(f"stam_{variant}", dtype="bfloat16")

    config.batch_size = {"8": 64, "16": 64, "32": 64, "64": 16}[variant]
    config.num_epochs = 100.0
    config.ema_decay = 0.9999

    config.data.folder = "data/k400"
    config.data.sampling = "uniform_10s"
    config.data.flip_prob = 0.5
    config.data.mean = 0.0
    config.data.std = 1.0
    config.data.num_threads = 16

    config.eval.every_epochs = 5.0

    config.optimizer.learning_rate = {"8": 1e-5, "16": 1e-5, "32": 1e-5, "64": 2.5e-6}[variant]
    config.optimizer.reference_batch_size = config.batch_size
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.weight_decay = 1e-3
    return config.lock()
