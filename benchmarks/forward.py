"""This project's models against plain PyTorch on the same weights, in alternating runs.

python benchmarks/forward.py --model stam_16             forward
python benchmarks/forward.py --model xvit_k600 --train   forward, backward and an SGD step

Prints clips/s of both, the median of the paired ratios, the share of the machine's measured matmul
peak, and peak memory. PyTorch runs as `convert/torch_reference.py`: eagerly on a CPU, compiled and
with its fused attention on a GPU.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.cost import multiply_adds
from convert.flax_to_torch import to_state_dict
from convert.torch_reference import build_reference
from jaxvid.models import create_model, merge_params, split_params
from jaxvid.steps import cross_entropy


def matmul_peak(dtype: str) -> float:
    """The machine's best multiply-adds a second on one large product, in JAX."""
    n = 8192 if jax.default_backend() == "gpu" else 2048
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = max(best, n**3 / (time.perf_counter() - start))
    return best


def make_jax(model, clip: np.ndarray, label: np.ndarray, train: bool) -> Callable[[], None]:
    """A function that runs one step of this project's model and waits for it."""
    graphdef, params = split_params(model)
    clip, label = jnp.asarray(clip), jnp.asarray(label)
    if not train:
        forward = jax.jit(lambda params, clip: merge_params(graphdef, params)(clip))
        return lambda: forward(params, clip).block_until_ready()

    optimizer = optax.sgd(1e-4)

    def step(params, clip, label):
        def loss_fn(params):
            logits = merge_params(graphdef, params)(clip)
            return cross_entropy(logits, label, smoothing=0.0).mean()

        grads = jax.grad(loss_fn)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    compiled = jax.jit(step, donate_argnums=0)
    state = [params]

    def run() -> None:
        state[0] = jax.block_until_ready(compiled(state[0], clip, label))

    return run


def make_torch(model, clip: np.ndarray, label: np.ndarray, train: bool) -> Callable[[], None]:
    """A function that runs one step of the PyTorch reference on the same weights."""
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, model.config.dtype)
    torch.set_num_threads(THREADS)
    reference = build_reference(model.config, fused=on_gpu).to(device)
    reference.load_state_dict(to_state_dict(split_params(model)[1], model.config), strict=True)
    clip, label = torch.tensor(clip, device=device), torch.tensor(label, device=device).long()
    call = torch.compile(reference) if on_gpu else reference
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-4)

    def run() -> None:
        with torch.set_grad_enabled(train), torch.autocast(device, dtype, dtype != torch.float32):
            logits = call(clip)
        if train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), label).backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stam_16")
    parser.add_argument("--batch", type=int, default=1, help="clips a step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--train", action="store_true", help="a training step, not a forward")
    parser.add_argument("--pairs", type=int, default=7, help="counted pairs of runs")
    parser.add_argument("--only_jax", action="store_true", help="leave PyTorch out")
    args = parser.parse_args()

    # Dropout off: both do the same arithmetic.
    model = create_model(args.model, dtype=args.dtype, dropout=0.0)
    cfg = model.config
    rng = np.random.default_rng(0)
    clip = rng.normal(size=(args.batch, cfg.num_frames, cfg.image_size, cfg.image_size, 3))
    label = np.arange(args.batch) % cfg.num_classes
    clip = clip.astype(np.float32)
    start = time.perf_counter()
    ours = make_jax(model, clip, label, args.train)
    ours()
    print(f"jaxvid: first step (compilation included) {time.perf_counter() - start:.1f} s")
    runs = [ours]
    if not args.only_jax:
        runs.append(make_torch(model, clip, label, args.train))
        runs[1]()
    times = np.array([[seconds(run) for run in runs] for _ in range(args.pairs)])  # (pairs runs)
    medians = np.median(times, axis=0)
    peak = matmul_peak(args.dtype)
    work = args.batch * multiply_adds(cfg) * (3 if args.train else 1)
    what = "training step" if args.train else "forward"
    print(
        f"{args.model}, {what}, {args.batch} clip(s), {args.dtype}, {jax.devices()[0].device_kind}"
    )
    for name, median in zip(("jaxvid", "PyTorch"), medians, strict=False):
        share = 100 * work / median / peak
        print(f"{name:8} {args.batch / median:7.3f} clips/s, {share:3.0f} % of the matmul peak")
    if not args.only_jax:
        ratios = times[:, 1] / times[:, 0]
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
        print(
            f"jaxvid is {np.median(ratios):.2f} × PyTorch (median of {args.pairs} pairs, {spread})"
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"matmul peak {peak / 1e9:.0f} · 10⁹ multiply-adds/s; peak memory {memory:.1f} GB")


if __name__ == "__main__":
    main()
