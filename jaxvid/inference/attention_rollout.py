"""Attention rollout: how much attention each patch and each frame receives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.clips.clip import ClipSpec
from jaxvid.errors import printable
from jaxvid.inference.clip_frames import find_crop_box
from jaxvid.inference.results import Result, describe_class
from jaxvid.models import ModelConfig, family_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRollout(Result):
    """A clip with the attention that its patches and frames receive, and its predicted classes.

    Attributes:
        name: File name of the video, or its name as in `Prediction`.
        frames: Uncropped, upright frames `(t, h, w, c)` uint8.
        indices: Frame numbers in the video `(t,)`.
        times: Time of each frame in seconds `(t,)`, relative to the video's first frame; None if
            unknown.
        crop_box: Edges of the network's crop: top, left, bottom, right, relative to the frame's
            height and width.
        patch_attention: Attention that each patch receives `(t, rows, columns)`. The patches of a
            frame sum to 1.
        frame_attention: Attention that each frame receives `(t,)`. The frames sum to 1.
        top: The most likely classes and their probabilities, in descending order.
        notes: Explanations that are shown below the frames, one sentence each.
    """

    name: str
    frames: np.ndarray
    indices: np.ndarray
    times: np.ndarray | None
    crop_box: tuple[float, float, float, float]
    patch_attention: np.ndarray
    frame_attention: np.ndarray
    top: list[tuple[str, float]]
    notes: list[str]

    def __str__(self) -> str:
        """Return the classes and the attention to each frame, one per line."""
        lines = [printable(self.name), *(describe_class(*pair) for pair in self.top)]
        for row in self.table_rows():
            time = "" if row["time"] is None else f", {row['time']:.2f} s"
            share = f"{100 * row['frame_attention']:5.1f} % of the attention"
            lines.append(f"  {share}  frame {row['frame']}{time}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return `{"video", "top", "crop_box", "frames"}`.

        Each frame has `frame` (its number), `time`, `frame_attention` and `patch_attention`.
        """
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        rows = zip(self.table_rows(), self.patch_attention.tolist(), strict=True)
        return {
            "video": self.name,
            "top": top,
            "crop_box": [float(edge) for edge in self.crop_box],
            "frames": [
                {name: row[name] for name in ("frame", "time", "frame_attention")}
                | {"patch_attention": patches}
                for row, patches in rows
            ],
        }

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row per frame: `video`, `frame`, `time` and `frame_attention`."""
        times = [None] * len(self.indices) if self.times is None else self.times.tolist()
        columns = zip(self.indices.tolist(), times, self.frame_attention.tolist(), strict=True)
        return [
            {"video": self.name, "frame": frame, "time": time, "frame_attention": share}
            for frame, time, share in columns
        ]


def roll_out(weights: jax.Array) -> jax.Array:
    """Compute the attention rollout of the class token (arXiv:2005.00928, section 3).

    Each block's attention is averaged over its heads, and then averaged with the identity matrix,
    which represents the residual connection. The matrices of all blocks are multiplied; only the
    class token's row is computed.

    Args:
        weights: Attention weights `(blocks, ..., k, n, m)`, m ≥ n. Rows are queries; token 0 is the
            class token. Keys after the n-th are summary tokens: they are dropped, and the rows are
            renormalised.

    Returns:
        `(..., n - 1)`: the share of attention that each of the other tokens receives. The shares
        sum to 1.
    """
    n = weights.shape[-2]
    weights = weights.mean(axis=-3)[..., :n]  # (blocks ... n n)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    row = jnp.zeros(weights.shape[1:-1]).at[..., 0].set(1)  # (... n)
    for block in weights[::-1]:
        row = 0.5 * row + 0.5 * jnp.einsum("...i,...ij->...j", row, block, precision="highest")
    total = row[..., 1:].sum(axis=-1, keepdims=True)
    # A class token that attends only to itself has a total of 0.
    return jnp.where(total > 0, row[..., 1:] / total, 1 / (n - 1))


def make_rollout(
    clip: dict[str, Any],
    attention: dict[str, np.ndarray],
    top: list[tuple[str, float]],
    spec: ClipSpec,
    config: ModelConfig,
) -> AttentionRollout:
    """Combine a clip with the attention rollouts of a network.

    Args:
        clip: From `read_clip`.
        attention: As in `describe_attention`.
        top: The most likely classes and their probabilities.
        spec: Resize and crop of the clip.
        config: The network's config.
    """
    return AttentionRollout(
        **clip,
        crop_box=find_crop_box(*clip["frames"].shape[1:3], spec),
        top=top,
        **describe_attention(attention, spec, config),
    )


def describe_attention(
    attention: dict[str, np.ndarray], spec: ClipSpec, config: ModelConfig
) -> dict[str, Any]:
    """Return the fields of `AttentionRollout` that describe the attention.

    Args:
        attention: Rollout of each attention of the network: `spatial` `(t, patches)` and, unless
            the network averages its frames, `temporal` `(t,)`.
        spec: Crop of the clip.
        config: The network's config.

    Returns:
        `patch_attention`, `frame_attention` and `notes`.
    """
    side = spec.crop // config.patch_size
    patch_attention = attention["spatial"].reshape(-1, side, side)
    t = len(patch_attention)
    frame_attention = attention.get("temporal", np.full(t, 1 / t))
    if "temporal" in attention:
        bars = "attention to each frame; the line marks a uniform share"
    else:
        bars = "this network averages its frames, so that all have the same weight"
    peak = f"{patch_attention.max() * side**2:.1f} times a uniform share"
    notes = [f"Bars: {bars}.", f"Heat: attention rollout; the strongest patch receives {peak}."]
    if family_of(config).mixes_frames(config):
        notes.append("This network's attention mixes frames: the heat is approximate in time.")
    return {
        "patch_attention": patch_attention,
        "frame_attention": frame_attention,
        "notes": notes,
    }
