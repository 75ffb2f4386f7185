"""Runs a function on the workers of a runner of Apache Beam."""

import contextlib
import dataclasses
import functools
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxvid.errors import InputError, check_option, import_or_explain, one_line

RUNNERS = (
    "DirectRunner",
    "FlinkRunner",
    "SparkRunner",
    "PySparkRunner",
    "DataflowRunner",
    "PortableRunner",
)


@dataclasses.dataclass(frozen=True)
class BeamRunner:
    """A runner of Apache Beam.

    Attributes:
        name: One of `RUNNERS`.
        options: Pipeline options, as Beam's command line has them.

    Raises:
        InputError: There is no such runner.
    """

    name: str
    options: tuple[str, ...] = ()

    def __post_init__(self):
        check_option("--runner", self.name, RUNNERS)

    def make_pipeline(self) -> Any:
        """Return an empty `beam.Pipeline`. Workers log errors only, unless the options say more.

        Raises:
            InputError: Apache Beam or PySpark is not installed, or an option has an invalid value
                or is unknown.
        """
        beam = import_or_explain("apache_beam", "apache-beam", "--runner needs")
        name = self.name
        if name == "PySparkRunner":
            import_or_explain("pyspark", "pyspark", "--runner PySparkRunner needs")
            name = "jaxvid.data.spark_runner.PySparkRunner"
        from apache_beam.options.pipeline_options import PipelineOptions

        logging.getLogger().setLevel(logging.ERROR)  # Beam logs every step
        usage, flags = io.StringIO(), f"--beam_args {shlex.join(self.options)}"
        try:
            with contextlib.redirect_stderr(usage):  # argparse prints all options of Beam
                given = PipelineOptions(list(self.options))
                known = given.get_all_options(drop_default=True)
                parsed = given.get_all_options(drop_default=True, retain_unknown_options=True)
        except SystemExit:
            problem = usage.getvalue().strip().rpartition("error: ")[2]
            raise InputError(f"{flags}: {one_line(problem)}; correct it") from None
        if unknown := {*parsed} - {*known}:
            raise InputError(
                f"{flags}: Beam has no option {', '.join(sorted(unknown))}; correct it"
            )
        defaults = ["--default_sdk_harness_log_level=ERROR"]
        options = PipelineOptions([f"--runner={name}", *defaults, *self.options])
        return beam.Pipeline(options=options)


def make_runner(name: str | None, options: str) -> BeamRunner | None:
    """Return the runner of the options `--runner` and `--beam_args`; None without `--runner`.

    Raises:
        InputError: There is no such runner, or the options are invalid.
    """
    if name is None:
        if options:
            raise InputError("--beam_args needs --runner NAME")
        return None
    try:
        arguments = tuple(shlex.split(options))
    except ValueError as error:
        raise InputError(f"--beam_args {options}: {error}; correct the quotation marks") from None
    return BeamRunner(name, arguments)


def run_on_workers(
    function: Callable[[Any], None], items: Sequence[Any], runner: BeamRunner
) -> None:
    """Call a function on each item, on the workers of a runner; wait until all have finished.

    A runner may call the function again for an item whose worker was lost. Therefore the function
    must be idempotent. Its results must be files that the workers and this process share. Paths
    may be relative if the working directory of this process exists on the workers too.

    Args:
        function: Function of a module of jaxvid, which must be installed on the workers.
        items: Arguments; one of them is the unit of work that is repeated after a failure.
        runner: The runner.

    Raises:
        InputError: Apache Beam is not installed, an option is invalid, or the pipeline failed.
    """
    if not items:
        return
    new_pipeline = runner.make_pipeline()
    import apache_beam as beam

    work = functools.partial(_call, function=function, folder=os.getcwd())
    print(f"running {len(items)} parts on {runner.name}", file=sys.stderr)
    try:
        with new_pipeline as pipeline:
            (
                pipeline
                | "Parts" >> beam.Create(list(items))
                # Without it, a runner may fuse all steps and run them on one worker.
                | "Distribute" >> beam.Reshuffle()
                | "Work" >> beam.Map(work)
            )
    except Exception as error:  # runners raise exceptions of many types
        raise InputError(
            f"{runner.name} failed ({_last_line(error)}); fix this and run the same command again "
            "to continue"
        ) from None


def _call(item: Any, function: Callable[[Any], None], folder: str) -> None:
    """Call a function on a worker, in the working directory of the command if it exists there."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    function(item)


def _last_line(error: Exception) -> str:
    """Return the last line of an error: runners put the traceback of a worker into the message.

    Spark and Flink append the Java stack, whose lines are skipped.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("at ", "... "))]
    return one_line(lines[-1] if lines else repr(error))
