"""The dtype `auto` is measured once per machine and network, and a resumed run keeps it."""

import json

import pytest

import jaxvid
from jaxvid import experiment as experiments
from jaxvid.experiment import choose_model_dtype, choose_without_training, resolve
from jaxvid.inference import classifier as classifiers
from jaxvid.models import make_model_config
from jaxvid.storage import dtype_choice
from jaxvid.storage.dtype_choice import DtypeChoice, choose_dtype, measure_ratio

TINY = {"width": 16, "depth": 2, "image_size": 32}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXVID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dtypes"


class Clock:
    """A clock that functions with known durations advance."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def function(self, name, durations):
        durations = iter(durations)

        def call():
            self.calls.append(name)
            self.now += next(durations)

        return call


def test_the_ratio_is_the_median_of_alternating_pairs_after_a_warm_up():
    clock = Clock()
    first = clock.function("first", [9.0, 0.4, 0.4, 0.4, 0.4, 0.4])
    second = clock.function("second", [9.0, 0.2, 0.2, 0.1, 0.4, 0.2])
    assert measure_ratio(first, second, clock) == pytest.approx(2.0)
    assert clock.calls == ["first", "second"] * 6


def test_slow_measurements_are_short():
    clock = Clock()
    first, second = clock.function("first", [4.0] * 9), clock.function("second", [2.0] * 9)
    assert measure_ratio(first, second, clock) == 2.0
    assert clock.calls.count("first") == 2  # a warm-up and one pair
    clock = Clock()
    first, second = clock.function("first", [1.0]), clock.function("second", [20.0])
    assert measure_ratio(first, second, clock) == 0.05


@pytest.mark.parametrize(
    ("speed_up", "dtype"), [(0.5, "float32"), (1.05, "float32"), (1.8, "bfloat16")]
)
def test_bfloat16_is_chosen_only_if_it_is_faster(cache, monkeypatch, speed_up, dtype):
    monkeypatch.setattr(dtype_choice, "measure_ratio", lambda *_: speed_up)
    choice = choose_dtype(make_model_config("xvit_tiny", **TINY), train=False)
    assert choice == DtypeChoice(dtype, speed_up)
    assert str(choice).startswith(f"dtype={dtype}: bfloat16 takes {1 / speed_up:.2f} × the time")


def test_a_choice_is_measured_once_per_machine_network_and_kind_of_step(cache, monkeypatch):
    measured = []
    monkeypatch.setattr(dtype_choice, "measure_ratio", lambda *_: measured.append(1) or 2.0)
    monkeypatch.setattr(dtype_choice, "_make_step", lambda *_: None)
    config = make_model_config("xvit_tiny", **TINY)
    for _ in range(2):
        assert choose_dtype(config, train=False).dtype == "bfloat16"
    assert choose_dtype(make_model_config("xvit_tiny", dtype="tfloat32", **TINY), train=False)
    assert len(measured) == 1
    choose_dtype(config, train=True)
    choose_dtype(make_model_config("stam_tiny", **TINY), train=False)
    assert len(measured) == 3
    monkeypatch.setattr(dtype_choice, "describe_cpu", lambda: "another processor")
    choose_dtype(config, train=False)
    assert len(measured) == len([*cache.iterdir()]) == 4
    for path in cache.iterdir():
        path.write_text('{"dtype": "int8"')
    assert choose_dtype(config, train=False).dtype == "bfloat16"  # damaged: measured again
    assert len(measured) == 5
    monkeypatch.setenv("JAXVID_CACHE", "/proc/no_such_folder")  # cannot be written
    assert choose_dtype(config, train=False).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["stam_tiny", "xvit_tiny"])
def test_blocks_of_all_families_can_be_timed(cache, name):
    choice = choose_dtype(make_model_config(name, num_frames=8, **TINY), train=True)
    assert choice.dtype in ("float32", "bfloat16")
    assert choice.speed_up > 0


def test_training_records_its_choice_and_a_resumed_run_keeps_it(config, tmp_path, monkeypatch):
    choices = iter([DtypeChoice("bfloat16", 2.0)])
    monkeypatch.setattr(experiments, "choose_dtype", lambda *_, train: next(choices))
    # Other processes choose differently. Values of processes are exchanged as JSON.
    other = {"dtype": "float32", "speed_up": 1.0}
    monkeypatch.setattr(experiments, "gather", lambda value: [json.loads(json.dumps(value)), other])
    config = config.copy_and_resolve_references().unlock()
    config.model.dtype = "auto"
    experiment, [line] = choose_model_dtype(resolve(config.lock(), tmp_path))
    assert line == "model.dtype=bfloat16: bfloat16 takes 0.50 × the time of float32"
    assert experiment.model.dtype == experiment.fields["model"]["dtype"] == "bfloat16"
    assert choose_model_dtype(experiment) == (experiment, ())
    (tmp_path / "config.json").write_text(json.dumps(experiment.fields))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    resumed, notes = choose_model_dtype(resolve(config, tmp_path))
    assert (resumed.model.dtype, notes) == ("bfloat16", ())


def test_programs_that_do_not_train_choose_the_same_dtype(config, monkeypatch):
    monkeypatch.setattr(experiments, "choose_dtype", lambda *_, train: DtypeChoice("bfloat16", 2.0))
    config = config.copy_and_resolve_references().unlock()
    config.model.dtype = "auto"
    assert choose_without_training(resolve(config.lock())).model.dtype == "bfloat16"


def test_the_classifier_uses_and_prints_the_choice(folders, monkeypatch, capsys):
    monkeypatch.setattr(classifiers, "choose_dtype", lambda *_, train: DtypeChoice("bfloat16", 2.0))
    classifier = jaxvid.Classifier(folders / "xvit", dtype="auto")
    assert classifier.config.dtype == "bfloat16"
    assert "dtype=bfloat16: bfloat16 takes 0.50 × the time" in capsys.readouterr().err
