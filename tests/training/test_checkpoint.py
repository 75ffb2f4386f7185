"""Model folders and checkpoints: saving, restoring, and detection of damage."""

import json
import math
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxvid
from jaxvid import atomic
from jaxvid.config import CHOSEN
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.models import FAMILIES, abstract_model, make_model_config, split_params
from jaxvid.remote_lock import LostLockError
from jaxvid.storage import model_card, model_folder
from jaxvid.training import checkpoint, outputs, run_config

TINY = {"width": 16, "depth": 1, "image_size": 32}


@pytest.fixture
def folder(tmp_path):
    model = jaxvid.create_model("xvit_tiny", **TINY, seed=3)
    jaxvid.save_model(model, tmp_path / "model", labels=[f"class {i}" for i in range(8)])
    return tmp_path / "model"


def test_restored_model_folders_are_bit_identical(folder):
    expected = split_params(jaxvid.create_model("xvit_tiny", **TINY, seed=3))[1]
    model = jaxvid.load_model(folder)
    params = split_params(model)[1]
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array)
    assert model_folder.fingerprint(params) == model_folder.fingerprint(expected)
    assert model.config.width == 16
    card = model_card.load_card(folder)
    assert card["name"] == "xvit_tiny"
    assert card["labels"][7] == "class 7"
    video = np.zeros((1, 8, 32, 32, 3), np.float32)
    np.testing.assert_array_equal(model(video), jaxvid.load_model(folder)(video))


def test_save_model_overwrites_only_model_folders(folder, tmp_path):
    other = jaxvid.create_model("xvit_tiny", **TINY, seed=4)
    before = model_folder.fingerprint(split_params(jaxvid.load_model(folder))[1])
    jaxvid.save_model(other, folder)
    assert model_folder.fingerprint(split_params(jaxvid.load_model(folder))[1]) != before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "unrelated").mkdir()
    with pytest.raises(InputError, match="is not a model folder; choose another one"):
        jaxvid.save_model(other, tmp_path / "unrelated")


def test_fingerprints_differ_for_different_weights():
    params = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    changed = {**params, "b": np.array([1, 1.0000001], np.float32)}
    assert model_folder.fingerprint(params) == model_folder.fingerprint(
        dict(reversed(params.items()))
    )
    assert model_folder.fingerprint(params) != model_folder.fingerprint(changed)


def test_damaged_model_folders_are_refused(folder, tmp_path):
    def damaged(name, change):
        copy = shutil.copytree(folder, tmp_path / name)
        change(copy)
        return copy

    def edit(**changes):
        def change(copy):
            card = json.loads((copy / "model.json").read_text())
            card.update(changes)
            (copy / "model.json").write_text(json.dumps(card))

        return change

    def drop(key):
        def change(copy):
            card = json.loads((copy / "model.json").read_text())
            del card[key]
            (copy / "model.json").write_text(json.dumps(card))

        return change

    def truncate(copy):
        largest = max((copy / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])

    config = json.loads((folder / "model.json").read_text())["config"]
    cases = {
        "is not a model folder .no .*model.json": lambda copy: (copy / "model.json").unlink(),
        "model.json cannot be read": lambda copy: (copy / "model.json").write_text("{"),
        "format version 99, but this jaxvid reads 1": edit(format_version=99),
        "params is damaged: .* of .* files are missing": lambda copy: shutil.rmtree(
            copy / "params"
        ),
        r"fc2.kernel: \(64, 16\) in the folder, \(128, 32\) in the": edit(
            config={**config, "width": 32}
        ),
        r"blocks.1.norm1.scale: absent in the folder": edit(config={**config, "depth": 2}),
        "no option 'size'": edit(config={**config, "size": 1}),
        "model.json cannot be read .*'config'": drop("config"),
        r"params is damaged: 1 of .* \(.*d/": truncate,
    }
    for i, (message, change) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message) as error:
            jaxvid.load_model(damaged(str(i), change))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="nowhere does not exist"):
        jaxvid.load_model(tmp_path / "nowhere")


def test_a_different_network_is_refused_with_the_differences(folder):
    other = make_model_config("xvit_tiny", **TINY, dropout=0.3, remat="full")
    card = model_card.load_card(folder)
    model_card.check_same_model(card, folder, other)
    deeper = make_model_config("xvit_tiny", **{**TINY, "depth": 2})
    with pytest.raises(InputError, match="depth: 1 in the folder, 2 in the config"):
        model_card.check_same_model(card, folder, deeper)
    other = make_model_config("xvit_tiny", **{**TINY, "num_classes": 77})
    with pytest.raises(InputError, match="set --config.init_from to a model that was trained on"):
        model_card.check_same_model(card, folder, other)


