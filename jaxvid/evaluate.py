"""The evaluation program: every listed video is counted once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxvid import logs
from jaxvid.config import differences
from jaxvid.data import fingerprints
from jaxvid.data.sources import Record, open_dataset
from jaxvid.distributed import collectives, process_group, setup, sharding
from jaxvid.errors import InputError, with_addresses
from jaxvid.evaluation import comparison
from jaxvid.evaluation.loop import (
    evaluate_params,
    make_eval_step,
    make_onnx_eval_step,
)
from jaxvid.evaluation.outputs import save_report
from jaxvid.evaluation.summary import make_report, summary
from jaxvid.experiment import Config, Experiment, resolve
from jaxvid.logs import log
from jaxvid.models import Params
from jaxvid.models.implementation import CHOICES
from jaxvid.storage import exported_file, model_card, model_folder, workdir_lock
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.partial_results import PartialResults
from jaxvid.storage.preprocessing import check_preprocessing, default_color_matrix
from jaxvid.training import checkpoint, outputs, run_config, run_metadata
from jaxvid.weights.resolve import resolve_model

# Preprocessing fields that are compared with the model's. Differences are logged as a warning.
COMPARED_FIELDS = (
    *("data.sampling", "data.sampling_rate", "data.by_time", "data.resize", "data.color_matrix"),
    "eval.short_side",
)

# Fields that select the validation videos of a folder or list. Differences are logged as a warning.
SPLIT_FIELDS = ("data.val_share", "data.group")


def evaluate(
    config: Config,
    workdir: str | Path,
    *,
    compare_with: str | Path | None = None,
    onnx: str | Path | None = None,
) -> dict:
    """Evaluate the model folder `init_from`, or the workdir's newest checkpoint if it is not set.

    An interrupted evaluation is resumed when the same command is run again.

    Args:
        config: A locked config.
        workdir: Output directory of `eval.json`, `eval_videos.csv`, `eval.html` and
            `confusion.png`. If `init_from` is not set, it must contain a training run.
        compare_with: The `eval.json` of another evaluation, or its folder. Its results are compared
            with the new ones, video by video, in the log and in `WORKDIR/comparison.json`.
        onnx: An ONNX file of `jaxvid export` to evaluate instead, with ONNX Runtime on the CPU.

    Returns:
        The contents of `eval.json` without `class_accuracy`, `confusion` and `labels`.

    Raises:
        InputError: There is no model to evaluate, the model does not fit the config or the data,
            its logits are not finite, a file cannot be read or written, or another run uses the
            workdir.
    """
    experiment = resolve(config)
    with workdir_lock.open_workdir(workdir) as workdir:
        file = collectives.raise_on_all_processes(_check_weights, experiment, workdir, onnx)
        return _evaluate(experiment, workdir, compare_with=compare_with, file=file)


def _check_weights(
    experiment: Experiment, workdir: Path, onnx: str | Path | None
) -> "OnnxFile | None":
    """Refuse missing weights or another network, before the workdir is created and locked.

    Returns:
        The ONNX file that is evaluated, or None.
    """
    if onnx is not None:
        return _open_onnx(experiment, onnx)
    if experiment.init_from:
        # Isolated, because `prepare_compilation` must run before JAX uses a device.
        folder = resolve_model(experiment.init_from, isolated=True)
        model_card.check_same_model(model_card.load_card(folder), folder, experiment.model)
    else:
        checkpoint.newest_step(workdir)
    return None


@workdir_lock.exclusive
def _evaluate(
    experiment: Experiment,
    workdir: Path,
    *,
    compare_with: str | Path | None,
    file: "OnnxFile | None",
) -> dict:
    """Evaluate with a resolved config, as described in `evaluate`."""
    setup.prepare_compilation(workdir, deterministic=experiment.deterministic)
    mesh = sharding.make_mesh(experiment.mesh)
    sharding.check_batch_size("eval.batch_size", experiment.protocol.batch_size, mesh)
    before = None
    if compare_with:
        before = collectives.raise_on_all_processes(comparison.read_table, compare_with)
    collectives.raise_on_all_processes(outputs.check_writable, workdir, 10**6)
    logs.setup_logging(workdir)

    if file is not None:
        weights = _load_onnx(experiment, file)
    else:
        load = _load_folder if experiment.init_from else _load_checkpoint
        weights = load(experiment, workdir, mesh)
    experiment = weights.experiment
    records, labels = _open_videos(weights)
    if before is not None:
        comparison.check_shared(before, (record.id for record in records), labels)

    sha256 = file.about["sha256"] if file else model_folder.fingerprint(weights.params)
    unfinished = PartialResults(
        workdir / ".unfinished_eval", _resume_key(experiment, records, sha256)
    )
    if file is None:
        eval_step = make_eval_step(experiment.model, experiment.protocol, mesh)
    else:
        eval_step = make_onnx_eval_step(file.network, experiment.protocol)
    results = evaluate_params(
        weights.params,
        records,
        experiment.protocol,
        eval_step=eval_step,
        loader=experiment.loader,
        mesh=mesh,
        unfinished=unfinished,
    )
    report = make_report(
        results,
        experiment.protocol,
        data=experiment.dataset.location,
        checkpoint=weights.source,
    )
    report["weights_sha256"] = sha256
    if file is not None:
        report["engine"] = file.network.engine
        report["protocol"]["dtype"] = file.about["precision"]
    collectives.raise_on_all_processes(save_report, workdir, report, results, labels, records)
    unfinished.remove()
    for video in report["failed"]:
        log.info("counts as wrong: %s", video["error"])
    log.info("%s. The report is %s", summary(report), workdir / "eval.html")
    if before is not None:
        collectives.raise_on_all_processes(_compare, before, workdir)
    return report


def _compare(before: dict, workdir: Path) -> None:
    """Compare the new evaluation with an earlier one, in the log and in `comparison.json`."""
    if jax.process_index():
        return
    after = comparison.read_table(workdir)
    result = comparison.compare_tables(before, after)
    path = comparison.save_comparison(workdir, result)
    for line in comparison.describe(result):
        log.info("%s", line)
    log.info("all changes are in %s", path)


# ------------------------------------------------------------------ weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights to evaluate.

    Attributes:
        params: The weights.
        source: The model folder or the checkpoint that they come from.
        experiment: The config; a color matrix of `auto` is replaced by that of the model card, if
            there is one.
        card: The model card, which names the classes; None if there is none.
        card_folder: The folder of the card.
    """

    params: Params
    source: str
    experiment: Experiment
    card: dict[str, Any] | None
    card_folder: str | Path


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that is evaluated.

    Attributes:
        path: The file.
        about: Its description, which has the fields of a model card.
        network: The network.
    """

    path: Path
    about: dict[str, Any]
    network: OnnxNetwork


def _open_onnx(experiment: Experiment, path: str | Path) -> OnnxFile:
    """Open an ONNX file.

    Raises:
        InputError: The file is unusable or contains a different network, or the config has options
            that do not apply to ONNX files.
    """
    if experiment.init_from:
        raise InputError(f"--onnx {path}: cannot be combined with init_from; remove one of them")
    if (dtype := experiment.protocol.dtype) != "float32":
        raise InputError(
            f"eval.dtype={dtype}: does not apply to --onnx, whose file has a precision of its own; "
            "remove it"
        )
    if process_group.current():
        raise InputError(f"--onnx {path}: is evaluated by one process; start only one")
    path = Path(path)
    network, about = exported_file.open_onnx(path)
    model_card.check_same_model(about, path, experiment.model)
    return OnnxFile(path, about, network)


def _load_onnx(experiment: Experiment, file: OnnxFile) -> Weights:
    """Check that an ONNX file fits the config, and return it as weights without parameters."""
    experiment = _check_card(experiment, file.about, file.path)
    return Weights(
        params={},
        source=str(file.path),
        experiment=experiment,
        card=file.about,
        card_folder=file.path,
    )


def _load_folder(experiment: Experiment, _: Path, mesh: Mesh) -> Weights:
    """Load the weights of the model folder `init_from`."""
    folder = collectives.raise_on_all_processes(resolve_model, experiment.init_from)
    card = model_card.load_card(folder)
    experiment = _check_card(experiment, card, folder)
    params = model_folder.load_params(folder, _abstract_params(experiment, mesh))
    return Weights(
        params=params,
        source=with_addresses(str(folder)),
        experiment=experiment,
        card=card,
        card_folder=folder,
    )


def _check_card(experiment: Experiment, card: dict[str, Any], folder: str | Path) -> Experiment:
    """Compare activation and preprocessing with a model card, and log the differences.

    Args:
        experiment: The config.
        card: The model card.
        folder: The model folder or exported file.

    Returns:
        The config with the color matrix of the model card, if the config says `auto`.

    Raises:
        InputError: The activation or important preprocessing differs.
    """
    check_preprocessing(card, folder, experiment.preprocessing)
    model_card.check_activation(card, folder, experiment.protocol.activation)
    expected = {"color_matrix": default_color_matrix(card)} | (card["preprocessing"] or {})
    experiment = experiment.with_color_matrix(expected["color_matrix"])
    actual = experiment.preprocessing.to_json()
    names = {field: field.partition(".")[2] for field in COMPARED_FIELDS}
    names = {field: name for field, name in names.items() if name in expected}
    changed = differences(
        {field: expected[name] for field, name in names.items()},
        {field: actual[name] for field, name in names.items()},
        there="in the model card",
        here="now",
    )
    _log_source(with_addresses(str(folder)), experiment, changed)
    return experiment


def _load_checkpoint(experiment: Experiment, workdir: Path, mesh: Mesh) -> Weights:
    """Load the weights of the newest checkpoint of the workdir."""
    step = checkpoint.newest_step(workdir)
    changed = run_config.compare_config(workdir, experiment.fields)
    if model_changes := [
        text
        for name, text in changed.items()
        if name.startswith(("model.", "data.mean", "data.std", "loss.name"))
        and name.removeprefix("model.") not in ("dtype", *CHOICES)
    ]:
        raise InputError(
            f"{workdir} contains a different model ({'; '.join(model_changes)}); change the config "
            "or choose another --workdir"
        )
    folder = workdir / "best"  # its model card has the class names; checkpoints have none
    card = model_card.load_card(folder) if model_card.exists(folder) else None
    if card and experiment.dataset.color_matrix == "auto":
        changed.pop("data.color_matrix", None)
        matrix = (card["preprocessing"] or {}).get("color_matrix", "tagged")
        experiment = experiment.with_color_matrix(matrix)
    params = checkpoint.restore_params(workdir, step, _abstract_params(experiment, mesh))
    source = with_addresses(str(workdir / "checkpoints" / str(step)))
    _log_source(source, experiment, changed)
    return Weights(
        params=params, source=source, experiment=experiment, card=card, card_folder=folder
    )


def _abstract_params(experiment: Experiment, mesh: Mesh) -> Params:
    config = dataclasses.replace(experiment.model, dtype=experiment.protocol.dtype)
    return model_folder.abstract_sharded_model(config, mesh)[1]


def _log_source(source: str, experiment: Experiment, changed: dict[str, str]) -> None:
    """Log the source of the weights; warn if preprocessing or split differ from the model's."""
    log.info("evaluating %s", source)
    ignored = {"data.sampling_rate"} if experiment.preprocessing.sampling != "dense_stride" else ()
    lines = [changed[name] for name in changed if name in COMPARED_FIELDS and name not in ignored]
    if lines:
        log.warning("preprocessing differs from the model's: %s", "; ".join(lines))
    lines = [changed[name] for name in SPLIT_FIELDS if name in changed]
    if lines and not {"data.folder", "data.list", "data.name"} & {*changed}:
        log.warning(
            "the validation videos may include training videos of the run: %s", "; ".join(lines)
        )


