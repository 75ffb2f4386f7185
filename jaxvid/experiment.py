"""A config as frozen dataclasses: programs resolve it once and pass its parts on."""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxvid.config import check_names
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.pipeline import LoaderConfig
from jaxvid.data.sources import DatasetConfig
from jaxvid.distributed.sharding import MeshShape, check_batch_size
from jaxvid.errors import InputError
from jaxvid.evaluation.protocol import EvalProtocol
from jaxvid.models import ModelConfig, make_model_config
from jaxvid.storage.preprocessing import Preprocessing
from jaxvid.training.checkpoint import CheckpointPolicy
from jaxvid.training.distillation import DistillConfig
from jaxvid.training.optim import OptimizerConfig
from jaxvid.training.steps import Recipe

Config = ConfigDict
TOP_FIELDS = ("batch_size", "num_epochs", "deterministic", "init_from", "log_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A resolved config.

    Attributes:
        fields: The complete config as a nested dict, which is saved, and compared when the run is
            resumed.
        batch_size: Clips per training step, over all devices and processes.
        num_epochs: Length of the training.
        deterministic: Whether results on GPUs are bit-identical between executions.
        init_from: Model folder with the initial weights of a training or the weights to evaluate;
            empty: none.
        log_steps: Training steps per row of `metrics.jsonl`.
        stall_seconds: Seconds after which a stage that blocks is logged with its name.
        max_failed_share: Share of undecodable training videos above which training stops.
        mesh: Sizes of the device mesh.
        model: The network's config.
        dataset: Source of the videos and labels.
        loader: Threads and processes that decode videos.
        train_clips: Preprocessing and augmentation of training clips.
        protocol: The evaluation protocol, including the preprocessing.
        recipe: Options of the training step. The names of frozen weights are not yet known, as they
            depend on the network.
        optimizer: The optimizer and its schedule.
        distill: Knowledge distillation; without a teacher it is off.
        checkpoints: When checkpoints are saved, and how many are kept.

    Raises:
        InputError: A field has an impossible value.
    """

    fields: dict[str, Any]
    batch_size: int
    num_epochs: float
    deterministic: bool
    init_from: str
    log_steps: int
    stall_seconds: float
    max_failed_share: float
    mesh: MeshShape
    model: ModelConfig
    dataset: DatasetConfig
    loader: LoaderConfig
    train_clips: ClipSpec
    protocol: EvalProtocol
    recipe: Recipe
    optimizer: OptimizerConfig
    distill: DistillConfig
    checkpoints: CheckpointPolicy

    def __post_init__(self):
        for name in ("num_epochs", "log_steps"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: must be above 0")
        if self.stall_seconds <= 0:
            raise InputError(f"data.stall_seconds={self.stall_seconds}: must be above 0")

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of clips in evaluation."""
        return self.protocol.preprocessing

    def with_color_matrix(self, color_matrix: str) -> "Experiment":
        """Return this experiment with a model card's color matrix if the config says `auto`."""
        if self.dataset.color_matrix != "auto":
            return self
        preprocessing = dataclasses.replace(self.preprocessing, color_matrix=color_matrix)
        return dataclasses.replace(
            self,
            dataset=dataclasses.replace(self.dataset, color_matrix=color_matrix),
            train_clips=dataclasses.replace(self.train_clips, color_matrix=color_matrix),
            protocol=dataclasses.replace(self.protocol, preprocessing=preprocessing),
        )


def resolve(config: Config) -> Experiment:
    """Turn a config into frozen dataclasses, and check it.

    Args:
        config: A complete config, as made by the files in `configs/`.

    Raises:
        InputError: A field was renamed or has an impossible value.
    """
    check_names(config.to_dict())
    model = make_model_config(**config.model)
    dataset = DatasetConfig(**_section(config.data, DatasetConfig))
    preprocessing = _make_preprocessing(config, model, dataset)
    fields = config.to_dict()
    # Numbers instead of names, so that equal values are equal when a run is resumed.
    fields["data"] |= {name: preprocessing.to_json()[name] for name in ("mean", "std")}
    return Experiment(
        fields=fields,
        **{name: config[name] for name in TOP_FIELDS},
        stall_seconds=config.data.stall_seconds,
        max_failed_share=config.data.max_failed_share,
        mesh=MeshShape(**config.mesh),
        model=model,
        dataset=dataset,
        loader=LoaderConfig(**_section(config.data, LoaderConfig)),
        train_clips=_make_train_clips(config, preprocessing),
        protocol=EvalProtocol(
            preprocessing=preprocessing,
            score=config.eval.score,
            dtype=config.eval.dtype,
            batch_size=config.eval.batch_size,
            every_epochs=config.eval.every_epochs,
        ),
        recipe=Recipe(mean=preprocessing.mean, std=preprocessing.std, **_section(config, Recipe)),
        optimizer=OptimizerConfig(**config.optimizer),
        distill=DistillConfig(**config.distill),
        checkpoints=CheckpointPolicy(
            every_epochs=config.checkpoint_every_epochs, keep=config.checkpoint_keep
        ),
    )


def _section(section: ConfigDict, kind: type) -> dict[str, Any]:
    """Return the fields of a config section that are also fields of the dataclass `kind`."""
    values = section.to_dict()
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: values[name] for name in names if name in values}


def _make_preprocessing(
    config: ConfigDict, model: ModelConfig, dataset: DatasetConfig
) -> Preprocessing:
    return Preprocessing(
        num_frames=model.num_frames,
        crop=model.image_size,
        short_side=config.eval.short_side,
        sampling=config.data.sampling,
        sampling_rate=config.data.sampling_rate,
        by_time=config.data.by_time,
        resize=config.data.resize,
        color_matrix=dataset.used_color_matrix,
        num_clips=config.eval.num_clips,
        num_crops=config.eval.num_crops,
        mean=config.data.mean,
        std=config.data.std,
    )


def _make_train_clips(config: ConfigDict, preprocessing: Preprocessing) -> ClipSpec:
    data = config.data
    low = data.short_side
    return dataclasses.replace(
        preprocessing.spec,
        num_clips=1,
        num_crops=1,
        train_crop=data.train_crop,
        train_short_side=(low, max(low, data.short_side_max)),
        flip_prob=data.flip_prob,
        augment=data.augment,
        randaugment_layers=data.randaugment_layers,
        randaugment_magnitude=data.randaugment_magnitude,
    )


def check_batch_sizes(experiment: Experiment, mesh: Mesh) -> None:
    """Refuse batch sizes of training and evaluation that cannot be divided over the mesh.

    Raises:
        InputError: A batch size is not a positive multiple of the required number, or
            `accumulate_steps` is below 1.
    """
    check_batch_size("batch_size", experiment.batch_size, mesh)
    num_parts = experiment.recipe.accumulate_steps
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * max(1, num_parts)
    if num_parts < 1 or experiment.batch_size % multiple:
        raise InputError(
            f"accumulate_steps={num_parts}, batch_size={experiment.batch_size}: accumulate_steps "
            f"must be at least 1, and batch_size must be a multiple of {multiple} "
            "(mesh.data · mesh.fsdp · accumulate_steps)"
        )
    check_batch_size("eval.batch_size", experiment.protocol.batch_size, mesh)