def test_weights_are_loaded_with_the_requested_sharding(folder):
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4, tensor=1))
    config = make_model_config("xvit_tiny", **TINY)
    _, abstract = abstract_model(config)
    abstract = sharding.with_sharding(abstract, mesh, FAMILIES["xvit"].tensor_splits(config))
    params = model_folder.load_params(folder, abstract)
    kernel = params["base_model.blocks.0.mlp.fc1.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    expected = split_params(jaxvid.load_model(folder))[1]
    np.testing.assert_array_equal(
        jax.device_get(kernel), expected["base_model.blocks.0.mlp.fc1.kernel"]
    )


def test_a_full_or_read_only_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    outputs.check_writable(tmp_path / "new", 1000)
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(InputError, match="cannot be written to .*choose another --workdir"):
        outputs.check_writable(Path("/proc/jaxvid"), 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        outputs.check_writable(tmp_path / "file", 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="1 MB free, but the outputs need 2 MB"):
        outputs.check_writable(tmp_path, 2 * 10**6)
    outputs.check_writable(tmp_path, 10**6)  # exactly enough
    # Existing outputs count as free space, because they will be replaced.
    for name in ("checkpoints", "best", "model"):
        workdir = tmp_path / "runs" / name
        (workdir / name).mkdir(parents=True)
        (workdir / name / "weights").write_bytes(bytes(1_100_000))
        outputs.check_writable(workdir, 2 * 10**6)
    outputs.check_writable(tmp_path / "a" / "b", 1000)


def test_all_checkpoints_and_models_of_a_run_must_fit_on_the_disk(tmp_path, monkeypatch):
    weights = jax.ShapeDtypeStruct((300, 1000), np.float32)
    step = jax.ShapeDtypeStruct((), np.int32)
    state = {"step": step, "params": {"kernel": weights}, "opt_state": {"momentum": weights}}
    weight_bytes = 4 * 300 * 1000
    # Three checkpoints, the weights of three model folders, and 1 MB for the other files.
    need_bytes = 3 * (4 + 2 * weight_bytes) + 3 * weight_bytes + 1_000_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need_bytes))
    outputs.check_room(tmp_path, state, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need_bytes - 1))
    with pytest.raises(InputError, match="12 MB free, but the outputs need 12 MB"):
        outputs.check_room(tmp_path, state, keep=2)


def test_impossible_policies_for_checkpoints_are_refused():
    checkpoint.CheckpointPolicy(every_epochs=0.01, keep=1)
    checkpoint.CheckpointPolicy(every_epochs=CHOSEN, keep=1)
    for name, value in (("every_epochs", -2), ("every_epochs", 0), ("keep", -1), ("keep", 0)):
        fields = {"every_epochs": 1.0, "keep": 2, name: value}
        with pytest.raises(InputError, match=f"^checkpoint_{name}={value}: must be above 0$"):
            checkpoint.CheckpointPolicy(**fields)


def test_a_run_without_checkpoints_is_refused(tmp_path):
    assert checkpoint.find_steps(tmp_path) == []
    with pytest.raises(InputError, match="contains no checkpoint"):
        checkpoint.newest_step(tmp_path)


def test_configs_are_compared_field_by_field(tmp_path):
    config = {"seed": 0, "model": {"width": 64, "blocks": (1, 2)}}
    assert run_config.compare_config(tmp_path, config) == {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_config.compare_config(tmp_path, config) == {}
    config["model"]["width"] = 32
    differences = run_config.compare_config(tmp_path, config)
    assert differences == {"model.width": "model.width: 64 before, 32 now"}
    config["model"]["width"] = 64
    config["data"] = {"color_matrix": "auto"}  # an older config.json lacks it
    assert run_config.compare_config(tmp_path, config) == {}
    config["data"]["color_matrix"] = "bt601"
    differences = run_config.compare_config(tmp_path, config)
    assert differences == {"data.color_matrix": "data.color_matrix: 'tagged' before, 'bt601' now"}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"remat": True}}))  # an older run
    now = {"model": {"remat": "full", "attention": "auto", "scan": "auto"}}
    assert run_config.compare_config(tmp_path, now) == {}
    now["model"]["remat"] = "dots"
    assert run_config.compare_config(tmp_path, now) == {
        "model.remat": "model.remat: 'full' before, 'dots' now"
    }
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged"):
        run_config.compare_config(tmp_path, config)


