"""Multiply-adds equal those of the papers and the compiler's count; the benchmarks run."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cost import multiply_adds, print_table
from jaxvid.models import FAMILIES, abstract_model, make_model_config, merge_params

ROOT = Path(__file__).parents[1]
PAPER = {name: cost for f in FAMILIES.values() for name, cost in f.published_cost.items()}


@pytest.mark.parametrize("name", PAPER)
def test_multiply_adds_equal_the_published_ones(name):
    paper, config = PAPER[name], make_model_config(name)
    giga = paper.num_views * multiply_adds(config, attention=paper.counts_attention) / 1e9
    assert giga == pytest.approx(paper.giga, rel=0.01)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("stam_8", {}), ("stam_8", {"aggregator": "mean"}), ("xvit_k400", {"summary_tokens": True})],
)
def test_multiply_adds_equal_the_count_of_the_compiler(name, overrides):
    """The compiler also counts norms, softmax and GELU, which the tolerance allows for.

    `multiply_adds` counts every token of every block. So does the compiler, because it is given a
    program that computes all tokens. The model's own forward pass computes fewer tokens in the last
    block.
    """
    config = make_model_config(name, depth=2, **overrides)
    graphdef, params = abstract_model(config)
    clip = jax.ShapeDtypeStruct((1, config.num_frames, 224, 224, 3), jnp.float32)

    def all_tokens(params, clip):
        model = merge_params(graphdef, params)
        vit = model if name.startswith("stam") else model.base_model
        x = vit.embed(clip)
        for block in vit.blocks:
            x = block(x)
        frames = vit.norm(x)[:, :, 0]
        if name.startswith("stam"):
            return model.head(model.video_features(frames))
        return model.consensus(frames)

    lowered = jax.jit(all_tokens).lower(params, clip)
    flops = lowered.cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(multiply_adds(config), rel=0.02)


def test_table_has_a_row_for_every_model(capsys):
    print_table()
    out = capsys.readouterr().out
    assert all(name in out for name in PAPER)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("forward.py", "--model", "xvit_tiny", "--pairs", "1"), "× as fast as pytorch"),
        pytest.param(
            ("forward.py", "--model", "xvit_tiny", "--pairs", "1", "--train")
            + ("--against", "unshifted"),
            "× as fast as unshifted",
            marks=pytest.mark.full,
        ),
        (("data.py", "--size", "340x256", "--videos", "1", "--rounds", "1"), "AutoAugment"),
        pytest.param(
            ("train.py", "--input", "pack", "--trace", "--turns", "1", "--steps", "2")
            + ("--config.batch_size=8", "--config.model.depth=1"),
            "pack, read at once is",  # name of the side that waits for the device at each step
            marks=pytest.mark.full,
        ),
        (
            ("windows.py", "--model", "stam_tiny", "--windows", "4", "--rounds", "1"),
            "frames to compute: 14 with sharing, 32 without",
        ),
    ],
)
def test_benchmarks_run(arguments, printed):
    name, *flags = arguments
    command = [sys.executable, f"benchmarks/{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
