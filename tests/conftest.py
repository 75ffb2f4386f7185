"""Shared fixtures. Tests run on eight fake CPU devices, without implicit rank promotion."""

import logging
import os
from pathlib import Path

from tests.xla_flags import fake_devices

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake_devices(8)}"

import jax
import pytest
from absl import flags

import jaxvid
from configs import motion as motion_config
from jaxvid import progress
from jaxvid.data.synthetic_motion import LABELS, make_motion
from jaxvid.logs import log

jax.config.update("jax_numpy_rank_promotion", "raise")

FOLDER = Path(__file__).parent


SLOW_FILES = (
    "training/test_train.py",
    "distributed/test_processes.py",
    "distributed/test_failures.py",
    "distributed/test_collectives.py",
    "training/test_steps.py",
    "models/test_xvit.py",
    "distributed/test_sharding.py",
    "test_configs.py",
    "models/test_stam.py",
)


def pytest_collection_modifyitems(items):
    """Run slow files first, so that the processes of pytest-xdist end at about the same time."""
    ranks = {FOLDER / name: i for i, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Free compiled programs after each file: those of all files need several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """Mark absl flags as parsed, which Grain's workers need, and use a temporary compilation cache.

    The processes of pytest-xdist share the cache.
    """
    flags.FLAGS.mark_as_parsed()
    progress.COMPILE_SECONDS = 3600.0  # tests compare the lines on stderr
    cache = str(tmp_path_factory.getbasetemp().parent / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def motion_folder(tmp_path_factory):
    """Return the folder of a small motion data set: 48 training clips, 24 validation clips."""
    folder = tmp_path_factory.mktemp("data") / "motion"
    make_motion(folder, num_train=48, num_val=24, seed=0)
    return folder


def shrunk_config(folder, num_epochs: float = 2.0):
    """Return the demo's config with a smaller model and batches of 16 clips."""
    config = motion_config.get_config().unlock()
    config.data.source = "folder"
    config.data.folder = str(folder)
    config.model.width = 16
    config.model.depth = 1
    config.batch_size = 16
    config.num_epochs = num_epochs
    config.eval.batch_size = 16
    config.eval.every_epochs = 1.0
    config.optimizer.warmup_epochs = 0.67
    config.mesh.update({"data": 1, "fsdp": 8, "tensor": 1})
    config.log_steps = 2
    return config.lock()


@pytest.fixture
def lines():
    """Yield a list to which log messages of level INFO and above are added during a test."""
    messages = []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield messages
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def config(motion_folder):
    """Return the shrunk config of the demo on `motion_folder`, with two epochs."""
    return shrunk_config(motion_folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a folder with two model folders of tiny, untrained networks: `xvit` and `stam`."""
    folder = tmp_path_factory.mktemp("models")
    preprocessing = {"num_frames": 8, "short_side": 72, "crop": 64, "mean": 0.5, "std": 0.5}
    for name, sampling in (("xvit", "segments"), ("stam", "uniform_10s")):
        model = jaxvid.create_model(f"{name}_tiny", width=16, depth=2)
        preprocessing["sampling"] = sampling
        jaxvid.save_model(model, folder / name, preprocessing=preprocessing, labels=list(LABELS))
    return folder


@pytest.fixture(scope="session")
def clips(motion_folder):
    """Return the paths of the 24 validation clips of `motion_folder`."""
    return sorted(map(str, (motion_folder / "val").glob("*.mp4")))
