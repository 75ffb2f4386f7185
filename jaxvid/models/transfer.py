"""Transfer weights to a network of the same family that differs in sizes, classes or parts.

The networks may differ in their resolution, number of frames, number of classes, and in optional
parts such as the temporal head. Weight names are those of `jaxvid.models.split_params`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.models.family import Family
from jaxvid.models.resize import resize_pos_embed, resize_time

Shape = tuple[int, ...]


@dataclasses.dataclass
class TransferPlan:
    """What happens to each weight of a model folder and of the new network.

    Every weight of the new network is in `loaded`, `resized` or `reinitialised`, or in a problem.
    Every weight of the folder is in `loaded`, `resized` or `unused`, is replaced by a
    reinitialised one, or is in a problem.

    Attributes:
        loaded: Weights that are copied unchanged.
        resized: Weight → description of its resize.
        reinitialised: Part and reason → its weights, which keep their fresh values.
        unused: Part and reason → its weights, which the new network does not have.
        problems: Reasons why a transfer is impossible. Identical layers with the same problem share
            one reason.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)
    reinitialised: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unused: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def describe(self) -> list[str]:
        """Return the plan as lines for a log."""
        parts = [("reinitialised", self.reinitialised), ("unused", self.unused)]
        return [
            f"loaded: {_count(self.loaded)}",
            *(f"resized: {name}: {description}" for name, description in self.resized.items()),
            *(
                f"{title}: {reason} ({_count(names)})"
                for title, part in parts
                for reason, names in part.items()
            ),
        ]


def plan_transfer(
    family: Family, source: Mapping[str, jax.Array], fresh: Mapping[str, jax.Array]
) -> TransferPlan:
    """Decide what happens to each weight of a model folder and of the new network.

    Args:
        family: The family of both networks.
        source: The folder's weights; only their shapes are read.
        fresh: The new network's initial weights; only their shapes are read.
    """
    plan = TransferPlan()
    problems = {}  # its keys are an ordered set
    for name, leaf in fresh.items():
        if name not in source:
            if part := _missing_part(family, name, source):
                plan.reinitialised.setdefault(f"{part}: not in the folder", []).append(name)
            else:
                problems[f"{_layer(family, name)}: not in the folder"] = None
            continue
        old, new = tuple(source[name].shape), tuple(leaf.shape)
        if old == new:
            plan.loaded.append(name)
        elif description := _describe_resize(family, name, old, new):
            plan.resized[name] = description
        elif name.startswith(family.class_heads) and old[:-1] == new[:-1]:
            head = name.rpartition(".")[0]
            reason = f"{head}: {old[-1]} classes in the folder, {new[-1]} in the model"
            plan.reinitialised.setdefault(reason, []).append(name)
        else:
            abbreviated = re.sub(_layer_pattern(family), r"\1.*.", name)
            problems[f"{abbreviated}: {old} in the folder, {new} in the model"] = None
    for name in source:
        if name in fresh:
            continue
        if part := _missing_part(family, name, fresh):
            plan.unused.setdefault(f"{part}: not in the model", []).append(name)
        else:
            problems[f"{_layer(family, name)}: not in the model"] = None
    plan.problems = list(problems)
    return plan


def reinitialise_head(family: Family, plan: TransferPlan, reason: str) -> None:
    """Change a plan so that the class head keeps its initial weights.

    Args:
        family: The family of both networks.
        plan: The result of `plan_transfer`.
        reason: Reason that is written to the log.
    """
    for name in [name for name in plan.loaded if name.startswith(family.class_heads)]:
        plan.loaded.remove(name)
        head = name.rpartition(".")[0]
        plan.reinitialised.setdefault(f"{head}: {reason}", []).append(name)


def transfer_params(
    family: Family,
    plan: TransferPlan,
    source: Mapping[str, jax.Array],
    fresh: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """Return the weights that the new network starts from.

    Args:
        family: The family of both networks.
        plan: The result of `plan_transfer` for the same weights, without problems.
        source: The folder's weights.
        fresh: The new network's initial weights; they are not changed.

    Returns:
        Weights with the names, shapes and shardings of `fresh`.
    """
    params = {name: jax.device_put(source[name], fresh[name].sharding) for name in plan.loaded}
    for name in plan.resized:
        embed, rows = jnp.asarray(source[name]), fresh[name].shape[1]
        if name in family.frame_embeddings:
            leading_rows = family.frame_embeddings[name].leading_rows
            embed = resize_time(embed, rows - leading_rows, leading_rows=leading_rows)
        else:
            side = math.isqrt(rows - 1)
            embed = resize_pos_embed(embed, (side, side))
        # Through the host, because the target sharding may span processes.
        params[name] = jax.device_put(np.asarray(embed), fresh[name].sharding)
    return {name: params.get(name, leaf) for name, leaf in fresh.items()}


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' * (len(names) != 1)}"


def _describe_resize(family: Family, name: str, old: Shape, new: Shape) -> str | None:
    """Describe how an embedding is resized.

    Returns:
        The description, or None if the weight is not an embedding or its width differs.
    """
    if name not in (family.pos_embed, *family.frame_embeddings) or old[2:] != new[2:]:
        return None
    if name in family.frame_embeddings:
        leading_rows = family.frame_embeddings[name].leading_rows
        return f"{old[1] - leading_rows} → {new[1] - leading_rows} frames, linearly"
    old_side, new_side = (math.isqrt(shape[1] - 1) for shape in (old, new))
    return f"{old_side}×{old_side} → {new_side}×{new_side} patches, bicubically"


def _missing_part(family: Family, name: str, others: Iterable[str]) -> str | None:
    """Find the largest optional part that contains a weight and is completely missing in `others`.

    Returns:
        The path of the part, e.g. `aggregate`, or None if there is no such part.
    """
    for pattern in family.optional_parts:
        match = re.match(pattern, name)
        if match and not any(other.startswith(match[0]) for other in others):
            return match[0].removesuffix(".")
    return None


def _layer(family: Family, name: str) -> str:
    """Return the layer that a weight belongs to, e.g. `blocks.2`, or the weight itself."""
    match = re.search(_layer_pattern(family), name)
    return name[: match.end() - 1] if match else name


def _layer_pattern(family: Family) -> str:
    return rf"\b({'|'.join(family.layer_lists)})\.(\d+)\."
