"""A config as frozen dataclasses: programs resolve it once and pass its parts on."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxvid.config import CHOSEN, check_names
from jaxvid.data.clips.clip import ClipSpec
from jaxvid.data.pipeline import LoaderConfig
from jaxvid.data.sources import DatasetConfig, open_dataset
from jaxvid.data.video_order import VideoOrder
from jaxvid.distributed.collectives import gather
from jaxvid.distributed.sharding import MeshShape, check_batch_size, make_mesh
from jaxvid.errors import InputError
from jaxvid.evaluation.protocol import EvalProtocol
from jaxvid.models import ModelConfig, make_model_config
from jaxvid.storage.dtype_choice import AUTO, DtypeChoice, choose_dtype
from jaxvid.storage.preprocessing import Preprocessing
from jaxvid.training import schedule_choice
from jaxvid.training.checkpoint import CheckpointPolicy
from jaxvid.training.distillation import DistillConfig
from jaxvid.training.losses import LossConfig
from jaxvid.training.optim import OptimizerConfig
from jaxvid.training.steps import Recipe

Config = ConfigDict
TOP_FIELDS = ("batch_size", "num_epochs", "deterministic", "init_from", "log_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A resolved config.

    Some fields may be `CHOSEN` until `choose_schedule` replaces them. The model's dtype may be
    `auto` in `fields`, and a placeholder in `model`, until `choose_model_dtype` replaces both.

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
        order: Order of the training videos, before `VideoOrder.for_videos`.
        loader: Threads and processes that decode videos.
        train_clips: Preprocessing and augmentation of training clips.
        protocol: The evaluation protocol, including the preprocessing.
        loss: The loss of the labels.
        recipe: Options of the training step. The names of frozen weights and the class weights are
            not yet known, as they depend on the network and the data.
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
    order: VideoOrder
    loader: LoaderConfig
    train_clips: ClipSpec
    protocol: EvalProtocol
    loss: LossConfig
    recipe: Recipe
    optimizer: OptimizerConfig
    distill: DistillConfig
    checkpoints: CheckpointPolicy

    def __post_init__(self):
        for name in ("num_epochs", "log_steps"):
            value = getattr(self, name)
            if value <= 0 and value != CHOSEN:
                raise InputError(f"{name}={value}: must be above 0")
        if self.stall_seconds <= 0:
            raise InputError(f"data.stall_seconds={self.stall_seconds}: must be above 0")
        if self.loss.multi_label:
            self._check_multi_label()

    def _check_multi_label(self) -> None:
        """Refuse options that need videos with one class."""
        for name, value, default in (
            ("data.sampler", self.order.sampler, "uniform"),
            ("distill.teacher", self.distill.teacher, ""),
        ):
            if value != default:
                raise InputError(
                    f"{name}={value!r}: not possible with loss.name=sigmoid; set it to {default!r}"
                )

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


def resolve(config: Config, workdir: Path | None = None) -> Experiment:
    """Turn a config into frozen dataclasses, and check it.

    Args:
        config: A complete config, as made by the files in `configs/`.
        workdir: Folder of a run. If the run is resumed, fields that are `CHOSEN` keep its values.

    Raises:
        InputError: A field was renamed or has an impossible value.
    """
    check_names(config.to_dict())
    if workdir is not None:
        config = _with_fields(config, schedule_choice.saved_choice(config.to_dict(), workdir))
    # `auto` depends on the machine; networks only have real dtypes.
    real_dtype = {"dtype": "float32"} if config.model.dtype == AUTO else {}
    model = make_model_config(**{**config.model, **real_dtype})
    loss = LossConfig(**config.loss)
    dataset = DatasetConfig(**_section(config.data, DatasetConfig), multi_label=loss.multi_label)
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
        order=VideoOrder(seed=config.seed, **_section(config.data, VideoOrder)),
        loader=LoaderConfig(**_section(config.data, LoaderConfig)),
        train_clips=_make_train_clips(config, preprocessing),
        protocol=EvalProtocol(
            preprocessing=preprocessing,
            score=config.eval.score,
            activation=loss.name,
            dtype=config.eval.dtype,
            batch_size=config.eval.batch_size,
            every_epochs=config.eval.every_epochs,
        ),
        loss=loss,
        recipe=Recipe(
            mean=preprocessing.mean,
            std=preprocessing.std,
            multi_label=loss.multi_label,
            **_section(config, Recipe),
        ),
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
        InputError: A batch size is not a positive multiple of the required number (mesh,
            `accumulate_steps`, `data.repeats`), or `accumulate_steps` is below 1.
    """
    check_batch_size("eval.batch_size", experiment.protocol.batch_size, mesh)
    if experiment.batch_size == CHOSEN:
        return  # checked when it is chosen
    check_batch_size("batch_size", experiment.batch_size, mesh)
    experiment.order.check_batch_size(experiment.batch_size)
    num_parts = experiment.recipe.accumulate_steps
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * max(1, num_parts)
    if num_parts < 1 or experiment.batch_size % multiple:
        raise InputError(
            f"accumulate_steps={num_parts}, batch_size={experiment.batch_size}: accumulate_steps "
            f"must be at least 1, and batch_size must be a multiple of {multiple} "
            "(mesh.data · mesh.fsdp · accumulate_steps)"
        )


