"""The step that measures the device's peaks and checks the precision of matrix products."""

from benchmarks.gpu.context import Context
from benchmarks.turns import Side, SideError

DTYPES = ("bfloat16", "tfloat32", "float32")


def peaks(ctx: Context) -> None:
    """Measure the matmul peak of each dtype and the memory bandwidth, and check the precision."""
    from benchmarks import peak

    for dtype in DTYPES:
        rate = 2 * peak.matmul_peak(dtype, ctx.size.matrix) / 1e12
        ctx.add("peaks", {"operation": f"matrix product, {dtype}", "rate": rate, "unit": "TFLOP/s"})
    rate = peak.copy_peak(ctx.size.copy_bytes) / 1e12
    ctx.add("peaks", {"operation": "copy in memory (read + write)", "rate": rate, "unit": "TB/s"})
    report_errors(ctx, product_errors(), "")
    control(ctx)


def report_errors(ctx: Context, errors: dict[str, float], environment: str) -> None:
    """Add the result of `product_errors` to the table."""
    for dtype, error in errors.items():
        row = {"dtype": dtype, "largest relative error": error, "environment": environment}
        ctx.add("precision of x · 1", row)


def product_errors() -> dict[str, float]:
    """Multiply a random matrix by the identity in each dtype; return the largest relative errors.

    Every product and sum is exact in float32, so the result must equal the matrix. TensorFloat-32
    rounds the matrix to 11 bits (error 2⁻¹¹ = 4.9e-4), bfloat16 to 8 bits (2⁻⁸ = 3.9e-3).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxvid.models.precision import ACTIVATIONS, PRECISIONS

    n = 512
    x = np.random.default_rng(0).standard_normal((n, n), np.float32)
    identity = np.eye(n, dtype=np.float32)
    errors = {}
    for dtype in DTYPES:
        # As in `in_model_precision`. The identity is an argument, so that XLA cannot simplify.
        with jax.default_matmul_precision(PRECISIONS[dtype]):
            product = jax.jit(jnp.matmul)
            arrays = (jnp.asarray(a, ACTIVATIONS[dtype]) for a in (x, identity))
            result = np.asarray(product(*arrays), np.float32)
        errors[dtype] = float(np.max(np.abs(result - x) / np.abs(x)))
    return errors


def control(ctx: Context) -> None:
    """Repeat the check in a process in which NVIDIA's libraries must not use TensorFloat-32."""
    side = Side(environment={"NVIDIA_TF32_OVERRIDE": "0"})
    try:
        errors = side.call(product_errors)
    except SideError as error:
        ctx.fail("control without TensorFloat-32", str(error))
        return
    finally:
        side.close()
    report_errors(ctx, errors, "NVIDIA_TF32_OVERRIDE=0")
