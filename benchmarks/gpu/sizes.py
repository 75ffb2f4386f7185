"""Sizes of the measurements: `full` for a GPU, `tiny` for a test of the same code on a CPU."""

from typing import Any, NamedTuple

from benchmarks.turns import Workload


class Size(NamedTuple):
    """Sizes of all measurements.

    Attributes:
        models: Presets whose speed is measured, the one for comparisons of options last.
        model_fields: Preset → fields of its config that differ in the measurements of speed.
        configs: Preset → its training config.
        batches: Clips per step, in the order of importance. The first is used where only one batch
            size is measured.
        dtype: Compute dtype of most measurements.
        rounds: Turns of each side in a comparison.
        turn_seconds: Minimum duration of a turn, in seconds.
        cases: Maximum number of measurements in a step that compares options, models or inputs.
        matrix: Rows and columns of the matrices that measure the matmul peak.
        copy_bytes: Size of the array that measures the memory bandwidth.
        goldens: Golden file → preset and fields of its network, in the order of importance.
        threads: Decoding threads; 0: one per core.
        demo: Overrides of the demo's config.
        resume: Overrides of the demo's config for the comparison of resumed runs.
        stop: Step at which these runs are interrupted.
        input_steps: Counted steps per turn in the measurement of the input.
        fields: Overrides of the training configs.
    """

    models: tuple[str, ...]
    model_fields: dict[str, dict[str, Any]]
    configs: dict[str, str]
    batches: tuple[int, ...]
    dtype: str
    rounds: int
    turn_seconds: float
    cases: int
    matrix: int
    copy_bytes: int
    goldens: dict[str, tuple[str, dict[str, Any]]]
    threads: int
    demo: tuple[str, ...]
    resume: dict[str, Any]
    stop: int
    input_steps: int
    fields: dict[str, Any]

    @property
    def batch(self) -> int:
        """Clips per step where only one batch size is measured."""
        return self.batches[0]

    def workload(
        self, model: int, train: bool, *, batch: int | None = None, dtype: str = ""
    ) -> Workload:
        """Return the work of a comparison.

        Args:
            model: Index of the model.
            train: Whether a training step is measured, or a forward pass.
            batch: Clips per step; None: the first of `batches`.
            dtype: Compute dtype; empty: `dtype`.
        """
        name = self.models[model]
        fields = tuple(self.model_fields.get(name, {}).items())
        return Workload(name, batch or self.batch, dtype or self.dtype, train, fields)


FULL = Size(
    models=("stam_16", "xvit_k600"),
    model_fields={},
    configs={"stam_16": "configs/stam_k400.py:16", "xvit_k600": "configs/xvit_k600.py"},
    batches=(32, 128, 8, 64, 16),
    dtype="bfloat16",
    rounds=7,
    turn_seconds=0.25,
    cases=100,
    matrix=8192,
    copy_bytes=2**32,
    goldens={
        name: (name, {}) for name in ("stam_16", "xvit_k600", "xvit_ssv2", "stam_8", "xvit_k400")
    },
    threads=0,
    demo=(),
    resume={
        "data.motion.num_train": 1024,
        "data.motion.num_val": 64,
        "num_epochs": 2.0,
        "eval.every_epochs": 2.0,
    },
    stop=23,
    input_steps=10,
    fields={},
)
TINY = Size(
    models=("stam_tiny", "xvit_tiny"),
    model_fields={"stam_tiny": {"depth": 2, "temporal_depth": 1}, "xvit_tiny": {"depth": 2}},
    configs={"stam_tiny": "configs/motion.py:stam", "xvit_tiny": "configs/motion.py"},
    batches=(2,),
    dtype="bfloat16",
    rounds=2,
    turn_seconds=0.0,
    cases=1,
    matrix=128,
    copy_bytes=2**16,
    goldens={
        "tiny/xvit_tiny_48px": (
            "xvit_tiny",
            {
                "num_classes": 7,
                "num_frames": 4,
                "image_size": 224,  # of the positional embedding; the clip has 48 px
                "width": 32,
                "depth": 2,
                "heads": 4,
                "temporal_embedding_frames": 4,
                "shift_segment": 4,
                "shift_div": 8,
            },
        )
    },
    threads=2,
    demo=(
        "--config.data.motion.num_train=48",
        "--config.data.motion.num_val=24",
        "--config.batch_size=16",
        "--config.eval.batch_size=8",
        "--config.num_epochs=1.0",
        "--config.optimizer.warmup_epochs=0.34",
        "--config.model.depth=1",
    ),
    resume={
        "data.motion.num_train": 48,
        "data.motion.num_val": 24,
        "batch_size": 16,
        "eval.batch_size": 8,
        "num_epochs": 1.0,
        "eval.every_epochs": 1.0,
        "optimizer.warmup_epochs": 0.34,
        "model.depth": 1,
    },
    stop=1,
    input_steps=2,
    fields={"model.depth": 1},
)
SIZES = {"full": FULL, "tiny": TINY}