def test_a_model_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        jaxvid.save_model(jaxvid.create_model("xvit_tiny", **TINY), "/proc/jaxvid/model")


class Counter:
    """A stub of a `Resumable`, such as the data iterator."""

    def __init__(self, value: int):
        self.value = value

    def get_state(self) -> dict:
        return {"value": self.value}

    def set_state(self, state: dict) -> None:
        self.value = state["value"]


def counters(data: int, log: int) -> dict[str, Counter]:
    return {"data": Counter(data), "log": Counter(log)}


def save(workdir: Path, step: int) -> None:
    manager = checkpoint.make_manager(workdir, keep=2)
    state = {"step": np.int32(step), "params": {"a.kernel": np.arange(4.0)}}
    checkpoint.save_checkpoint(manager, state, counters(step, 10 * step))
    manager.close()


ABSTRACT = {
    "step": jax.ShapeDtypeStruct((), np.int32),
    "params": {"a.kernel": jax.ShapeDtypeStruct((4,), np.float64)},
}


def test_closing_a_manager_during_a_save_leaves_no_thread(tmp_path, monkeypatch):
    """A daemon thread would keep running while the interpreter shuts down, and could abort it."""
    threads: list[threading.Thread] = []
    write_checksums = checkpoint.write_checksums

    def write_checksums_slowly(workdir):
        threads.append(threading.current_thread())
        if threads[-1] is not threading.main_thread():
            time.sleep(0.3)
        write_checksums(workdir)

    monkeypatch.setattr(checkpoint, "write_checksums", write_checksums_slowly)
    manager = checkpoint.make_manager(tmp_path, keep=2)
    checkpoint.save_checkpoint(manager, {"step": np.int32(1)}, counters(1, 2))
    manager.close()
    assert threads[-1] is not threading.main_thread()
    assert not threads[-1].daemon
    assert not threads[-1].is_alive()
    assert [*json.loads((tmp_path / "checkpoints.json").read_text())] == ["1"]


def test_checkpoints_restore_the_log_window_unless_it_is_missing(tmp_path):
    save(tmp_path, 3)
    resumables = counters(0, 0)
    manager, state = checkpoint.restore_newest(tmp_path, ABSTRACT, resumables, keep=2)
    manager.close()
    assert (int(state["step"]), resumables["data"].value, resumables["log"].value) == (3, 3, 30)
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "log")
    (tmp_path / "checkpoints.json").unlink()
    resumables = counters(0, 0)
    manager, state = checkpoint.restore_newest(tmp_path, ABSTRACT, resumables, keep=2)
    manager.close()
    assert (int(state["step"]), resumables["data"].value, resumables["log"].value) == (3, 3, 0)


def test_outputs_are_moved_aside_only_if_checkpoints_were_deleted(tmp_path, lines):
    for name in ("metrics.jsonl", "config.json", "mine.txt", "log.txt"):
        (tmp_path / name).write_text(name)
    # The run was killed before its first checkpoint: its outputs stay.
    outputs.tidy_outputs(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    assert not lines
    for folder in ("previous", "previous_again"):
        (tmp_path / "metrics.jsonl").write_text(folder)
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "model.json").write_text(folder)
        (tmp_path / "checkpoints" / "2").mkdir(parents=True)
        outputs.tidy_outputs(tmp_path)
        assert (tmp_path / "metrics.jsonl").exists()
        shutil.rmtree(tmp_path / "checkpoints")
        outputs.tidy_outputs(tmp_path)
        outputs.tidy_outputs(tmp_path)
        assert (tmp_path / folder / "metrics.jsonl").read_text() == folder
        assert (tmp_path / folder / "best" / "model.json").read_text() == folder
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine.txt", "log.txt", "previous", "previous_again"}
    assert len(lines) == 2
    assert lines[1].endswith("previous_again")


def tiny_state(step: int, **trees) -> dict:
    params = {"a.kernel": jnp.full((2, 3), step, jnp.float32)}
    return {"step": jnp.int32(step), "params": params, **trees}


def save_steps(workdir: Path, *steps: int, **trees) -> None:
    manager = checkpoint.make_manager(workdir, keep=2)
    for step in steps:
        state = tiny_state(step, **trees)
        checkpoint.save_checkpoint(manager, state, counters(10 * step, 20 * step))
    checkpoint.finish_saving(manager)
    manager.close()


