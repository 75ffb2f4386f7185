"""Evaluation: every listed video is counted once, by the sum of its views' logits."""

from pathlib import Path

from jaxvid import logs
from jaxvid.config import differences
from jaxvid.data import fingerprints
from jaxvid.data.sources import open_dataset
from jaxvid.distributed import collectives, setup, sharding
from jaxvid.errors import InputError
from jaxvid.evaluation.comparison import check_shared, compare_tables
from jaxvid.evaluation.loop import abstract_eval_model, evaluate_params, make_eval_step
from jaxvid.evaluation.protocol import check_protocol
from jaxvid.evaluation.results import read_table, save_report
from jaxvid.evaluation.resume import PartialResults
from jaxvid.evaluation.summary import make_report, summary
from jaxvid.logs import log
from jaxvid.models import make_model_config
from jaxvid.storage import model_card, model_folder, workdir_lock
from jaxvid.storage.preprocessing import (
    check_preprocessing,
    default_color_matrix,
    make_preprocessing,
    resolve_color_matrix,
)
from jaxvid.training import checkpoint, run_config, run_metadata

# How clips are made, beside the network's own sizes: it decides what an accuracy is worth.
CLIP_FIELDS = (
    *("data.sampling", "data.sampling_rate", "data.by_time", "data.resize", "data.color_matrix"),
    "eval.short_side",
)


@workdir_lock.exclusive
def evaluate(config, workdir: str | Path, *, compare_with: str | Path | None = None) -> dict:
    """Evaluates a model folder (`init_from`) or else the newest checkpoint of the workdir.

    Interrupted, it goes on where it was when the same command is run again.

    Args:
        config: A locked config.
        workdir: Gets `eval.json`, `eval_videos.csv`, `eval.html` and `confusion.png`.
        compare_with: Another `eval.json`: says which videos changed, and whether that is more than
            chance.

    Returns:
        What `eval.json` holds.

    Raises:
        InputError: There is nothing to evaluate, it does not fit the config or the data, or another
            run uses the workdir.
    """
    workdir = Path(workdir)
    setup.use_compilation_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_protocol(config, mesh)
    before = collectives.raise_on_all_processes(read_table, compare_with) if compare_with else None
    collectives.raise_on_all_processes(checkpoint.check_writable, workdir, 10**6)
    logs.setup_logging(workdir)

    model_config = make_model_config(**config.model)
    graphdef, abstract_params = abstract_eval_model(config)
    abstract_params = sharding.with_sharding(abstract_params, mesh)
    if config.init_from:
        source = named = config.init_from
        model_card.check_same_model(source, model_config)
        check_preprocessing(source, config)
        card = model_card.load_card(source)
        params = model_folder.load_params(source, abstract_params)
        expected = {"color_matrix": default_color_matrix(card)} | (card["preprocessing"] or {})
        config = resolve_color_matrix(config, expected)
        found = make_preprocessing(config)
        names = {name: name.partition(".")[2] for name in CLIP_FIELDS}
        names = {field: name for field, name in names.items() if name in expected}
        changed = differences(
            {field: expected[name] for field, name in names.items()},
            {field: found[name] for field, name in names.items()},
            there="in the model card",
            here="now",
        )
    else:
        step = checkpoint.newest_step(workdir)
        changed = run_config.compare_config(workdir, config)
        if other := [
            text
            for name, text in changed.items()
            if name.startswith(("model.", "data.mean", "data.std")) and name != "model.dtype"
        ]:
            raise InputError(f"{workdir} holds another model: {'; '.join(other)}")
        named = workdir / "best"  # a checkpoint does not name its classes
        card = model_card.load_card(named) if model_card.exists(named) else None
        if config.data.color_matrix == "auto" and card:
            changed.pop("data.color_matrix", None)
            config = resolve_color_matrix(config, card["preprocessing"] or {})
        source = str(workdir / "checkpoints" / str(step))
        params = checkpoint.restore_params(workdir, step, abstract_params)
    log.info("evaluating %s", source)
    if config.data.sampling != "dense_stride":  # others have no rate
        changed.pop("data.sampling_rate", None)
    if told := "; ".join(text for name, text in changed.items() if name in CLIP_FIELDS):
        log.warning("preprocessing differs from the model's: %s", told)

    data = collectives.raise_on_all_processes(
        open_dataset, config.data, config.model.num_classes, ("val",)
    )
    for line in data.notes:
        log.info("%s", line)
    records = data.records["val"]
    videos = fingerprints.describe_videos(records)
    run_metadata.check_same_videos(videos)
    if card:
        collectives.raise_on_all_processes(
            model_card.check_labels, card["labels"], data.labels, named
        )
    if before is not None:
        check_shared(before, (record.id for record in records))
    weights_sha256 = model_folder.fingerprint(params)
    unfinished = PartialResults(
        workdir / ".unfinished_eval",
        {
            "weights": weights_sha256,
            "videos": videos,
            # Processes may have copies of their own.
            "files": sorted({*collectives.gather(fingerprints.fingerprint_files(records))}),
            "model": config.model.to_dict(),
            "data": {
                name: value
                for name, value in config.data.to_dict().items()
                if f"data.{name}" not in run_config.OWN_FIELDS
            },
            "eval": config.eval.to_dict(),
        },
    )
    eval_step = make_eval_step(config, graphdef, mesh)
    results = evaluate_params(
        params, records, config, eval_step=eval_step, mesh=mesh, unfinished=unfinished
    )
    result = make_report(results, config, checkpoint=source)
    result["weights_sha256"] = weights_sha256
    collectives.raise_on_all_processes(save_report, workdir, result, results, data.labels, records)
    unfinished.remove()
    log.info("%s. The report is %s", summary(result), workdir / "eval.html")
    if before is not None:
        after = collectives.raise_on_all_processes(read_table, workdir / "eval.json")
        for line in collectives.raise_on_all_processes(compare_tables, before, after, workdir):
            log.info("%s", line)
    return result