# ------------------------------------------------------------------ videos


def _open_videos(weights: Weights) -> tuple[Sequence[Record], list[str]]:
    """Open the validation videos, and check that their classes match the model card, if any.

    Returns:
        The videos, and the names of their classes.

    Raises:
        InputError: The data set is unusable, or its classes differ from those of the model card.
    """
    experiment, card = weights.experiment, weights.card
    data = collectives.raise_on_all_processes(
        open_dataset, experiment.dataset, experiment.model.num_classes, ("val",)
    )
    for line in data.notes:
        log.info("%s", line)
    records = data.records["val"]
    run_metadata.check_same_videos(fingerprints.describe_videos(records))
    if card:
        if warning := model_card.describe_assumed_labels(card, weights.card_folder):
            log.info("warning: %s", warning)
        collectives.raise_on_all_processes(
            model_card.check_labels, card["labels"], data.labels, weights.card_folder
        )
    return records, data.labels


def _resume_key(experiment: Experiment, records: Sequence[Record], sha256: str) -> dict[str, Any]:
    """Return everything that the results of an evaluation depend on, for `PartialResults`.

    All processes must call this, because file fingerprints are gathered from all of them.
    """
    fields = experiment.fields
    return {
        "weights": sha256,
        "videos": fingerprints.describe_videos(records),
        # Each process may have its own copy of the files.
        "files": sorted({*collectives.gather(fingerprints.fingerprint_files(records))}),
        "model": fields["model"],
        "data": {
            name: value
            for name, value in fields["data"].items()
            if f"data.{name}" not in run_config.OWN_FIELDS
        },
        "eval": fields["eval"],
        "activation": experiment.protocol.activation,
        "preprocessing": experiment.preprocessing.to_json(),
    }
