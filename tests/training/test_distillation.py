"""Loading of teachers. The distillation loss is tested in test_steps.py."""

import re

import pytest

import jaxvid
from jaxvid.data.synthetic_motion import LABELS
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.experiment import resolve
from jaxvid.training.distillation import DistillConfig, load_teacher
from tests.conftest import shrunk_config

PREPROCESSING = {"num_frames": 8, "crop": 64, "short_side": 72, "sampling": "segments"}
PREPROCESSING |= {"mean": 0.25, "std": 0.75}


@pytest.fixture
def save_and_load(motion_folder, tmp_path):
    """Return a function that saves a teacher and loads it for training on the motion clips."""

    def load(labels=None, preprocessing=PREPROCESSING, **options):
        model = jaxvid.create_model("stam_tiny", width=16, depth=1, **options)
        jaxvid.save_model(model, tmp_path / "teacher", preprocessing=preprocessing, labels=labels)
        experiment = resolve(shrunk_config(motion_folder))
        distill = DistillConfig(teacher=str(tmp_path / "teacher"), weight=0.5)
        mesh = sharding.make_mesh(experiment.mesh)
        return load_teacher(distill, experiment.model, list(LABELS), mesh)

    return load


@pytest.mark.parametrize("labels", [LABELS, None, [str(i) for i in range(8)]])
def test_a_teacher_with_the_same_or_unnamed_classes_is_loaded(save_and_load, labels):
    teacher, params = save_and_load(labels and list(labels))
    assert (teacher.mean, teacher.std, teacher.weight) == (0.25, 0.75, 0.5)
    assert {str(leaf.dtype) for leaf in params.values()} == {"bfloat16"}


def test_the_statistics_of_a_teacher_may_be_per_channel(save_and_load):
    teacher, _ = save_and_load(None, {**PREPROCESSING, "mean": [0.1, 0.2, 0.3]})
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), 0.75)


def test_without_a_teacher_nothing_is_loaded():
    assert load_teacher(DistillConfig(), None, [], None) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [*LABELS[:2], LABELS[3], LABELS[2], *LABELS[4:]]}, "2 is .* different order"),
        ({"labels": [*LABELS[:7], "sitting"]}, "teacher has different classes: class 7 is 'sit"),
        (
            {"num_classes": 9},
            "clips or classes differ .*num_classes: 9 in the teacher, 8 in the config",
        ),
        (
            {"image_size": 32},
            "clips or classes differ .*image_size: 32 in the teacher, 64 in the config",
        ),
        ({"preprocessing": None}, "model.json: preprocessing is missing; export the model again"),
        (
            {"preprocessing": {"mean": 0.5}},
            "model.json: preprocessing has no num_frames; export the model",
        ),
    ],
)
def test_unsuitable_teachers_are_refused(save_and_load, options, message):
    with pytest.raises(InputError, match=message) as error:
        save_and_load(**options)
    assert "\n" not in str(error.value)


def test_values_out_of_range_are_refused():
    for name, value in (("weight", 1.5), ("temperature", 0.0)):
        with pytest.raises(InputError, match=re.escape(f"distill.{name}={value}: must be ")):
            DistillConfig(**{name: value})
