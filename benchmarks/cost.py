"""Print parameters and multiply-adds of every preset, and compare them with the papers' figures.

python benchmarks/cost.py            print the table
python benchmarks/cost.py --time     also time the forward pass for different numbers of frames
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from jaxvid.models import (
    FAMILIES,
    PRESETS,
    ModelConfig,
    abstract_model,
    create_model,
    family_of,
    make_model_config,
)


def multiply_adds(config: ModelConfig, *, attention: bool = True) -> int:
    """Return the multiply-adds of the matrix products in one view's forward pass.

    Args:
        config: The model's config.
        attention: Whether to count the attention products, q·kᵀ and weights·v, too.
    """
    return family_of(config).multiply_adds(config, attention)


def print_table() -> None:
    """Print one row per preset: parameters, multiply-adds per view and protocol, paper's figure."""
    print(
        "10⁹ multiply-adds of matrix products (1 multiply-add = 2 FLOPs). '+attention' also counts"
    )
    print("q·kᵀ and weights·v; 'protocol' (views × cost per view) counts them if the paper does")
    titles = ("M params", "per view", "+attention", "protocol", "paper")
    print(f"{'model':10} " + "{:>9} {:>8} {:>11} {:>18} {:>6}".format(*titles))
    for name in PRESETS:
        config = make_model_config(name)
        _, params = abstract_model(config)
        count = sum(math.prod(leaf.shape) for leaf in params.values()) / 1e6
        plain, full = (multiply_adds(config, attention=a) / 1e9 for a in (False, True))
        protocol, paper = f"1 × = {full:.0f}", "–"
        if published := family_of(config).published_cost.get(name):
            cost = published.num_views * (full if published.counts_attention else plain)
            protocol, paper = f"{published.num_views} × = {cost:.0f}", f"{published.giga:g}"
        columns = f"{count:9.2f} {plain:8.1f} {full:11.1f} {protocol:>18} {paper:>6}"
        print(f"{name:10} {columns}")


def print_times(repeats: int) -> None:
    """Print the median forward time of published presets that encode frames independently.

    The time is expected to be proportional to the number of frames.

    Args:
        repeats: Number of timed runs per preset.
    """
    print(f"\n{'preset':10} {'frames':>6} {'seconds':>8} {'ms per frame':>13}  (1 clip, float32)")
    presets = [n for f in FAMILIES.values() if f.shares_frames for n in f.published_cost]
    for name in presets:
        model = create_model(name)
        run = jax.jit(model)
        size, frames = model.config.image_size, model.config.num_frames
        clip = np.random.default_rng(0).random((1, frames, size, size, 3), np.float32)
        run(clip).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(clip).block_until_ready()
            seconds.append(time.perf_counter() - start)
        median = float(np.median(seconds))
        print(f"{name:10} {frames:6} {median:8.2f} {1000 * median / frames:13.1f}", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="also time forward passes")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per preset (default 3)")
    args = parser.parse_args()
    print_table()
    if args.time:
        print_times(args.repeats)


if __name__ == "__main__":
    main()