def abstract(tree):
    """Return the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def restore(workdir: Path) -> tuple[int | None, int, int]:
    """Restore the newest checkpoint, and check its weights.

    Returns:
        The step, or None if there is no checkpoint; and the values of the two counters.
    """
    resumables = counters(-1, -1)
    manager, state = checkpoint.restore_newest(workdir, abstract(tiny_state(0)), resumables, keep=2)
    manager.close()
    values = resumables["data"].value, resumables["log"].value
    if state is None:
        return None, *values
    np.testing.assert_array_equal(state["params"]["a.kernel"], np.full((2, 3), state["step"]))
    return int(state["step"]), *values


def damage(workdir: Path, step: int) -> None:
    """Change a byte in the middle of a checkpoint's largest file."""
    files = [p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_the_newest_checkpoints_are_kept_and_restored(tmp_path):
    assert restore(tmp_path) == (None, -1, -1)
    save_steps(tmp_path, 1, 2, 3)
    assert checkpoint.find_steps(tmp_path) == [2, 3]
    assert checkpoint.newest_step(tmp_path) == 3
    checksums = json.loads((tmp_path / "checkpoints.json").read_text())
    assert checksums.keys() == {"2", "3"}
    assert all(checksums.values())
    assert restore(tmp_path) == (3, 30, 60)
    assert not (tmp_path / "damaged").exists()


def test_damaged_checkpoints_are_moved_aside_and_logged(tmp_path, lines):
    save_steps(tmp_path, 2, 3)
    damage(tmp_path, 3)
    assert restore(tmp_path) == (2, 20, 40)
    assert checkpoint.find_steps(tmp_path) == [2]
    assert (tmp_path / "damaged" / "3").is_dir()
    [line] = lines
    assert "checkpoint of step 3 is damaged (1 of " in line
    assert str(tmp_path / "damaged" / "3") in line
    save_steps(tmp_path, 3)  # the resumed run reaches step 3 again
    for step in (2, 3):
        damage(tmp_path, step)
    with pytest.raises(InputError, match="every checkpoint is damaged .*/3_again, .*/2"):
        restore(tmp_path)
    with pytest.raises(InputError, match="every checkpoint is damaged .*restore one, delete"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert restore(tmp_path) == (None, -1, -1)


def test_intact_checkpoints_with_a_different_structure_are_not_moved(tmp_path):
    save_steps(tmp_path, 3)
    different = abstract({**tiny_state(0), "more": jnp.zeros(2)})
    with pytest.raises(InputError, match="step 3 is intact, but cannot be restored") as error:
        checkpoint.restore_newest(tmp_path, different, counters(0, 0), keep=2)
    assert "\n" not in str(error.value)
    assert checkpoint.find_steps(tmp_path) == [3]


@pytest.mark.parametrize(
    ("cause", "reason"), [(None, "cannot be read"), (TypeError("not an array"), "not an array")]
)
def test_the_error_for_intact_checkpoints_contains_the_cause(cause, reason, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("cannot be read") from cause

    save_steps(tmp_path, 3)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(InputError, match=rf"intact, but cannot be restored \({reason}\); resume"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "error",
    [MemoryError("no memory"), InputError("no video"), jax.errors.JaxRuntimeError("INTERNAL: bug")],
)
def test_checkpoints_are_not_moved_after_errors_with_another_cause(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    save_steps(tmp_path, 3)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            restore(tmp_path)
        assert raised.value is error
        assert checkpoint.find_steps(tmp_path) == [3]
        # Without checksums, the checkpoint may be damaged.
        (tmp_path / "checkpoints.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("message", "processes", "expected"),
    [
        ("damaged", 1, True),
        ("damaged", 2, True),
        ("UNKNOWN: Gloo AllGather failed", 1, True),  # there is no other process
        ("UNKNOWN: Gloo AllGather failed", 2, False),
    ],
)
def test_failures_of_other_processes_do_not_count_as_damage_to_checkpoints(
    message, processes, expected, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert checkpoint._may_be_damage(ValueError(message)) == expected


def test_checkpoints_that_only_this_process_cannot_restore_end_the_run(tmp_path, monkeypatch):
    """The other process has restored the checkpoint's files and waits for this process in Orbax."""

    def gather(value, seconds=math.inf):
        if seconds < 600:
            raise TimeoutError
        return [value, value]

    def fail(*_, **__):
        raise ValueError("damaged")

    save_steps(tmp_path, 3)
    monkeypatch.setattr(collectives, "gather", gather)
    assert restore(tmp_path) == (3, 30, 60)  # a process that succeeds waits without a limit
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    message = r"/checkpoints/3: this process cannot restore it \(damaged\), but another process can"
    with pytest.raises(InputError, match=message):
        restore(tmp_path)


def test_older_checkpoints_can_be_restored(tmp_path):
    save_steps(tmp_path, 2, 3)
    resumables = counters(0, 0)
    with checkpoint.make_manager(tmp_path, keep=2) as manager:
        state = checkpoint._restore(manager, 2, abstract(tiny_state(0)), resumables)
    assert (int(state["step"]), resumables["data"].value, resumables["log"].value) == (2, 20, 40)


def test_checkpoints_are_restored_with_the_requested_sharding(tmp_path):
    """The weights have the shape of an older version: queries, keys and values on one axis."""
    older = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    with checkpoint.make_manager(tmp_path, keep=2) as manager:
        state = {"step": np.int32(1), "params": {"a.qkv.kernel": older}}
        checkpoint.save_checkpoint(manager, state, counters(1, 1))
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4, tensor=1))
    target = {
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh)),
        "params": {
            "a.qkv.kernel": jax.ShapeDtypeStruct(
                (4, 3, 2), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
            )
        },
    }
    with checkpoint.make_manager(tmp_path, keep=2) as manager:
        state = checkpoint._restore(manager, 1, target, counters(0, 0))
    kernel = state["params"]["a.qkv.kernel"]
    np.testing.assert_array_equal(kernel, older.reshape(4, 3, 2))
    assert kernel.sharding == target["params"]["a.qkv.kernel"].sharding
    assert kernel.addressable_shards[0].data.shape == (1, 3, 2)
    assert state["step"].sharding == sharding.replicated(mesh)


def test_checkpoints_without_checksums_are_restored(tmp_path):
    save_steps(tmp_path, 3)
    (tmp_path / "checkpoints.json").write_text("{")  # the run was killed while it wrote the file
    assert restore(tmp_path) == (3, 30, 60)
    (tmp_path / "checkpoints.json").unlink()
    assert restore(tmp_path) == (3, 30, 60)


def test_restore_params_of_checkpoints_prefers_averaged_weights(tmp_path):
    params = tiny_state(3)["params"]
    save_steps(tmp_path / "plain", 3)
    save_steps(tmp_path / "average", 3, ema={"a.kernel": jnp.full((2, 3), 7.0)})
    for name, expected in (("plain", 3), ("average", 7)):
        restored = checkpoint.restore_params(tmp_path / name, 3, abstract(params))
        assert restored.keys() == params.keys()
        np.testing.assert_array_equal(restored["a.kernel"], np.full((2, 3), expected))
    damage(tmp_path / "plain", 3)
    with pytest.raises(InputError, match="step 3 is damaged .*evaluate --config.init_from=.*/best"):
        checkpoint.restore_params(tmp_path / "plain", 3, abstract(params))


def test_a_run_whose_workdir_was_taken_over_ends_after_the_upload(tmp_path, monkeypatch):
    def refuse(_):
        raise LostLockError("in use by another run")

    monkeypatch.setattr(checkpoint, "upload", refuse)
    manager = checkpoint.make_manager(tmp_path, keep=2)
    manager.check_lock()
    checkpoint.save_checkpoint(manager, tiny_state(1), counters(0, 0))
    manager.join_checksum_thread()
    with pytest.raises(LostLockError, match="in use by another run"):
        manager.check_lock()
    with pytest.raises(LostLockError, match="in use by another run"):
        checkpoint.save_checkpoint(manager, tiny_state(2), counters(0, 0))
    manager.close()
    assert checkpoint.find_steps(tmp_path) == [1]


def test_the_error_of_a_failed_save_lists_the_complete_checkpoints(tmp_path, monkeypatch):
    save_steps(tmp_path, 2, 3)
    manager = checkpoint.make_manager(tmp_path, keep=2)

    def fail(*_, **__):
        raise OSError("no space")

    message = r"cannot be written to .*no space.*: 2, 3; free disk .* the same command to resume$"
    with monkeypatch.context() as patch:
        patch.setattr(manager, "save", fail)
        with pytest.raises(InputError, match=message):
            checkpoint.save_checkpoint(manager, tiny_state(4), counters(0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(manager, "wait_until_finished", fail)
        with pytest.raises(InputError, match=message):
            checkpoint.finish_saving(manager)
    manager.close()


def test_checksums_of_checkpoints_that_cannot_be_written_are_a_single_error(tmp_path, monkeypatch):
    def fail(workdir):
        if checkpoint.find_steps(workdir):
            raise OSError("no space")

    tracebacks = []  # of threads
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr(checkpoint, "write_checksums", fail)
    with checkpoint.make_manager(tmp_path, keep=2) as manager:
        checkpoint.save_checkpoint(manager, tiny_state(1), counters(0, 0))
        with pytest.raises(InputError, match="cannot be written to .*no space"):
            checkpoint.finish_saving(manager)
    assert not tracebacks


def test_a_close_that_fails_does_not_hide_the_exception_that_ends_the_run(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("no space")

    manager = checkpoint.make_manager(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "close", fail)
        manager.close_quietly()
    manager.close()


def test_a_resumed_run_keeps_as_many_checkpoints_as_a_new_one(tmp_path):
    save_steps(tmp_path, 1, 2)
    manager, state = checkpoint.restore_newest(
        tmp_path, abstract(tiny_state(0)), counters(0, 0), keep=2
    )
    assert int(state["step"]) == 2
    checkpoint.save_checkpoint(manager, tiny_state(3), counters(0, 0))
    checkpoint.finish_saving(manager)
    manager.close()
    assert checkpoint.find_steps(tmp_path) == [2, 3]


def test_damage_to_checkpoints_is_detected_after_a_later_save(tmp_path):
    save_steps(tmp_path, 2)
    damage(tmp_path, 2)
    save_steps(tmp_path, 3)
    damage(tmp_path, 3)
    with pytest.raises(InputError, match="every checkpoint is damaged .*/3, .*/2"):
        restore(tmp_path)


def test_a_checkpoint_without_checksums_that_cannot_be_read_is_moved_aside(tmp_path):
    save_steps(tmp_path, 2, 3)
    (tmp_path / "checkpoints.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state")
    assert restore(tmp_path) == (2, 20, 40)
    assert (tmp_path / "damaged" / "3").is_dir()


def test_incomplete_models_without_checkpoints_are_removed(tmp_path):
    staging_dirs = [atomic.staging_dir(tmp_path / name) for name in ("best", "model")]
    for staging_dir in staging_dirs:
        staging_dir.mkdir()
    outputs.tidy_outputs(tmp_path)
    assert not any(staging_dir.exists() for staging_dir in staging_dirs)


def test_all_outputs_of_a_run_whose_checkpoints_were_deleted_are_moved_aside(tmp_path):
    # Outputs that a run has from its start, and those that it only has after a checkpoint.
    early = {"metrics.jsonl", "tensorboard", "curves.png", "profile", "skipped.jsonl"}
    early |= {"config.json", "starts.jsonl", "training_videos.json.gz"}
    late = {"best", "model", "eval.json", "eval_videos.csv", "eval.html", "comparison.json"}
    late |= {"confusion.png", "checkpoints.json"}

    def make(workdir, names):
        workdir.mkdir()
        for name in names:
            if name in ("best", "model"):
                (workdir / name).mkdir()
                (workdir / name / "model.json").write_text("{}")
            else:
                (workdir / name).write_text("{}")
        return workdir

    assert not outputs.starts_over(make(tmp_path / "early", early))
    for name in late:
        assert outputs.starts_over(make(tmp_path / f"only {name}", [name])), name
    run = make(tmp_path / "run", early | late)
    outputs.tidy_outputs(run)
    assert [path.name for path in run.iterdir()] == ["previous"]
    assert {path.name for path in (run / "previous").iterdir()} == early | late


def test_a_background_save_that_fails_is_published_to_the_other_processes(tmp_path, monkeypatch):
    published = []

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", fail)
    monkeypatch.setattr(checkpoint.process_group, "publish", published.append)
    with checkpoint.make_manager(tmp_path, keep=2) as manager:
        with pytest.raises(OSError, match="no space"):
            manager._wait_for_checkpointers()
        monkeypatch.undo()
    [error] = published
    assert isinstance(error, InputError)
    assert isinstance(error.__context__, OSError)
    assert f"written to {tmp_path}/checkpoints (no space); steps of complete" in str(error)
    assert "steps of complete checkpoints: none; free disk space" in str(error)
