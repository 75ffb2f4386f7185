"""A runner of Apache Beam for Spark clusters that needs PySpark, but no job server.

Beam's own SparkRunner needs a job server in Java, which is not part of Beam's Python package.
"""

import os
import signal
import sys
import threading
import warnings

from apache_beam.options.pipeline_options import PipelineOptions, SparkRunnerOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.runner import PipelineResult
from apache_beam.runners.trivial_runner import (
    ExecutionState,
    TrivialRunner,
    decode_all,
    encode_all,
)
from pyspark import SparkConf, SparkContext

from jaxvid.errors import InputError


class PySparkRunner(TrivialRunner):
    """Runs batch pipelines without side inputs on a Spark cluster.

    Beam's TrivialRunner translates the pipeline. This class runs each of its stages as a Spark job.
    After a shuffle, a task has one key, so that Spark distributes and repeats single elements.
    The collections between stages are in the memory of this process, so they must be small.

    The workers use the Python interpreter `$PYSPARK_PYTHON`, by default the path of this one.
    """

    def run_portable_pipeline(
        self, pipeline: beam_runner_api_pb2.Pipeline, options: PipelineOptions
    ) -> PipelineResult:
        """Run a pipeline on the cluster `--spark_master_url`, and wait until it has finished.

        Raises:
            InputError: The cluster cannot be reached, or Java is not installed.
        """
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        url = options.view_as(SparkRunnerOptions).spark_master_url
        self._context = _start(SparkConf().setMaster(url).setAppName("jaxvid"))
        with self._context:
            self._context.setLogLevel("ERROR")
            return super().run_portable_pipeline(pipeline, options)

    def execute_executable_stage(
        self, transform_proto: beam_runner_api_pb2.PTransform, execution_state: ExecutionState
    ) -> None:
        """Run a stage: one Spark task for each encoded chunk of its input."""
        stage = _payload(transform_proto)
        chunks = execution_state.get_pcollection_contents(stage.input)
        transform = transform_proto.SerializeToString()
        pipeline = execution_state.optimized_pipeline.SerializeToString()
        # One slice per chunk. Spark refuses zero slices.
        tasks = self._context.parallelize(chunks, max(1, len(chunks)))
        results = tasks.map(lambda chunk: _run_stage(chunk, transform, pipeline)).collect()
        for i, output in enumerate(stage.outputs):
            contents = [chunk for outputs in results for chunk in outputs[i]]
            execution_state.set_pcollection_contents(output, contents)

    def group_by_key_and_window(
        self, input_pcoll: str, output_pcoll: str, execution_state: ExecutionState
    ) -> None:
        """Group the elements of a collection by their keys, and encode each group as one chunk."""
        super().group_by_key_and_window(input_pcoll, output_pcoll, execution_state)
        coder = execution_state.windowed_coder(output_pcoll)
        chunks = execution_state.get_pcollection_contents(output_pcoll)
        groups = [group for chunk in chunks for group in decode_all(chunk, coder)]
        execution_state.set_pcollection_contents(
            output_pcoll, [encode_all([group], coder) for group in groups]
        )


def _start(conf: SparkConf) -> SparkContext:
    """Connect to a cluster.

    Raises:
        InputError: The cluster cannot be reached, or Java is not installed.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            # PySpark starts Java with fork and exec, which is safe; JAX warns of any fork.
            warnings.filterwarnings("ignore", r"os\.fork", RuntimeWarning)
            return SparkContext(conf=conf)
    except Exception:  # PySpark raises exceptions of many types
        raise InputError(
            f"Spark cannot be started with --spark_master_url={conf.get('spark.master')}; Java's "
            "messages above have the reason"
        ) from None
    finally:
        # PySpark's handler reports an interruption as a failed job.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _payload(
    transform: beam_runner_api_pb2.PTransform,
) -> beam_runner_api_pb2.ExecutableStagePayload:
    return beam_runner_api_pb2.ExecutableStagePayload.FromString(transform.spec.payload)


def _run_stage(chunk: bytes, transform: bytes, pipeline: bytes) -> list[list[bytes]]:
    """Run a stage on one chunk of its input, in a Spark task.

    Args:
        chunk: Encoded elements.
        transform: The stage, a serialised `PTransform`.
        pipeline: The serialised optimized pipeline.

    Returns:
        The encoded chunks of each output of the stage.
    """
    state = ExecutionState(beam_runner_api_pb2.Pipeline.FromString(pipeline))
    transform = beam_runner_api_pb2.PTransform.FromString(transform)
    stage = _payload(transform)
    state.set_pcollection_contents(stage.input, [chunk])
    for output in stage.outputs:
        state.set_pcollection_contents(output, [])
    try:
        TrivialRunner().execute_executable_stage(transform, state)
    finally:
        state.worker_handler.stop_worker()
    return [state.get_pcollection_contents(output) for output in stage.outputs]
