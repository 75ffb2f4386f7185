"""`config.deterministic`: XLA's flags and the compilation cache in the workdir."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxvid.distributed import setup
from jaxvid.errors import InputError
from jaxvid.train import train
from tests.conftest import shrunk_config

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
from jaxvid.distributed import setup
setup.prepare_compilation(Path(sys.argv[1]), deterministic=True)
import jax
jax.jit(lambda x: x + 1)(1.0)
print(os.environ["XLA_FLAGS"], jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def _same_cache_afterwards():
    folder = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", folder)


def test_flags_are_added_to_those_of_the_user(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "w"],
        **{"cwd": ROOT, "env": environment, "text": True, "capture_output": True, "check": True},
    )
    assert result.stdout.split() == [
        "--xla_cpu_enable_fast_math=false",
        "--xla_gpu_exclude_nondeterministic_ops=true",
        str(tmp_path / "w" / "xla_cache"),
    ]


def test_it_is_refused_after_the_first_use_of_a_device(tmp_path, monkeypatch):
    assert jax.device_count()
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(InputError, match="deterministic=True: JAX has already used a device; set "):
        setup.prepare_compilation(tmp_path, deterministic=True)


@pytest.mark.usefixtures("_same_cache_afterwards")
def test_a_run_records_it_and_is_not_resumed_without_it(motion_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", setup.DETERMINISTIC_FLAG)
    config = shrunk_config(motion_folder, num_epochs=1.0).unlock()
    config.deterministic = True
    train(config.lock(), tmp_path / "w", stop_step=2)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["deterministic"] is True
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "w" / "xla_cache")
    config = config.copy_and_resolve_references().unlock()
    config.deterministic = False
    with pytest.raises(InputError, match="different config .deterministic: True before, False now"):
        train(config.lock(), tmp_path / "w")
