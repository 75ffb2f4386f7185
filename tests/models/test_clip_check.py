"""Messages of a network that is called with something other than normalised clips."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxvid
from jaxvid.errors import InputError

CLIPS = np.zeros((1, 8, 64, 64, 3), np.float32)


@pytest.fixture(scope="module")
def models():
    return [jaxvid.create_model(name, width=16, depth=1) for name in ("xvit_tiny", "stam_tiny")]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (CLIPS.astype(np.uint8), r"got uint8; make them from frames with jaxvid.make_transform"),
        (CLIPS.transpose(0, 4, 1, 2, 3), r"as in PyTorch; use video.transpose\(0, 2, 3, 4, 1\)"),
        (CLIPS.transpose(0, 1, 4, 2, 3), r"\(b, t, c, h, w\); use video.transpose\(0, 1, 3, 4, 2"),
        (CLIPS[0], r"add the batch axis with video\[None\]"),
        (CLIPS[..., :2], r"expected clips of shape \(b, t, h, w, 3\), got \(1, 8, 64, 64, 2\)"),
        (CLIPS[0, 0, 0], r"got \(64, 3\)"),
        (torch.zeros(1, 3, 8, 64, 64), r"use numpy.asarray\(video\).transpose\(0, 2, 3, 4, 1\)"),
        (torch.zeros(1, 8, 64, 64, 3), "got Tensor; convert it with numpy.asarray"),
        ("clip.mp4", "got str; convert it"),
    ],
)
def test_wrong_arrays_are_refused_with_the_fix(models, video, message):
    for model in models:
        for function in (model, model.features, model.attention):
            with pytest.raises(InputError, match=message):
                function(jnp.asarray(video) if isinstance(video, np.ndarray) else video)
