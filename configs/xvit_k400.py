"""XViT on Kinetics-400: the recipe of `configs/xvit_k600.py` with 400 classes.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021, arXiv:2106.05968.
Published: 80.2 / 94.7 % top-1 / top-5 (1 clip × 3 crops; paper).
This recipe has not been run: it needs the dataset and the weights of an ImageNet-21k ViT-B/16.

    python convert/torch_to_flax.py --model xvit_k400 --input vit_b16_in21k.pth --output models/vit
    python -m jaxvid.data.prepare --input data/k400 --output data/k400_packed
    python main.py --config configs/xvit_k400.py --workdir runs/xvit_k400 \
        --config.init_from=models/vit --config.data.source=pack \
        --config.data.folder=data/k400_packed

`configs/xvit_k400.py:paper` has the values of the paper where they differ from the released
program: batch size 128 and no label smoothing. To evaluate the released weights after their
conversion to the model folder FOLDER:

    python main.py --config configs/xvit_k400.py --workdir runs/eval --mode eval \
        --config.init_from=FOLDER
"""

from ml_collections import ConfigDict

from configs import common, xvit_k600


def get_config(variant: str = "released") -> ConfigDict:
    """Return the config.

    Args:
        variant: `released` or `paper`.
    """
    common.check_variant("xvit_k400.py", variant, ("released", "paper"))
    config = xvit_k600.get_config(variant).unlock()
    config.model.update(name="xvit_k400", num_classes=400)
    config.data.folder = "data/k400"
    return config.lock()
