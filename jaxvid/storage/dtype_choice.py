"""The compute dtype `auto`: float32 or bfloat16, chosen by a measurement on this machine."""

import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

from jaxvid.atomic import write_file
from jaxvid.cpu_info import describe_cpu
from jaxvid.errors import InputError
from jaxvid.files import cache_dir, read_limited
from jaxvid.models import ModelConfig, abstract_model, family_of, merge_params
from jaxvid.models.precision import PRECISIONS

AUTO = "auto"
CANDIDATES = ("float32", "bfloat16")
MIN_SPEED_UP = 1.1  # of bfloat16; below it, float32 is chosen, which is more accurate
ROUNDS = 5  # timed pairs
MAX_SECONDS = 5.0  # after which no further pair is timed
MAX_RATIO = 10.0  # no pair is timed if the first bfloat16 run takes this many times as long


@dataclasses.dataclass(frozen=True)
class DtypeChoice:
    """A measured choice.

    Attributes:
        dtype: One of `CANDIDATES`.
        speed_up: Time of float32 divided by the time of bfloat16: the median of the pairs.
    """

    dtype: str
    speed_up: float

    def __str__(self) -> str:
        return f"dtype={self.dtype}: bfloat16 takes {1 / self.speed_up:.2f} × the time of float32"


def choose_dtype(config: ModelConfig, *, train: bool) -> DtypeChoice:
    """Return the faster compute dtype for a network on the first device.

    The first call measures it on one block of the image ViT, with the tokens of one clip. The
    result is stored in the user's cache.

    Args:
        config: The network's config; its dtype is ignored.
        train: Whether to time the gradient instead of the forward pass.
    """
    key = _cache_key(config, train)
    # Without a cache, each call measures.
    with contextlib.suppress(OSError, RuntimeError, InputError, ValueError, KeyError, TypeError):
        stored = json.loads(read_limited(cache_dir() / "dtypes" / f"{key}.json", 10_000))
        choice = DtypeChoice(str(stored["dtype"]), float(stored["speed_up"]))
        if choice.dtype in CANDIDATES and choice.speed_up > 0:
            return choice
    steps = [_make_step(dataclasses.replace(config, dtype=d), train) for d in CANDIDATES]
    speed_up = measure_ratio(*steps)
    choice = DtypeChoice(CANDIDATES[speed_up >= MIN_SPEED_UP], round(speed_up, 3))
    with contextlib.suppress(OSError, RuntimeError, InputError):
        path = cache_dir() / "dtypes" / f"{key}.json"
        write_file(path, json.dumps(dataclasses.asdict(choice)).encode())
    return choice


def measure_ratio(
    first: Callable[[], None],
    second: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time of `first` divided by that of `second`: the median of alternating pairs.

    Args:
        first: A compiled function that waits for its result.
        second: Another one.
        clock: Returns the time in seconds.
    """

    def seconds(function: Callable[[], None]) -> float:
        start = clock()
        function()
        return clock() - start

    warm_up = seconds(first), seconds(second)
    if warm_up[1] > MAX_RATIO * warm_up[0]:
        return warm_up[0] / warm_up[1]
    ratios, start = [], clock()
    while not ratios or (len(ratios) < ROUNDS and clock() - start < MAX_SECONDS):
        ratios.append(seconds(first) / seconds(second))
    return statistics.median(ratios)


def _make_step(config: ModelConfig, train: bool) -> Callable[[], None]:
    """Return a compiled function that runs one block of the image ViT on one clip, and waits."""
    family = family_of(config)
    block = family.image_vit(merge_params(*abstract_model(config))).blocks[0]
    graphdef, abstract = nnx.split(block)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), abstract
    )
    shape = (1, config.num_frames, config.num_tokens, config.width)
    x = jnp.asarray(rng.standard_normal(shape, np.float32), config.compute_dtype)  # (b t n d)

    def forward(state: nnx.State, x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(PRECISIONS[config.dtype]):
            return nnx.merge(graphdef, state)(x).astype(jnp.float32).mean()

    function = jax.grad(forward, argnums=(0, 1)) if train else forward
    compiled = jax.jit(function).lower(state, x).compile()
    return lambda: jax.block_until_ready(compiled(state, x))


def _cache_key(config: ModelConfig, train: bool) -> str:
    """Return a name for the device, the versions, the network and the kind of step."""
    device = jax.local_devices()[0]
    fields = dataclasses.asdict(dataclasses.replace(config, dtype=CANDIDATES[0]))
    machine = describe_cpu() if device.platform == "cpu" else device.device_kind
    values = [machine, jax.local_device_count(), jax.__version__, jaxlib.__version__, fields, train]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]
