"""XLA flags of the tests, most of whose time is spent in compilation."""

import importlib.metadata

# Without optimisation, compilation takes half as long; without XLA's fusion emitters, a third of
# that. The fusion emitters cannot be switched off in jaxlib 0.11.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def fake_devices(count: int) -> str:
    """Return flags for fast compilation and a number of fake CPU devices."""
    return f"--xla_force_host_platform_device_count={count} {FAST_COMPILATION}"
