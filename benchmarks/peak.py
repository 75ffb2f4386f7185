"""Highest rates of the device, measured with large operations on random data."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvid.models.precision import ACTIVATIONS, PRECISIONS

REPEATS = 10


def default_size() -> int:
    """Return the number of rows of matrices whose product reaches the peak of the device."""
    return 8192 if jax.default_backend() == "gpu" else 2048


def matmul_peak(dtype: str, n: int | None = None) -> float:
    """Measure the highest rate of a large matrix product in JAX.

    The matrices are random: products of constant matrices use less power, and run faster on GPUs.

    Args:
        dtype: Compute dtype as in a model's config.
        n: Rows and columns of the matrices; None: `default_size`.

    Returns:
        Multiply-adds per second in the fastest of `REPEATS` runs.
    """
    n = n or default_size()
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), ACTIVATIONS[dtype])
    product = jax.jit(functools.partial(jnp.matmul, precision=PRECISIONS[dtype]))
    return n**3 / fastest(product, a, b)


def copy_peak(num_bytes: int) -> float:
    """Measure the rate of a copy within the device's memory.

    Args:
        num_bytes: Size of the copied array.

    Returns:
        Bytes read plus bytes written, per second.
    """
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    # XLA cannot skip this operation, which reads and writes every element.
    return 2 * x.nbytes / fastest(jax.jit(jnp.negative), x)


def fastest(function: Callable, *arguments: jax.Array) -> float:
    """Return the time in seconds of the fastest of `REPEATS` calls, after a warm-up."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
