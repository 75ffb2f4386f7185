"""Compute dtypes of a network, and the precision of its float32 matrix products.

On NVIDIA GPUs, XLA by default multiplies float32 matrices as TensorFloat-32, which rounds the
inputs to 10 bits of mantissa. The precision is therefore part of a network's dtype. It is set
inside the network's methods, so that it does not depend on global options of JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

# Dtype in configs → dtype of the activations.
ACTIVATIONS = {"float32": "float32", "tfloat32": "float32", "bfloat16": "bfloat16"}
DTYPES = tuple(ACTIVATIONS)
# Dtype in configs → argument of `jax.default_matmul_precision`. With bfloat16 activations, only
# the class head multiplies float32 matrices.
PRECISIONS = {"float32": "highest", "tfloat32": "high", "bfloat16": "default"}


def in_model_precision(method: Callable) -> Callable:
    """Decorate a method of a network: its matrix products have the precision of `config.dtype`.

    The precision applies to gradients of the method, too.
    """

    @functools.wraps(method)
    def with_precision(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(PRECISIONS[self.config.dtype]):
            return method(self, *args, **kwargs)

    return with_precision
