"""The step that compares the models with the golden files in each dtype."""

import time

from benchmarks.gpu.context import NOT_RUN, Context

BOUND = 1e-4  # of float32
DTYPES = ("float32", "bfloat16", "tfloat32")  # in the order of importance


def parity(ctx: Context) -> None:
    """Report the differences from the golden files: float32 of all models first, then others."""
    import numpy as np

    from jaxvid.models import abstract_model, make_model_config
    from tests import goldens

    weights, expected = {}, 0.0
    pairs = [(name, dtype) for dtype in DTYPES for name in ctx.size.goldens]
    for name, dtype in pairs:
        if ctx.seconds_left() < expected:
            row = {"golden file": name, "dtype": dtype, "note": NOT_RUN}
            ctx.add("parity", row)
            continue
        start = time.monotonic()
        preset, fields = ctx.size.goldens[name]
        golden = goldens.load(name) if "/" in name else goldens.load_full(name)
        config = make_model_config(preset, dtype=dtype, **fields)
        if name not in weights:
            _, abstract = abstract_model(config)
            seed = golden["param_seed"] if "/" in name else golden["seed"]
            weights[name] = goldens.params(abstract, int(seed))
        outputs = goldens.outputs(config, weights[name], golden["clip"])
        differences = goldens.differences(golden, outputs)
        logits = np.asarray(outputs["logits"], np.float32)
        matches = logits.argmax(-1) == golden["logits"].argmax(-1)
        largest = float(np.max([*differences.values()]))  # NaN if one of them is
        ctx.add(
            "parity",
            {
                "golden file": name,
                "dtype": dtype,
                "logits": differences["logits"],
                "largest difference": largest,
                "logits' standard deviation": golden["logits"].std(),
                "equal top-1": f"{matches.sum()} of {matches.size}",
                "bound": BOUND if dtype == "float32" else None,
            },
        )
        if dtype == "float32" and not largest <= BOUND:
            ctx.failures.append(f"{name}: differs by {largest:.1e}, bound {BOUND:g}")
        expected = 1.3 * (time.monotonic() - start)