def choose_schedule(
    experiment: Experiment, mesh: Mesh, num_clips: int
) -> tuple[Experiment, tuple[str, ...]]:
    """Choose the fields that are `CHOSEN` for the number of training videos.

    If there are no such fields, but a fine-tuning has few steps, the log proposes to choose them.

    Args:
        experiment: The experiment.
        mesh: The device mesh.
        num_clips: Clips per epoch: the number of training videos, if each is drawn once.

    Returns:
        The complete experiment, and a line for the log or none.

    Raises:
        InputError: A batch size does not fit the mesh, see `check_batch_sizes`.
    """
    if not schedule_choice.chosen_fields(experiment.fields):
        is_short = experiment.init_from and schedule_choice.is_short(
            num_clips, experiment.batch_size, experiment.num_epochs
        )
        return experiment, (schedule_choice.PROPOSAL,) if is_short else ()
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * max(1, experiment.recipe.accumulate_steps)
    multiple = math.lcm(parts, experiment.order.repeats)
    chosen = schedule_choice.choose(experiment.fields, num_clips=num_clips, multiple=multiple)
    experiment = resolve(_with_fields(ConfigDict(experiment.fields), chosen))
    check_batch_sizes(experiment, mesh)
    return experiment, (schedule_choice.describe(chosen, num_clips),)


def choose_model_dtype(experiment: Experiment) -> tuple[Experiment, tuple[str, ...]]:
    """Replace the model's dtype `auto` by the one that trains faster on this machine.

    All processes use the choice of process 0.

    Returns:
        The experiment, and a line for the log or none.
    """
    if experiment.fields["model"]["dtype"] != AUTO:
        return experiment, ()
    choice = DtypeChoice(
        **gather(dataclasses.asdict(choose_dtype(experiment.model, train=True)))[0]
    )
    config = _with_fields(ConfigDict(experiment.fields), {"model.dtype": choice.dtype})
    return resolve(config), (f"model.{choice}",)


def choose_without_training(experiment: Experiment) -> Experiment:
    """Return the experiment that training would choose; open the data only if this is needed."""
    experiment, _ = choose_model_dtype(experiment)
    if not schedule_choice.chosen_fields(experiment.fields):
        return experiment
    data = open_dataset(experiment.dataset, experiment.model.num_classes, ("train",))
    order = experiment.order.for_videos(data.records["train"])
    num_clips = order.epoch_clips(len(data.records["train"]))
    return choose_schedule(experiment, make_mesh(experiment.mesh), num_clips)[0]


def _with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of the config with other values of some fields, given by their dotted names."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config
