"""Compare jaxvid's speed with plain PyTorch's on the same weights, in alternating runs.

python benchmarks/forward.py --model stam_16                          forward pass
python benchmarks/forward.py --model xvit_k600 --train                forward, backward, SGD step
python benchmarks/forward.py --model xvit_k600 --against unshifted    cost of the temporal shift
python benchmarks/forward.py --train --against scan=off               another value of a field

Prints clips/s and peak memory of both sides, the share of the machine's measured matmul peak, and
the median of the paired ratios. Each side runs in its own process. PyTorch runs
`convert/torch_reference.py`: eager on a CPU, compiled and with its fused attention on a GPU.
"""

import argparse
import contextlib
import functools
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import optax

from benchmarks.cost import multiply_adds
from benchmarks.peak import matmul_peak
from benchmarks.turns import THREADS, Program, Side, Workload, resident_peak
from jaxvid.models import ModelConfig, Params, abstract_model, make_model_config, merge_params
from jaxvid.models.implementation import CHOICES
from jaxvid.models.precision import ACTIVATIONS, DTYPES
from jaxvid.training.losses import cross_entropy


def make_config(work: Workload, **overrides) -> ModelConfig:
    """Return the config of the model, without dropout: both sides do the same arithmetic."""
    fields = {"dtype": work.dtype, "dropout": 0.0, **dict(work.fields), **overrides}
    return make_model_config(work.model, **fields)


def make_inputs(config: ModelConfig, batch: int) -> tuple[Params, np.ndarray, np.ndarray]:
    """Return random weights, clips and labels, which are equal in every process."""
    rng = np.random.default_rng(0)
    params = {}
    for name, leaf in abstract_model(config)[1].items():
        noise = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        params[name] = 1 + noise if name.endswith(".scale") else noise
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    return params, rng.standard_normal(shape, np.float32), np.arange(batch) % config.num_classes


def make_jax(work: Workload, **overrides) -> Program:
    """Return the program of jaxvid's model.

    Args:
        work: The model, the batch size and the kind of step.
        **overrides: Fields of the model's config.
    """
    config = make_config(work, **overrides)
    graphdef, _ = abstract_model(config)
    params, clip, label = jax.device_put(make_inputs(config, work.batch))
    optimizer = optax.sgd(1e-4)

    def forward(params: Params, clip: jax.Array, label: jax.Array) -> jax.Array:
        return merge_params(graphdef, params)(clip)

    def train(params: Params, clip: jax.Array, label: jax.Array) -> Params:
        def loss_fn(params: Params) -> jax.Array:
            return cross_entropy(forward(params, clip, label), label, smoothing=0.0).mean()

        grads = jax.grad(loss_fn)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    step = jax.jit(train, donate_argnums=0) if work.train else jax.jit(forward)
    start = time.perf_counter()
    step = step.lower(params, clip, label).compile()
    compile_seconds = time.perf_counter() - start
    state = [params]

    def run(count: int) -> None:
        for _ in range(count):
            out = step(state[0], clip, label)
            if work.train:
                state[0] = out
        jax.block_until_ready(out)

    return Program(run, peak_memory, jax.default_backend(), compile_seconds)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, on the GPU if there is one."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resident_peak())


class TorchOptions(NamedTuple):
    """How PyTorch runs the reference.

    Attributes:
        mode: `eager`, a mode of `torch.compile` (`default`, `reduce-overhead`, `max-autotune`), or
            empty: `default` on a GPU, and `eager` without fused attention on a CPU. On a CPU,
            `default` means `eager`, and other modes trace the model without generating code.
        attention: Name of a backend of `scaled_dot_product_attention`, e.g. `flash_attention`;
            empty: PyTorch chooses.
        channels_last: Whether the weights of the patch embedding have the format `channels_last`.
    """

    mode: str = ""
    attention: str = ""
    channels_last: bool = False


DEFAULT_TORCH = TorchOptions()


