"""Compare the engines that can serve a network on a CPU, in alternating runs.

python benchmarks/deploy.py                                    the demo's network and stam_16
python benchmarks/deploy.py --model xvit_k600 --batch 4        another network, 4 clips per batch
python benchmarks/deploy.py --sides jax-float32 openvino-int8  fewer engines

The engines are JAX, PyTorch (`convert/torch_reference.py`, eager), ONNX Runtime and OpenVINO, each
with 2 threads in its own process. ONNX Runtime and OpenVINO run the files that `jaxvid export`
writes. Weights are random, and int8 files are calibrated on random clips, which does not change
their speed. Engines whose package is not installed are left out.

Prints the processor's features, clips/s, peak memory, and the speed relative to JAX in float32: the
median and range of the ratios of neighbouring runs.
"""

import argparse
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.turns import THREADS, Program, Side, SideError, Workload, resident_peak
from jaxvid.cpu_info import describe_cpu

BASE = "jax-float32"
EXPORTER = ("torch", "onnx", "onnxscript", "onnxruntime")
# Engine → the packages that it needs, and those that write its files.
PACKAGES = {"torch": ("torch",), "onnxruntime": EXPORTER, "openvino": (*EXPORTER, "openvino")}
MODELS = ("xvit_tiny", "stam_16")  # that of the demo, and a released one


def write_files(work: Workload, folder: Path) -> None:
    """Write `float32.onnx` and `int8.onnx` with random weights."""
    from benchmarks.forward import make_config, make_inputs
    from convert.flax_to_onnx import make_onnx
    from jaxvid.inference.onnx_export import quantize
    from jaxvid.storage.preprocessing import Preprocessing

    config = make_config(work)
    preprocessing = Preprocessing(
        num_frames=config.num_frames,
        crop=config.image_size,
        short_side=config.image_size,
        sampling="segments",
        mean=0.5,
        std=0.5,
    )
    network = make_onnx(config, make_inputs(config, 1)[0], preprocessing, "softmax")
    (folder / "float32.onnx").write_bytes(network.SerializeToString())
    network = quantize(network, iter([make_clips(work)[:1]]))
    (folder / "int8.onnx").write_bytes(network.SerializeToString())


def make_clips(work: Workload) -> np.ndarray:
    """Return random clips `(b, t, h, w, c)` uint8."""
    from jaxvid.models import make_model_config

    config = make_model_config(work.model)
    shape = (work.batch, config.num_frames, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_jax(work: Workload) -> Program:
    """Return the program of JAX."""
    from benchmarks import forward

    return forward.make_jax(work)


def make_torch(work: Workload) -> Program:
    """Return the program of PyTorch."""
    from benchmarks import forward

    return forward.make_torch(work)


def make_onnxruntime(work: Workload, file: Path) -> Program:
    """Return the program of ONNX Runtime."""
    from jaxvid.storage.onnx_network import OnnxNetwork

    network, clips = OnnxNetwork(file.read_bytes(), file.name, THREADS), make_clips(work)
    return Program(lambda count: _repeat(network, clips, count), resident_peak, "cpu", None)


def make_openvino(work: Workload, file: Path, precision: str) -> Program:
    """Return the program of OpenVINO; `precision` is that of its float operators."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": THREADS}
    network, clips = openvino.Core().compile_model(file, "CPU", options), make_clips(work)
    return Program(lambda count: _repeat(network, clips, count), resident_peak, "cpu", None)


def _repeat(function: Callable, clips: np.ndarray, count: int) -> None:
    for _ in range(count):
        function(clips)


def make_sides(work: Workload, folder: Path) -> dict[str, Callable[[], Program]]:
    """Return the name of each side, `ENGINE-PRECISION` → the function that makes its program."""
    low = work._replace(dtype="bfloat16")
    float32, int8 = folder / "float32.onnx", folder / "int8.onnx"
    return {
        BASE: functools.partial(make_jax, work),
        "jax-bfloat16": functools.partial(make_jax, low),
        "torch-float32": functools.partial(make_torch, work),
        "torch-bfloat16": functools.partial(make_torch, low),
        "onnxruntime-float32": functools.partial(make_onnxruntime, work, float32),
        "onnxruntime-int8": functools.partial(make_onnxruntime, work, int8),
        "openvino-float32": functools.partial(make_openvino, work, float32, "f32"),
        "openvino-bfloat16": functools.partial(make_openvino, work, float32, "bf16"),
        "openvino-int8": functools.partial(make_openvino, work, int8, "f32"),
    }


def compare(work: Workload, names: list[str], pairs: int) -> None:
    """Run the sides in turns and print a table.

    Args:
        work: The network and the batch size.
        names: The sides; `BASE` comes first.
        pairs: Number of timed rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        if any(name.startswith(("onnxruntime", "openvino")) for name in names):
            writer = Side()
            writer.call(write_files, work, Path(folder))
            writer.close()
        sides = {}
        for name, make in make_sides(work, Path(folder)).items():
            if name not in names:
                continue
            side = Side(make, {"JAX_PLATFORMS": "cpu"})
            try:
                side.finish(side.start())
                sides[name] = side
            except SideError as error:
                print(f"{name}: left out ({error})", flush=True)
                side.close()
        times = np.array([[side.seconds() for side in sides.values()] for _ in range(pairs)])
        memory = [side.peak_bytes() for side in sides.values()]
        for side in sides.values():
            side.close()
    print(f"\n{work.model}, {work.batch} clip(s), {THREADS} threads, {pairs} rounds")
    print(f"{'engine':20} clips/s   GB  speed / {BASE} (range)")
    for i, name in enumerate(sides):
        ratios = times[:, 0] / times[:, i]
        speed, spread = work.batch / np.median(times[:, i]), f"{ratios.min():.2f} to"
        print(
            f"{name:20} {speed:7.3f} {memory[i] / 1e9:4.1f}  {np.median(ratios):.2f} × "
            f"({spread} {ratios.max():.2f})",
            flush=True,
        )


def main() -> None:
    """Run the command line."""
    known = [*make_sides(Workload("", 1, "float32", False), Path())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", default=MODELS, help=f"presets (default {' '.join(MODELS)})"
    )
    parser.add_argument("--batch", type=int, default=1, help="clips per batch (default 1)")
    parser.add_argument("--pairs", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument(
        "--sides", nargs="+", default=known, choices=known, help="engines (default all)"
    )
    args = parser.parse_args()
    print(f"CPU: {describe_cpu()}, {os.cpu_count()} CPUs")
    for model in args.model:
        names = [BASE, *(name for name in args.sides if name != BASE)]
        for engine, packages in PACKAGES.items():
            if missing := [p for p in packages if importlib.util.find_spec(p) is None]:
                print(f"{engine}: left out, because {', '.join(missing)} is not installed")
                names = [name for name in names if not name.startswith(engine)]
        compare(Workload(model, args.batch, "float32", False), names, args.pairs)


if __name__ == "__main__":
    main()
