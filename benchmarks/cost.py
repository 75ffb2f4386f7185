"""Parameters and multiply-adds of every model, beside the papers' figures; time against frames.

python benchmarks/cost.py            the table
python benchmarks/cost.py --time     and STAM's forward time at 8 to 64 frames on this machine
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from jaxvid.models import PRESETS, ModelConfig, abstract_model, create_model, make_model_config
from jaxvid.models.stam import STAMConfig

# Paper's figure in 10⁹ multiply-adds, whether it counts attention products, clips × crops.
PAPER = {
    "stam_8": (135, False, 1),
    "stam_16": (270, False, 1),
    "stam_32": (540, False, 1),
    "stam_64": (1080, False, 1),
    "xvit_k400": (850, True, 3),
    "xvit_k600": (850, True, 3),
    "xvit_ssv2": (850, True, 3),
}


def multiply_adds(config: ModelConfig, *, attention: bool = True) -> int:
    """Multiply-adds of one view's forward pass: of matrix products, nothing else.

    Args:
        config: The model's config.
        attention: Count the attention products, q·kᵀ and weights·v, too.
    """
    t, d = config.num_frames, config.width
    patches = (config.image_size // config.patch_size) ** 2
    n, hidden = patches + 1, config.mlp_ratio * d
    total = t * patches * (3 * config.patch_size**2) * d
    total += t * config.depth * n * (4 * d * d + 2 * d * hidden)
    is_stam = isinstance(config, STAMConfig)
    keys = n + (config.shift_segment if not is_stam and config.summary_tokens else 0)
    if attention:
        total += t * config.depth * 2 * n * keys * d
    if is_stam and config.aggregator == "transformer":
        depth, hidden = config.temporal_depth, config.temporal_mlp
    elif not is_stam and config.head == "attention":
        depth = config.head_depth
        total += d * d
    else:
        depth = 0
    total += depth * (t + 1) * (4 * d * d + 2 * d * hidden)
    if attention:
        total += depth * 2 * (t + 1) ** 2 * d
    return total + d * config.num_classes


def print_table() -> None:
    """One line a model: parameters, multiply-adds a view and a protocol, the paper's figure."""
    print("10⁹ multiply-adds (half of FLOPs) of matrix products; '+attention' counts q·kᵀ and")
    print(
        "weights·v too; the protocol is counted as the paper counts (STAM without, XViT with them)"
    )
    titles = ("M params", "a view", "+attention", "protocol", "paper")
    print(f"{'model':10} " + "{:>9} {:>8} {:>11} {:>18} {:>6}".format(*titles))
    for name in PRESETS:
        config = make_model_config(name)
        _, params = abstract_model(config)
        count = sum(math.prod(leaf.shape) for leaf in params.values()) / 1e6
        plain, full = (multiply_adds(config, attention=a) / 1e9 for a in (False, True))
        paper, counts_attention, views = PAPER.get(name, (None, True, 1))
        of_protocol = f"{views} × = {views * (full if counts_attention else plain):.0f}"
        columns = f"{count:9.2f} {plain:8.1f} {full:11.1f} {of_protocol:>18} {paper or '–':>6}"
        print(f"{name:10} {columns}")


def print_times(repeats: int) -> None:
    """Median forward time of STAM by number of frames, and a frame's share."""
    print(f"\n{'frames':>6} {'seconds':>8} {'ms a frame':>11}  (stam, one clip, float32)")
    for frames in (8, 16, 32, 64):
        model = create_model(f"stam_{frames}")
        run = jax.jit(model)
        clip = np.random.default_rng(0).random((1, frames, 224, 224, 3), np.float32)
        run(clip).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(clip).block_until_ready()
            seconds.append(time.perf_counter() - start)
        median = float(np.median(seconds))
        print(f"{frames:6} {median:8.2f} {1000 * median / frames:11.1f}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="time STAM at 8 to 64 frames")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print_table()
    if args.time:
        print_times(args.repeats)


if __name__ == "__main__":
    main()
