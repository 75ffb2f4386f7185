"""Tests of jaxvid/training/loop.py that need a slow device."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.distributed.sharding import MeshShape, make_mesh
from jaxvid.training import loop
from jaxvid.training.metric_window import MetricWindow


class SlowDevice:
    """Batches and a training step that takes the device far longer than Python.

    Attributes:
        running: For each batch, whether the device still computed the step before it when the
            batch was already on the device.
    """

    def __init__(self):
        self.running, self._newest = [], None
        self._multiply = jax.jit(
            lambda x: jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x), x).mean()
        )
        self._matrix = jnp.full((512, 512), 1e-3)
        self._multiply(self._matrix).block_until_ready()

    def __next__(self):
        """Return a batch of empty clips."""
        return {
            "video": np.zeros((8, 2, 4, 4, 3), np.uint8),
            "label": np.zeros(8, np.int32),
            "mask": np.ones(8, bool),
            "id": np.zeros((8, 4), np.uint8),
            "error": np.zeros((8, 4), np.uint8),
        }

    def train_step(self, state, batch):
        jax.block_until_ready(batch)
        if self._newest is not None:
            self.running.append(not self._newest.is_ready())
        self._newest = self._multiply(self._matrix + 0 * state["step"])
        metrics = {"loss": self._newest, "grad_norm": self._newest}
        return {"step": self._newest}, metrics


def test_batches_are_transferred_while_the_device_computes_earlier_steps():
    device = SlowDevice()
    window = MetricWindow()
    metrics = SimpleNamespace(
        window=window,
        advance=lambda: None,
        add=lambda step, values, ids, _: window.add(step, values, ids),
    )
    fields = SimpleNamespace(
        batches=device,
        train_step=device.train_step,
        mesh=make_mesh(MeshShape()),
        metrics=metrics,
        signals=SimpleNamespace(received=None),
        stalls=mock.MagicMock(),
        trace=mock.MagicMock(),
    )
    state = {"step": jnp.zeros(())}
    for step in range(6):
        state = loop._do_step(fields, state, step, is_first=False)
    assert device.running == [True] * 5
