"""The steps of the benchmark, in the order of their importance."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu.context import Context


class Step(NamedTuple):
    """A step, which runs in a process of its own.

    Attributes:
        name: Name on the command line.
        title: What is measured.
        function: `MODULE:FUNCTION` in this package; it is called with a `Context`.
        options: Keyword arguments of the function.
        share: Share of the total time.
        needed: Seconds for the first results: the minimum time limit, if this much time is left.
        least: The step is not started if fewer seconds are left.
    """

    name: str
    title: str
    function: str
    options: dict[str, Any]
    share: float
    needed: float
    least: float

    def load(self) -> Callable[[Context], None]:
        """Import the module and return the function of the step."""
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
        return functools.partial(function, **self.options)


def _speed(name: str, title: str, model: int, train: bool) -> Step:
    options = {"model": model, "train": train}
    return Step(name, title, "speed:against_pytorch", options, 120, 60, 40)


def _choice(field: str, title: str) -> Step:
    return Step(field, title, "speed:choice", {"field": field}, 90, 45, 30)


STEPS = (
    Step("environment", "machine and software", "environment:environment", {}, 15, 25, 5),
    Step("peaks", "matmul peak, bandwidth, precision of products", "peaks:peaks", {}, 30, 40, 10),
    Step("parity", "differences from the original code", "parity:parity", {}, 90, 60, 20),
    Step("demo", "accuracy of the demo", "demo:demo", {}, 90, 90, 40),
    Step("resume", "bit-exact resume of deterministic runs", "demo:resume", {}, 75, 75, 40),
    _speed("forward-xvit", "forward pass of XViT against PyTorch", -1, False),
    _speed("train-xvit", "training step of XViT against PyTorch", -1, True),
    _speed("forward-stam", "forward pass of STAM against PyTorch", 0, False),
    _speed("train-stam", "training step of STAM against PyTorch", 0, True),
    _choice("attention", "implementations of attention"),
    _choice("scan", "blocks as a scan and unrolled"),
    _choice("remat", "rematerialisation policies"),
    Step("kernels", "kernels by share of time", "kernels:kernels", {}, 40, 40, 20),
    Step("input", "training from packs and from video files", "pipeline:feed", {}, 120, 80, 50),
    Step("memory", "planned and measured memory", "pipeline:memory", {}, 50, 40, 25),
    Step("startup", "time until the first training step", "pipeline:startup", {}, 75, 75, 45),
    Step("shift", "cost of the temporal shift", "speed:shift", {}, 60, 45, 25),
    Step("pytorch", "options of PyTorch, one by one", "speed:torch_options", {}, 200, 60, 40),
    Step("flags", "flags of XLA, one by one", "speed:xla_flags", {}, 120, 45, 30),
    Step("dtypes", "TensorFloat-32 and float32", "speed:dtypes", {}, 90, 50, 30),
)