def make_torch(work: Workload, options: TorchOptions = DEFAULT_TORCH) -> Program:
    """Return the program of the PyTorch reference on the same weights."""
    import torch
    import torch.nn.attention

    from convert.flax_to_torch import to_state_dict
    from convert.torch_reference import build_reference

    jax.config.update("jax_platforms", "cpu")  # leave the memory of the GPU to PyTorch
    config = make_config(work)
    params, clip, label = make_inputs(config, work.batch)
    on_gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, ACTIVATIONS[work.dtype])
    torch.backends.cuda.matmul.allow_tf32 = work.dtype == "tfloat32"
    torch.backends.cudnn.allow_tf32 = work.dtype == "tfloat32"  # the patch embedding
    torch.set_num_threads(THREADS)
    reference = build_reference(config, fused=on_gpu or bool(options.mode)).to(device)
    reference.load_state_dict(to_state_dict(params, config), strict=True)
    if options.channels_last:
        reference = reference.to(memory_format=torch.channels_last)
    clip, label = torch.tensor(clip, device=device), torch.tensor(label, device=device).long()
    mode = options.mode or ("default" if on_gpu else "eager")
    call = reference
    if mode != "eager" and (on_gpu or mode != "default"):
        compiler = {"mode": mode} if on_gpu else {"backend": "eager"}
        call = torch.compile(reference, dynamic=False, **compiler)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-4, fused=on_gpu)

    def attention_backend() -> contextlib.AbstractContextManager:
        if not options.attention:
            return contextlib.nullcontext()
        backend = getattr(torch.nn.attention.SDPBackend, options.attention.upper())
        return torch.nn.attention.sdpa_kernel(backend)

    def run(count: int) -> None:
        for _ in range(count):
            if mode in ("reduce-overhead", "max-autotune"):
                torch.compiler.cudagraph_mark_step_begin()
            with (
                torch.set_grad_enabled(work.train),
                torch.autocast(device, dtype, dtype != torch.float32),
                attention_backend(),
            ):
                logits = call(clip)
            if work.train:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits.float(), label).backward()
                optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    peak = torch.cuda.max_memory_allocated if on_gpu else resident_peak
    return Program(run, peak, "gpu" if on_gpu else "cpu", None)


SIDES = {
    "jaxvid": make_jax,
    "pytorch": make_torch,
    "unshifted": functools.partial(make_jax, shift="none"),
}


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
    parser.add_argument(
        "--against",
        default="pytorch",
        help="what to compare with: pytorch, unshifted, nothing, or FIELD=VALUE of attention, scan "
        "or remat (default pytorch)",
    )
    args = parser.parse_args()
    work = Workload(args.model, args.batch, args.dtype, args.train)
    config = make_model_config(args.model)

    names = ["jaxvid"] if args.against == "nothing" else ["jaxvid", args.against]
    field, _, value = args.against.partition("=")
    if value not in CHOICES.get(field, ()) and args.against not in ("nothing", *SIDES):
        parser.error(f"--against {args.against}: there is no such side; see --help")
    programs = dict(SIDES)
    if value:
        programs[args.against] = functools.partial(make_jax, **{field: value})
    sides = {name: Side(functools.partial(programs[name], work)) for name in names}
    for name, side in sides.items():
        _, compile_seconds, _ = side.finish(side.start())
        if compile_seconds is not None:
            print(f"{name}: traced and compiled in {compile_seconds:.1f} s", flush=True)
    times = np.array(
        [[side.seconds() for side in sides.values()] for _ in range(args.pairs)]
    )  # (pairs sides)
    memory = [side.peak_bytes() for side in sides.values()]
    peak = sides["jaxvid"].call(matmul_peak, args.dtype)
    for side in sides.values():
        side.close()

    clip_work = args.batch * multiply_adds(config) * (3 if args.train else 1)
    kind = jax.devices()[0].device_kind
    print(f"{args.model}, {work.title}, {args.batch} clip(s), {args.dtype}, {kind}")
    print(f"matmul peak {peak / 1e9:.0f} · 10⁹ multiply-adds/s")
    for name, median, bytes_ in zip(names, np.median(times, axis=0), memory, strict=True):
        share = 100 * clip_work / median / peak
        speed = f"{args.batch / median:7.3f} clips/s, {share:3.0f} % of the matmul peak"
        print(f"{name:16} {speed}, {bytes_ / 1e9:.1f} GB at the peak")
    if len(sides) == 2:
        ratios = times[:, 1] / times[:, 0]
        spread = f"median of {args.pairs} pairs, {ratios.min():.2f} to {ratios.max():.2f}"
        print(f"jaxvid is {np.median(ratios):.2f} × as fast as {args.against} ({spread})")


if __name__ == "__main__":
    main()
