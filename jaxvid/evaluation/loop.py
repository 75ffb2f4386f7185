"""The evaluation loop: every video is evaluated once, and all devices are used."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxvid import logs, progress
from jaxvid.data.pipeline import LoaderConfig, make_eval_iter, split_batch
from jaxvid.data.records import ids_of
from jaxvid.data.sources import Record
from jaxvid.distributed import collectives, sharding
from jaxvid.errors import InputError
from jaxvid.evaluation.metrics import Results, hits
from jaxvid.evaluation.protocol import EvalProtocol
from jaxvid.logs import log
from jaxvid.models import ModelConfig, Params, abstract_model, family_of
from jaxvid.storage.eval_step import eval_step as classify_batch
from jaxvid.storage.eval_step import onnx_eval_step, run_ahead
from jaxvid.storage.onnx_network import OnnxNetwork
from jaxvid.storage.partial_results import PartialResults

EvalStep = Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]]


def make_eval_step(model_config: ModelConfig, protocol: EvalProtocol, mesh: Mesh) -> EvalStep:
    """Make the jitted evaluation step: `eval_step` in jaxvid/storage/eval_step.py.

    Its compilation is announced in the log.

    Args:
        model_config: The network's config.
        protocol: The compute dtype, the normalisation and the score.
        mesh: The device mesh.

    Returns:
        Function of the weights, sharded as in training, and a batch.
    """
    graphdef, _ = abstract_model(dataclasses.replace(model_config, dtype=protocol.dtype))
    splits = family_of(model_config).tensor_splits(model_config)

    def step(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return classify_batch(
            sharding.gather_fsdp(params, mesh, splits),
            batch,
            graphdef=graphdef,
            mean=protocol.preprocessing.mean,
            std=protocol.preprocessing.std,
            score=protocol.score,
            activation=protocol.activation,
        )

    jitted = jax.jit(step, out_shardings=sharding.replicated(mesh))
    return progress.announce_compilation(jitted, "the evaluation step", log.info)


def make_onnx_eval_step(network: OnnxNetwork, protocol: EvalProtocol) -> EvalStep:
    """Make an evaluation step that runs an ONNX network on the CPU, and ignores the weights."""

    def step(_: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return onnx_eval_step(
            batch, network=network, score=protocol.score, activation=protocol.activation
        )

    return step


def evaluate_params(
    params: Params,
    records: Sequence[Record],
    protocol: EvalProtocol,
    *,
    eval_step: EvalStep,
    loader: LoaderConfig,
    mesh: Mesh,
    unfinished: PartialResults | None = None,
) -> Results:
    """Evaluate a network on all videos.

    Args:
        params: The weights.
        records: Labelled videos.
        protocol: The preprocessing of clips, the score and the batch size.
        eval_step: Made by `make_eval_step`.
        loader: Threads and processes that decode videos.
        mesh: Batches are sharded over it.
        unfinished: Stores the results of each batch; those of an interrupted run are reused. None:
            nothing is stored.

    Returns:
        The results of all videos, in the order of `records`.

    Raises:
        InputError: The network's logits are not finite, or results cannot be stored.
    """
    index, count = sharding.batch_shard(mesh, protocol.batch_size)
    collector = _Collector(records, protocol.batch_size, shard_index=index, unfinished=unfinished)
    batches = make_eval_iter(
        records[collector.done :],
        spec=protocol.preprocessing.spec,
        batch_size=protocol.batch_size // count,
        shard=(index, count),
        **dataclasses.asdict(loader),
    )
    inputs = ((batch["video"], _video_metadata(batch)) for batch in batches)
    try:
        for outputs, metadata in run_ahead(eval_step, params, inputs, mesh):
            collector.add(outputs, metadata)
    finally:
        collector.close()
        batches.close()
    return collector.results()


def _video_metadata(batch: dict[str, np.ndarray]) -> dict[str, list]:
    """Return lists with one entry per video: `label`, `padded`, `released` and `error`.

    `padded` and `released` are explained in `Results`. `error` is the decode error, or empty.
    """
    _, _, errors = split_batch(batch)
    arrays = {name: batch[name].tolist() for name in ("label", "padded", "released")}
    return {**arrays, "error": errors}


class _Collector:
    """Collects the results of an evaluation batch by batch.

    Args:
        records: All videos of the evaluation.
        batch_size: Videos per batch, over all processes.
        shard_index: Index of this process's part of each batch.
        unfinished: Stores the results of each batch; None: nothing is stored.

    Attributes:
        done: Number of videos whose results are known.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_size: int,
        *,
        shard_index: int,
        unfinished: PartialResults | None,
    ):
        self._records, self._batch_size, self._shard_index = records, batch_size, shard_index
        self._unfinished = unfinished
        self._parts = unfinished.load() if unfinished else []
        if unfinished and unfinished.note:
            log.info("%s", unfinished.note)
        self._began = time.monotonic()
        self.done = sum(len(part["padded"]) for part in self._parts)
        self._hits = sum(int(part["hit"].sum()) for part in self._parts)
        self._num_failed = sum(bool(error) for part in self._parts for error in part["error"])
        if self.done:
            log.info("%d of %d videos were evaluated before", self.done, len(records))
        self._progress = logs.RunProgress(
            len(records), done=self.done, unit="video", title="evaluating", lines=True
        )

    def add(self, outputs: dict[str, jax.Array], metadata: dict[str, list]) -> None:
        """Add the results of a batch; wait for the device.

        Args:
            outputs: Outputs of the evaluation step for the videos of all processes.
            metadata: The result of `_video_metadata` for this process's part of the batch.

        Raises:
            InputError: The network's logits are not finite, or results cannot be stored.
        """
        count = min(self._batch_size, len(self._records) - self.done)
        # The outputs are replicated. The metadata is gathered, because each process has only that
        # of its own videos.
        columns = collectives.gather_columns(self._shard_index, metadata)
        columns = {name: column[:count] for name, column in columns.items()}
        errors = columns["error"]
        part = {name: np.asarray(array)[:count] for name, array in outputs.items()}
        part |= {name: np.array(columns[name]) for name in ("label", "padded", "released")}
        part["error"] = errors
        decoded = np.array([not error for error in errors])
        if not np.isfinite(part["scores"][decoded]).all():
            raise InputError(
                "the network's logits are not finite, as its weights are damaged; evaluate another "
                "checkpoint or model folder"
            )
        for name in ("scores", "probabilities"):
            part[name] = np.where(decoded[:, None], part[name], 0)
        part["hit"] = decoded & hits(part["label"], part["scores"].argmax(axis=1)[:, None])
        now = time.monotonic()
        part["seconds"] = now - self._began
        self._began = now
        self._parts.append(part)
        if self._unfinished:
            collectives.raise_on_all_processes(self._unfinished.add, part)
        self.done += count
        self._hits += int(part["hit"].sum())
        self._num_failed += int((~decoded).sum())
        note = f"top-1 {100 * self._hits / self.done:.2f} %"
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        self._progress.advance(count, note + failed)

    def close(self) -> None:
        """Close the progress bar."""
        self._progress.close()

    def results(self) -> Results:
        """Return the results of all videos, in the order of the records."""
        if self.done != len(self._records):
            raise RuntimeError(
                f"{self.done} videos were evaluated, {len(self._records)} are listed"
            )
        arrays = {
            name: np.concatenate([part[name] for part in self._parts])
            for name in ("scores", "probabilities", "padded", "released")
        }
        return Results(
            ids=[*ids_of(self._records)],
            labels=np.concatenate([part["label"] for part in self._parts]),
            **arrays,
            errors=[error for part in self._parts for error in part["error"]],
            seconds=float(sum(part["seconds"] for part in self._parts)),
        )
