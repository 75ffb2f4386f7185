"""The evaluation loop: every video once, over all devices."""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from jaxvid import logs
from jaxvid.data.clips.clip import make_spec
from jaxvid.data.pipeline import make_eval_iter, split_batch
from jaxvid.data.sources import Record
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.evaluation.metrics import Results
from jaxvid.evaluation.resume import PartialResults
from jaxvid.logs import log
from jaxvid.models import Params, abstract_model, make_model_config
from jaxvid.storage import eval_step


def abstract_eval_model(config) -> tuple[nnx.GraphDef, Params]:
    """`abstract_model` of a config's network as evaluation runs it: in `eval.dtype`."""
    return abstract_model(make_model_config(**{**config.model, "dtype": config.eval.dtype}))


def make_eval_step(config, graphdef, mesh) -> Callable[[Params, dict], dict]:
    """The jitted `steps.eval_step` of a config."""
    step = functools.partial(
        eval_step.eval_step,
        graphdef=graphdef,
        mean=config.data.mean,
        std=config.data.std,
        score=config.eval.score,
    )
    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def evaluate_params(
    params: Params,
    records: Sequence[Record],
    config,
    *,
    eval_step: Callable,
    mesh,
    unfinished: PartialResults | None = None,
) -> Results:
    """Runs the network over all records.

    Args:
        params: The weights.
        records: Labelled videos.
        config: A whole config.
        eval_step: As `make_eval_step` gives it.
        mesh: Cuts the batches.
        unfinished: Where to keep what is done, and to take from what an earlier run did.

    Raises:
        InputError: The network's logits are not finite.
    """
    parts, began = unfinished.load() if unfinished else [], time.monotonic()
    start = sum(len(part["padded"]) for part in parts)
    if start:
        log.info("%d of %d videos were evaluated before", start, len(records))
    shard = sharding.batch_shard(mesh, config.eval.batch_size)
    batches = make_eval_iter(
        records[start:],
        spec=make_spec(config, num_clips=config.eval.num_clips, num_crops=config.eval.num_crops),
        batch_size=config.eval.batch_size // shard[1],
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        shard=shard,
    )
    progress = logs.RunProgress(
        len(records), done=start, unit="video", title="evaluating", lines=True
    )
    running: list[tuple] = []  # batches that the device may still compute
    hits = sum(int(part["hit"].sum()) for part in parts)

    def read() -> None:
        """Fetches the oldest running batch."""
        nonlocal start, hits, began
        outputs, *host = running.pop(0)
        count = min(config.eval.batch_size, len(records) - start)
        # Every process has all scores; what it knows of its own videos it tells the others.
        told = dict(collectives.gather([shard[0], host]))
        label, padded, released, error = (
            sum((told[i][k] for i in sorted(told)), [])[:count] for k in range(4)
        )
        part = {name: np.asarray(array)[:count] for name, array in outputs.items()}
        part |= {"label": np.array(label), "padded": np.array(padded), "error": error}
        part["released"] = np.array(released)
        good = np.array([not error for error in part["error"]])
        if not np.isfinite(part["scores"][good]).all():
            raise InputError(
                "the network gives logits that are not finite: its weights are damaged"
            )
        for name in ("scores", "probabilities"):
            part[name] = np.where(good[:, None], part[name], 0)
        for error in filter(None, part["error"]):
            log.warning("counts as wrong: %s", error)
        part["hit"] = good & (part["scores"].argmax(axis=1) == part["label"])
        part["seconds"], began = time.monotonic() - began, time.monotonic()
        parts.append(part)
        if unfinished:
            collectives.raise_on_all_processes(unfinished.add, part)
        start, hits = start + count, hits + int(part["hit"].sum())
        progress.advance(count, f"top-1 {100 * hits / start:.2f} %")

    try:
        for batch in batches:
            arrays, _, errors = split_batch(batch)
            outputs = eval_step(params, sharding.to_global_arrays({"video": arrays["video"]}, mesh))
            host = [batch[name].tolist() for name in ("label", "padded", "released")]
            running.append((outputs, *host, errors))
            if len(running) == 2:  # the device computes the newest meanwhile
                read()
        while running:
            read()
    finally:
        progress.close()
        batches.close()
    if start != len(records):
        raise RuntimeError(f"{start} videos were evaluated, {len(records)} are listed")
    return Results(
        ids=[record.id for record in records],
        labels=np.concatenate([part["label"] for part in parts]),
        scores=np.concatenate([part["scores"] for part in parts]),
        probabilities=np.concatenate([part["probabilities"] for part in parts]),
        padded=np.concatenate([part["padded"] for part in parts]),
        released=np.concatenate([part["released"] for part in parts]),
        errors=[error for part in parts for error in part["error"]],
        seconds=float(sum(part["seconds"] for part in parts)),
    )
