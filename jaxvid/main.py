"""Train and evaluate.

jaxvid train --config CONFIG --workdir FOLDER       train or resume, then evaluate
jaxvid eval --config CONFIG --workdir FOLDER        evaluate the newest checkpoint, or the model
                                                    folder --config.init_from if it is set
jaxvid schedule --config CONFIG --workdir FOLDER    plot the learning rate
jaxvid plan --config CONFIG                         print the memory of a training step
... --config.FIELD=VALUE                            override a field of configs/common.py
jaxvid eval ... --compare OTHER                     compare with the evaluation in another folder
jaxvid eval ... --onnx FILE                         evaluate an exported ONNX file
jaxvid train ... --profile 10:20                    write a profiler trace of steps 10 to 19
... --coordinator HOST:PORT --num_processes N --process_id I     one process of several

CONFIG is a config file, or the name of one that comes with jaxvid, e.g. xvit_k600 or motion:stam.
In a checkout, `python main.py --mode MODE` is the same as `jaxvid MODE`.

Exit codes: 0: done; 2: invalid input, printed as one line; 130 or 143: stopped by SIGINT or SIGTERM
in any process of the run. Training saves its state before it stops; run the same command to resume.
"""

import functools
import gc
import sys

from absl import app, flags

from jaxvid import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, reports.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "schedule", "plan"],
    "train: train or resume, then evaluate. eval: evaluate the newest checkpoint, or the model "
    "folder --config.init_from if it is set. schedule: plot the learning rate. plan: print the "
    "memory of a training step, without data. Default: train.",
)
COMPARE = flags.DEFINE_string(
    "compare",
    None,
    "eval.json of an earlier evaluation, or its folder. The videos whose result changed are "
    "written to comparison.json, and the difference is tested for significance. Requires --mode "
    "eval.",
)
ONNX = flags.DEFINE_string(
    "onnx",
    None,
    "ONNX file, written by jaxvid export, to evaluate with ONNX Runtime on the CPU instead of a "
    "checkpoint or model folder. Requires --mode eval.",
)
MEMORY = flags.DEFINE_float(
    "memory_gb",
    None,
    "Memory of a device in GB: also print the largest batch size that fits, to within 2 %.",
)
PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP: training steps to trace, without STOP. Requires --mode train."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, the same in all processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", 300.0, "Seconds to wait for the other processes at the start. Default: 300."
)
_MODES = {"compare": "eval", "onnx": "eval", "profile": "train", "memory_gb": "plan"}
for _name, _mode in _MODES.items():
    flags.register_multi_flags_validator(
        ("mode", _name),
        lambda values, name=_name, mode=_mode: not values[name] or values["mode"] == mode,
        f"--{_name} requires --mode {_mode}; set --mode {_mode} or remove --{_name}",
    )


def run(_) -> None:
    """Run the program that the flags select; print invalid input as one line, exit code 2."""
    cli.hide_unfinished_saves()
    from jaxvid import plan, remote_folder
    from jaxvid.distributed import process_group, setup
    from jaxvid.errors import InputError, with_addresses
    from jaxvid.evaluate import evaluate
    from jaxvid.experiment import choose_without_training, resolve
    from jaxvid.storage import workdir_lock
    from jaxvid.train import train
    from jaxvid.training.plots import draw_schedule
    from jaxvid.training.run_config import check_same_everywhere

    try:
        if MODE.value == "plan":
            experiment = resolve(CONFIG.value)
            setup.use_compilation_cache()
            setup.provide_cpu_devices(experiment.mesh.size)
            experiment = choose_without_training(experiment)
            print(plan.describe(experiment, MEMORY.value))
            return
        # Joining the processes starts JAX's backend, which fixes XLA's flags.
        workdir = remote_folder.local_folder(WORKDIR.value)
        setup.prepare_compilation(workdir, deterministic=CONFIG.value.deterministic)
        setup.init_processes(
            COORDINATOR.value,
            NUM_PROCESSES.value,
            PROCESS_ID.value,
            join_seconds=JOIN_SECONDS.value,
        )
        with process_group.failing_together():
            profile_steps = cli.parse_range("profile")
            check_same_everywhere(CONFIG.value.to_dict())
            if MODE.value == "train":
                train(CONFIG.value, WORKDIR.value, profile_steps=profile_steps)
            elif MODE.value == "eval":
                evaluate(CONFIG.value, WORKDIR.value, compare_with=COMPARE.value, onnx=ONNX.value)
            else:
                experiment = choose_without_training(resolve(CONFIG.value))
                with workdir_lock.open_workdir(WORKDIR.value) as workdir:
                    picture = draw_schedule(
                        experiment.optimizer,
                        workdir,
                        batch_size=experiment.batch_size,
                        num_epochs=experiment.num_epochs,
                    )
                    print(with_addresses(str(picture)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        gc.collect()  # while messages about a failed save can still be hidden
        sys.exit(error.EXIT_CODE)


def _end_other_processes(values: dict[str, str], cause: str) -> None:
    from jaxvid.distributed import setup  # takes seconds

    setup.end_other_processes(values, cause)


def main() -> None:
    """Parse the flags and run the program that they select."""
    parse = functools.partial(
        cli.parse_flags,
        doc=__doc__,
        module=__name__,
        needed=lambda: {} if MODE.value == "plan" else {"workdir": "FOLDER"},
        end_other_processes=_end_other_processes,
    )
    app.run(run, flags_parser=parse)
