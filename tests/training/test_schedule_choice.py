"""Batch size and schedule chosen from the number of training videos."""

import json

import pytest

from jaxvid.config import CHOSEN
from jaxvid.distributed import sharding
from jaxvid.errors import InputError
from jaxvid.experiment import choose_schedule, choose_without_training, resolve
from jaxvid.training.schedule_choice import FIELDS, chosen_fields


@pytest.fixture
def chosen_config(config):
    """Return a config of which all fields of `FIELDS` are to be chosen."""
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({name: type_(CHOSEN) for name, type_ in types(config)})
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 8})
    return config.lock()


def types(config):
    """Return pairs of a field of `FIELDS` and its type."""
    flat = {"batch_size": int, "log_steps": int}
    return [(name, flat.get(name, float)) for name in FIELDS]


def choose(config, num_clips):
    experiment = resolve(config)
    return choose_schedule(experiment, sharding.make_mesh(experiment.mesh), num_clips)


@pytest.mark.parametrize(
    ("num_clips", "expected"),
    [
        (3, (2, 100.0, 10.0, 7, 5.0)),
        (36, (4, 45.0, 4.5, 20, 2.25)),
        (63, (4, 26.0, 2.6, 20, 1.3)),
        (64, (8, 50.0, 5.0, 20, 2.5)),
        (1000, (8, 20.0, 2.0, 20, 1.0)),
    ],
)
def test_small_data_has_small_batches_and_many_epochs(chosen_config, num_clips, expected):
    experiment, [line] = choose(chosen_config, num_clips)
    actual = (
        experiment.batch_size,
        experiment.num_epochs,
        experiment.optimizer.warmup_epochs,
        experiment.log_steps,
        experiment.protocol.every_epochs,
    )
    assert actual == expected
    assert experiment.checkpoints.every_epochs == experiment.protocol.every_epochs
    assert not chosen_fields(experiment.fields)
    assert line.startswith(f"chosen for an epoch of {num_clips} clips: batch_size={expected[0]}, ")


def test_given_values_are_kept_and_the_others_fit_them(chosen_config):
    config = chosen_config.copy_and_resolve_references().unlock()
    config.update(batch_size=12, accumulate_steps=2, log_steps=7)
    experiment, [line] = choose(config.lock(), 36)
    assert (experiment.batch_size, experiment.log_steps) == (12, 7)
    assert experiment.num_epochs == 100
    assert "batch_size" not in line
    config = chosen_config.copy_and_resolve_references().unlock()
    config.num_epochs = 2.0
    config.mesh.update({"data": 2, "tensor": 4})
    config.data.repeats = 3
    experiment, _ = choose(config.lock(), 36)
    assert (experiment.batch_size, experiment.num_epochs) == (6, 2.0)
    assert experiment.optimizer.warmup_epochs == 0.2
    config.data.repeats = 1
    config.batch_size = -2
    with pytest.raises(InputError, match="batch_size=-2 must be a positive multiple"):
        choose(config.lock(), 36)


def test_a_resumed_run_keeps_its_choice(chosen_config, tmp_path):
    experiment, _ = choose(chosen_config, 36)
    (tmp_path / "config.json").write_text(json.dumps(experiment.fields))
    assert resolve(chosen_config, tmp_path).batch_size == CHOSEN  # there is no checkpoint
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    assert resolve(chosen_config, tmp_path).fields == experiment.fields
    config = chosen_config.copy_and_resolve_references().unlock()
    config.num_epochs = 7.0
    assert resolve(config.lock(), tmp_path).num_epochs == 7  # is then refused as a changed config


def test_short_fine_tunings_get_a_proposal(config, chosen_config):
    other = config.copy_and_resolve_references().unlock()
    assert choose(other.lock(), 48)[1] == ()  # not a fine-tuning
    other.unlock().init_from = "model"
    experiment, [line] = choose(other.lock(), 48)
    assert experiment.batch_size == 16
    assert "fewer than 100 steps" in line
    assert "--config.batch_size=-1 --config.num_epochs=-1 --config.optimizer.warmup" in line
    assert choose(other.lock(), 16 * 50)[1] == ()
    # Programs that do not train choose the same values; the data has 48 videos.
    assert choose_without_training(resolve(other)).batch_size == 16
    assert choose_without_training(resolve(chosen_config)).num_epochs == 34
