"""The teacher of knowledge distillation: a model folder, loaded in bfloat16."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxvid.config import differences
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.models import ModelConfig, Params, make_model_config
from jaxvid.storage import model_card, model_folder
from jaxvid.storage.preprocessing import read_preprocessing
from jaxvid.training.steps import Teacher
from jaxvid.weights.resolve import resolve_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation.

    Attributes:
        teacher: The teacher's model folder; empty: no distillation.
        weight: Weight of the distillation loss, 0 to 1.
        temperature: Divisor of the logits of teacher and student.

    Raises:
        InputError: A field has an impossible value.
    """

    teacher: str = ""
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise InputError(f"distill.weight={self.weight}: must be 0 to 1")
        if self.temperature <= 0:
            raise InputError(f"distill.temperature={self.temperature}: must be above 0")


def load_teacher(
    distill: DistillConfig, student: ModelConfig, labels: list[str], mesh: Mesh
) -> tuple[Teacher | None, Params | None]:
    """Load the teacher.

    Args:
        distill: The teacher's folder, the weight of the loss and the temperature.
        student: The student's config.
        labels: The data's class labels, in order.
        mesh: The device mesh. The teacher's weights are sharded by the same rules as the student's.

    Returns:
        The teacher and its weights in bfloat16; `(None, None)` without distillation.

    Raises:
        InputError: `distill.teacher` is not a model; the teacher's number of frames, image size or
            number of classes differs from the student's; or its class labels or their order differ
            from the data's.
    """
    if not distill.teacher:
        return None, None
    folder = collectives.raise_on_all_processes(resolve_model, distill.teacher)
    card = model_card.load_card(folder)
    model_config = make_model_config(**{**card["config"], "dtype": "bfloat16"})
    names = ("num_classes", "num_frames", "image_size")
    changed = differences(
        {name: getattr(model_config, name) for name in names},
        {name: getattr(student, name) for name in names},
        there="in the teacher",
        here="in the config",
    )
    if changed:
        raise InputError(
            f"distill.teacher={distill.teacher}: its clips or classes differ from the student's "
            f"({'; '.join(changed.values())}); choose another teacher or change the config"
        )
    model_card.check_labels(card["labels"], labels, folder)
    preprocessing = read_preprocessing(card, Path(folder) / "model.json")
    graphdef, abstract = model_folder.abstract_sharded_model(model_config, mesh)
    params = model_folder.load_params(folder, abstract)
    # Complete on every device: in contrast to the student, it has no gradients and moments.
    gathered = sharding.without_fsdp(jax.tree.map(lambda leaf: leaf.sharding, abstract))
    to_bfloat16 = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree),
        out_shardings=gathered,
    )
    teacher = Teacher(
        graphdef=graphdef,
        mean=preprocessing.mean,
        std=preprocessing.std,
        weight=distill.weight,
        temperature=distill.temperature,
    )
    return teacher, to_bfloat16(params)
