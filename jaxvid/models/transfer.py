"""Changes to weights that let a model start or run where it was not trained.

Another resolution, another number of frames or classes, a temporal part more or less. Weights go
by the names that `jaxvid.models.split_params` gives them.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

CLASS_HEADS = ("head.", "consensus.mlp_head.4.", "new_fc.")  # as wide as there are classes
HEADS = ("aggregate.", "consensus.", *CLASS_HEADS)  # all that comes after the image ViT
GRIDS = ("pos_embed", "base_model.pos_embed")
FRAMES = {"aggregate.pos_embed": 1, "base_model.temp_embed": 0}  # rows before the frames' rows
# What a network may have or lack as a whole, from the largest to the smallest.
PARTS = (
    r"aggregate\.",
    r"aggregate\.transformer_enc\.layers\.\d+\.",
    r"consensus\.",
    r"consensus\.temporal_encoder\.\d+\.",
    r"new_fc\.",
    r"base_model\.temp_embed",
)
_LAYER = r"\b(blocks|layers|temporal_encoder)\.(\d+)\."


def resize_pos_embed(pos_embed: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resizes the patch grid of a positional embedding bicubically, as PyTorch does.

    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: a = -0.75, half-pixel
    centres, no antialiasing. The class token's row is kept.

    Args:
        pos_embed: `(1, 1 + s·s, d)`: the class token, then a square grid in row-major order.
        grid: Rows and columns of the new patch grid.

    Returns:
        `(1, 1 + rows·columns, d)`; `pos_embed` itself where the grid does not change.
    """
    _, n, d = pos_embed.shape
    side = round((n - 1) ** 0.5)
    if grid == (side, side):
        return pos_embed
    cls_row, patches = pos_embed[:, :1], pos_embed[:, 1:].reshape(1, side, side, d)
    patches = jax.image.resize(
        patches, (1, *grid, d), jax.image.ResizeMethod.CUBIC_PYTORCH, antialias=False
    )
    return jnp.concatenate([cls_row, patches.reshape(1, -1, d)], axis=1)  # (1 n d)


def resize_time(embed: jax.Array, num_frames: int, *, kept: int) -> jax.Array:
    """Resizes the frames' rows of an embedding linearly: half-pixel centres, no antialiasing.

    Beyond the first and the last centre the nearest row repeats, so that one frame's row is
    everyone's.

    Args:
        embed: `(1, kept + t, ...)`.
        num_frames: The new t.
        kept: Rows before the frames' rows, e.g. a class token's; they stay.

    Returns:
        `(1, kept + num_frames, ...)`.
    """
    shape = (1, num_frames, *embed.shape[2:])
    frames = jax.image.resize(embed[:, kept:], shape, "linear", antialias=False)
    return jnp.concatenate([embed[:, :kept], frames], axis=1)


@dataclasses.dataclass
class TransferPlan:
    """What becomes of the weights of a model folder (there) in another model (here).

    Every weight here is in one of `loaded`, `resized` and `reinitialised`, or in a problem; every
    weight there is in `loaded`, `resized` or `unused`, is replaced by a reinitialised one, or is
    in a problem.

    Attributes:
        loaded: Weights that are taken over as they are.
        resized: Weight → how.
        reinitialised: Part and why → its weights, which keep fresh values.
        unused: Part and why → its weights, which have no place here.
        problems: What makes a fit impossible, one line for all layers alike.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    reinitialised: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unused: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def describe(self) -> list[str]:
        """Lines for a log."""
        parts = [("reinitialised", self.reinitialised), ("unused", self.unused)]
        return [
            f"loaded: {_count(self.loaded)}",
            *(f"resized: {name}: {how}" for name, how in self.resized.items()),
            *(
                f"{what}: {why} ({_count(names)})"
                for what, part in parts
                for why, names in part.items()
            ),
        ]


def plan_transfer(found: dict[str, jax.Array], fresh: dict[str, jax.Array]) -> TransferPlan:
    """Decides what becomes of a folder's weights in another model of the same family.

    Args:
        found: The folder's weights; only their shapes are read.
        fresh: The newly initialised weights of the wanted model; likewise.
    """
    fit, problems = TransferPlan(), {}
    for name, leaf in fresh.items():
        if name not in found:
            if part := _missing_part(name, found):
                fit.reinitialised.setdefault(f"{part}: absent in the folder", []).append(name)
            else:
                problems[f"{_layer(name)}: absent there"] = None
            continue
        there, here = tuple(found[name].shape), tuple(leaf.shape)
        if there == here:
            fit.loaded.append(name)
        elif how := _how_to_resize(name, there, here):
            fit.resized[name] = how
        elif name.startswith(CLASS_HEADS) and there[:-1] == here[:-1]:
            head = name.rpartition(".")[0]
            why = f"{head}: {there[-1]} classes there, {here[-1]} here"
            fit.reinitialised.setdefault(why, []).append(name)
        else:
            alike = re.sub(_LAYER, r"\1.*.", name)
            problems[f"{alike}: {there} there, {here} here"] = None
    for name in found:
        if name in fresh:
            continue
        if part := _missing_part(name, fresh):
            fit.unused.setdefault(f"{part}: absent in the new model", []).append(name)
        else:
            problems[f"{_layer(name)}: absent here"] = None
    fit.problems = list(problems)
    return fit


def transfer_params(
    fit: TransferPlan, found: dict[str, jax.Array], fresh: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The weights that a model starts from.

    Args:
        fit: As `plan_fit` gives it for the same weights, without problems.
        found: The folder's weights.
        fresh: The newly initialised weights of the wanted model; they stay as they are.

    Returns:
        Weights of the names, shapes and shardings of `fresh`.
    """
    params = {name: jax.device_put(found[name], fresh[name].sharding) for name in fit.loaded}
    for name in fit.resized:
        embed, rows = jnp.asarray(found[name]), fresh[name].shape[1]
        if name in FRAMES:
            kept = FRAMES[name]
            embed = resize_time(embed, rows - kept, kept=kept)
        else:
            side = math.isqrt(rows - 1)
            embed = resize_pos_embed(embed, (side, side))
        # By way of the host, since the new place may span processes.
        params[name] = jax.device_put(np.asarray(embed), fresh[name].sharding)
    return {name: params.get(name, leaf) for name, leaf in fresh.items()}


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' * (len(names) != 1)}"


def _how_to_resize(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> str | None:
    """How an embedding's rows are resized; None for what is none or has another width."""
    if name not in (*GRIDS, *FRAMES) or there[2:] != here[2:]:
        return None
    if name in FRAMES:
        return f"{there[1] - FRAMES[name]} → {here[1] - FRAMES[name]} frames, linearly"
    old, new = (math.isqrt(shape[1] - 1) for shape in (there, here))
    return f"{old}×{old} → {new}×{new} patches, bicubically"


def _missing_part(name: str, others: dict) -> str | None:
    """The largest part around a weight that `others` lack as a whole; None: they have some of it.

    `aggregate.transformer_enc.layers.2.norm1.scale` → `aggregate` or
    `aggregate.transformer_enc.layers.2`.
    """
    for pattern in PARTS:
        match = re.match(pattern, name)
        if match and not any(other.startswith(match[0]) for other in others):
            return match[0].removesuffix(".")
    return None


def _layer(name: str) -> str:
    """The layer that a weight belongs to, e.g. `base_model.blocks.2`; else the weight itself."""
    match = re.search(_LAYER, name)
    return name[: match.end() - 1] if match else name
