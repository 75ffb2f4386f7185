"""The teacher of a distillation: any model folder, in bfloat16."""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxvid.config import differences
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.models import Params, abstract_model, make_model_config
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.preprocessing import read_preprocessing
from jaxvid.training.steps import Teacher


def load_teacher(config, labels: list[str], mesh) -> tuple[Teacher | None, Params | None]:
    """Loads `config.distill.teacher`.

    Args:
        config: A whole config; its `distill` names the folder, the weight and the temperature.
        labels: The data's classes, in order.
        mesh: The teacher's weights are laid over it as the student's are.

    Returns:
        The teacher and its weights in bfloat16; None twice where there is none.

    Raises:
        InputError: It is not a model folder; its preprocessing differs from the student's; or its
            class labels or their order differ from the data's.
    """
    distill = config.distill
    if not distill.teacher:
        return None, None
    card = model_card.load_card(distill.teacher)
    model_config = make_model_config(**{**card["config"], "dtype": "bfloat16"})
    names = ("num_classes", "num_frames", "image_size")
    found = differences(
        {name: getattr(model_config, name) for name in names},
        {name: config.model[name] for name in names},
        there="in the teacher",
        here="in the config",
    )
    if found:
        raise InputError(
            f"distill.teacher={distill.teacher} has other clips or classes: "
            f"{'; '.join(found.values())}"
        )
    model_card.check_labels(card["labels"], labels, distill.teacher)
    how = read_preprocessing(card, Path(distill.teacher) / "model.json")
    graphdef, abstract = abstract_model(model_config)
    params = model_folder.load_params(distill.teacher, sharding.with_sharding(abstract, mesh))
    halve = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree))
    teacher = Teacher(
        graphdef=graphdef,
        mean=how["mean"],
        std=how["std"],
        weight=distill.weight,
        temperature=distill.temperature,
    )
    return teacher, halve(params)


def check_distill(distill) -> None:
    """Refuses a config's `distill` that has an impossible value.

    Raises:
        InputError: Names the field, its value and what is possible.
    """
    if not 0 <= distill.weight <= 1:
        raise InputError(f"distill.weight={distill.weight}: must be 0 to 1")
    if distill.temperature <= 0:
        raise InputError(f"distill.temperature={distill.temperature}: must be above 0")
