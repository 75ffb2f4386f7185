"""Compare jaxvid's speed with plain PyTorch's on the same weights, in alternating runs.

python benchmarks/forward.py --model stam_16                          forward pass
python benchmarks/forward.py --model xvit_k600 --train                forward, backward, SGD step
python benchmarks/forward.py --model xvit_k600 --against unshifted    cost of the temporal shift

Prints clips/s and peak memory of both sides, the share of the machine's measured matmul peak, and
the median of the paired ratios. Each side runs in its own process. PyTorch runs
`convert/torch_reference.py`: eager on a CPU, compiled and with its fused attention on a GPU.
"""

import argparse
import functools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to PyTorch
# Keep freed memory in the process (glibc). Otherwise each step would allocate fresh memory. A
# virtual machine may take seconds to provide a GB, which would be counted as time of the step.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 40))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cost import multiply_adds
from jaxvid.models import Params, create_model, make_model_config, merge_params, split_params
from jaxvid.models.precision import ACTIVATIONS, DTYPES, PRECISIONS
from jaxvid.training.steps import cross_entropy


def matmul_peak(dtype: str) -> float:
    """Measure the highest rate of a large matrix product in JAX, in multiply-adds per second."""
    n = 8192 if jax.default_backend() == "gpu" else 2048
    a = jnp.ones((n, n), ACTIVATIONS[dtype])
    product = jax.jit(functools.partial(jnp.matmul, precision=PRECISIONS[dtype]))
    product(a, a).block_until_ready()
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = max(best, n**3 / (time.perf_counter() - start))
    return best


def make_inputs(args: argparse.Namespace, **overrides) -> tuple[object, np.ndarray, np.ndarray]:
    """Return a newly initialised network, clips and labels; they are equal in every process."""
    # Without dropout, both sides do the same arithmetic.
    model = create_model(args.model, dtype=args.dtype, dropout=0.0, **overrides)
    cfg = model.config
    shape = (args.batch, cfg.num_frames, cfg.image_size, cfg.image_size, 3)
    clip = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return model, clip, np.arange(args.batch) % cfg.num_classes


def make_jax(args: argparse.Namespace, **overrides) -> Callable[[], None]:
    """Return a function that runs one step of jaxvid's model and waits for the result."""
    model, clip, label = make_inputs(args, **overrides)
    graphdef, params = split_params(model)
    clip, label = jnp.asarray(clip), jnp.asarray(label)
    optimizer = optax.sgd(1e-4)

    def forward(params: Params, clip: jax.Array, label: jax.Array) -> jax.Array:
        return merge_params(graphdef, params)(clip)

    def train(params: Params, clip: jax.Array, label: jax.Array) -> Params:
        def loss_fn(params: Params) -> jax.Array:
            return cross_entropy(forward(params, clip, label), label, smoothing=0.0).mean()

        grads = jax.grad(loss_fn)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    step = jax.jit(train, donate_argnums=0) if args.train else jax.jit(forward)
    start = time.perf_counter()
    step = step.lower(params, clip, label).compile()
    print(f"jaxvid: traced and compiled in {time.perf_counter() - start:.1f} s", flush=True)
    state = [params]

    def run() -> None:
        out = jax.block_until_ready(step(state[0], clip, label))
        if args.train:
            state[0] = out

    return run


def make_torch(args: argparse.Namespace) -> Callable[[], None]:
    """Return a function that runs one step of the PyTorch reference on the same weights."""
    import torch

    from convert.flax_to_torch import to_state_dict
    from convert.torch_reference import build_reference

    model, clip, label = make_inputs(args)
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, ACTIVATIONS[args.dtype])
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "tfloat32"
    torch.set_num_threads(THREADS)
    reference = build_reference(model.config, fused=on_gpu).to(device)
    reference.load_state_dict(to_state_dict(split_params(model)[1], model.config), strict=True)
    clip, label = torch.tensor(clip, device=device), torch.tensor(label, device=device).long()
    call = torch.compile(reference) if on_gpu else reference
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-4)

    def run() -> None:
        with (
            torch.set_grad_enabled(args.train),
            torch.autocast(device, dtype, dtype != torch.float32),
        ):
            logits = call(clip)
        if args.train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), label).backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    return run


SIDES = {
    "jaxvid": make_jax,
    "pytorch": make_torch,
    "unshifted": functools.partial(make_jax, shift="none"),
}
_run: Callable[[], None]  # the step of the side that this process runs


def prepare(side: str, args: argparse.Namespace) -> None:
    """Build the step of a side and run it once, in the side's process."""
    global _run
    _run = SIDES[side](args)
    _run()


def seconds() -> float:
    """Return the wall time of one step in seconds, in the side's process."""
    start = time.perf_counter()
    _run()
    return time.perf_counter() - start


def peak_memory(side: str) -> float:
    """Return the peak memory of the side's process in bytes, on the GPU if there is one."""
    if jax.default_backend() == "gpu":
        if side != "pytorch":
            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stam_16", help="a preset (default stam_16)")
    parser.add_argument("--batch", type=int, default=1, help="clips per step (default 1)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="compute dtype (default float32)",
    )
    parser.add_argument(
        "--train", action="store_true", help="time training steps instead of forward passes"
    )
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs (default 7)")
    others = (*list(SIDES)[1:], "nothing")
    parser.add_argument(
        "--against",
        default="pytorch",
        choices=others,
        help="what to compare with; nothing: run jaxvid alone (default pytorch)",
    )
    args = parser.parse_args()
    config = make_model_config(args.model)

    spawn = multiprocessing.get_context("spawn")
    sides = ["jaxvid"] if args.against == "nothing" else ["jaxvid", args.against]
    pools = {side: ProcessPoolExecutor(1, mp_context=spawn) for side in sides}
    for side, pool in pools.items():
        pool.submit(prepare, side, args).result()
    times = np.array(
        [[pool.submit(seconds).result() for pool in pools.values()] for _ in range(args.pairs)]
    )  # (pairs sides)
    memory = [pool.submit(peak_memory, side).result() for side, pool in pools.items()]
    peak = pools["jaxvid"].submit(matmul_peak, args.dtype).result()
    for pool in pools.values():
        pool.shutdown()

    work = args.batch * multiply_adds(config) * (3 if args.train else 1)
    title = "training step" if args.train else "forward pass"
    kind = jax.devices()[0].device_kind
    print(f"{args.model}, {title}, {args.batch} clip(s), {args.dtype}, {kind}")
    print(f"matmul peak {peak / 1e9:.0f} · 10⁹ multiply-adds/s")
    for side, median, bytes_ in zip(sides, np.median(times, axis=0), memory, strict=True):
        share = 100 * work / median / peak
        speed = f"{args.batch / median:7.3f} clips/s, {share:3.0f} % of the matmul peak"
        print(f"{side:9} {speed}, {bytes_ / 1e9:.1f} GB at the peak")
    if len(sides) == 2:
        ratios = times[:, 1] / times[:, 0]
        spread = f"median of {args.pairs} pairs, {ratios.min():.2f} to {ratios.max():.2f}"
        print(f"jaxvid is {np.median(ratios):.2f} × as fast as {args.against} ({spread})")


if __name__ == "__main__":
    main()
