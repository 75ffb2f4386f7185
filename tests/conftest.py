"""Eight fake CPU devices, so that sharded code runs everywhere; ranks never promote silently."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Grain's workers want absl flags that have been parsed."""
    flags.FLAGS.mark_as_parsed()
