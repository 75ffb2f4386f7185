"""The memory of a training step, estimated without data."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from configs import motion
from jaxvid import plan
from jaxvid.distributed import setup
from jaxvid.distributed.sharding import MeshShape
from jaxvid.errors import InputError
from jaxvid.experiment import resolve


@pytest.fixture(scope="module")
def experiment():
    config = motion.get_config().unlock()
    config.model.update({"depth": 2, "image_size": 32, "num_frames": 4})
    config.data.update({"short_side": 36})
    config.eval.update({"short_side": 36})
    config.model.head = "mean"
    config.model.temporal_embedding_frames = 4
    config.model.shift_segment = 4
    return resolve(config.lock())


@pytest.mark.full
def test_memory_is_split_over_the_mesh(experiment):
    shards = {}
    for axis in ("data", "fsdp"):
        sizes = {"data": 1, "fsdp": 1, "tensor": 1, axis: 8}
        shards[axis] = plan.measure(
            dataclasses.replace(experiment, mesh=MeshShape(**sizes)), batch_size=16
        )
    assert shards["data"].weights == 4 * experiment.model.num_params()
    assert shards["fsdp"].weights < shards["data"].weights / 7
    assert shards["fsdp"].optimizer < shards["data"].optimizer / 7
    clips = 2  # per device
    assert shards["data"].batch == shards["fsdp"].batch == clips * (4 * 32 * 32 * 3 + 4 + 1)
    parts = dataclasses.asdict(shards["data"])
    assert shards["data"].total == sum(parts.values())
    assert min(parts.values()) > 0
    assert json.dumps(parts)


@pytest.mark.full
def test_the_largest_batch_fits_and_a_larger_one_does_not(experiment):
    limit = plan.measure(experiment, 32).total
    batch_size, memory = plan.largest_batch(experiment, limit)
    assert memory.total <= limit
    assert batch_size >= 32 or plan.measure(experiment, batch_size + 8).total > limit
    assert plan.largest_batch(experiment, 1000) is None


def test_the_description_contains_all_figures(experiment):
    text = plan.describe(experiment, memory_gb=1e-6)
    assert f"{experiment.model.num_params() / 1e6:.2f} M parameters" in text
    assert "mesh data 8, fsdp 1, tensor 1; cpu backend, float32" in text
    assert "batch size 32: " in text
    assert "no batch fits into 1e-06 GB per device" in text
    distill = dataclasses.replace(experiment.distill, teacher="x")
    with pytest.raises(InputError, match="distill.teacher: --mode plan does not support"):
        plan.describe(dataclasses.replace(experiment, distill=distill))


def test_a_cpu_gets_as_many_devices_as_the_mesh(monkeypatch):
    updates = {}
    monkeypatch.setattr(setup.jax, "config", SimpleNamespace(update=updates.__setitem__))
    size = MeshShape(data=2, fsdp=3, tensor=2).size
    setup.provide_cpu_devices(size)  # XLA_FLAGS of the tests already sets the number
    assert not updates
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    setup.provide_cpu_devices(MeshShape().size)
    assert not updates
    setup.provide_cpu_devices(size)
    assert updates == {"jax_num_cpu_devices": 12}
