"""STAM-64 on Kinetics-400: 64 frames over 10 s, an image ViT each, a transformer over them.

Sharir et al., "An Image is Worth 16x16 Words, What is a Video Worth?", 2021, arXiv:2103.13915.
Published: 80.5 % top-1 (1 view, 224 px). Its training code was never released; `stam_config` in
configs/common.py says what its authors answered and what is chosen here.
Not run here: the data and an ImageNet-21k ViT-B/16 to start from are needed.

    python convert/torch_to_flax.py --model stam_64 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k400 --output data/k400_packed
    python main.py --config configs/stam_64_k400.py --workdir runs/stam_64 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k400_packed

The released weights, converted, are evaluated with

    python main.py --config configs/stam_64_k400.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The config."""
    return common.stam_config("stam_64", learning_rate=2.5e-06, batch_size=16)
