"""STAM-16 on Kinetics-400: the variant `configs/stam_k400.py:16`.

To train it:

    python main.py --config configs/stam_16_k400.py --workdir runs/stam_16 \
        --config.init_from=models/vit
"""

from ml_collections import ConfigDict

from configs import stam_k400


def get_config() -> ConfigDict:
    """Return the config."""
    return stam_k400.get_config("16")
