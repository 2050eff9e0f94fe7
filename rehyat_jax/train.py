"""Trains a model: python -m rehyat_jax.train --config configs/NAME.py --workdir DIR [--config.field=value ...].

The configuration names the stage:

  pretrain   a softmax model from scratch
  distill    stage 1: the feature maps of the hybrid blocks, against the model's own softmax attention
  velocity   the feature maps again, against the velocity of the complete softmax model
  finetune   stage 2: the complete transformer, on videos, on a teacher's velocity, or on both
  guidance, consistency, dmd   a student of few steps, without guidance (docs/few_steps.md)

With `config.lora.rank`, the last five train low-rank adapters, and "velocity" and "finetune" also the feature maps.

`--help` and docs/configuration.md list every field. The command writes `config.json`, `metrics.jsonl`, `tensorboard/`
and `checkpoints/` into the workdir, and at the end `model/`, a model checkpoint. With `config.lora.rank`, `adapter/`
has the adapters alone as well, for diffusers (docs/velocity.md). The same command resumes a stopped run. docs/faults.md
describes what happens when something goes wrong.

On several hosts, run the same command on each of them, with a workdir that all of them see. Cloud TPUs, Slurm, Open MPI
and Kubernetes are recognised; elsewhere give `--coordinator HOST:PORT --num_processes N --process_id I`.

Options:

  --config FILE.py                   the configuration
  --config.field=value ...           other values of its fields
  --workdir DIR                      the directory of the run
  --coordinator, --num_processes, --process_id   see above

Example:

  python -m rehyat_jax.train --config configs/demo_distill.py --workdir runs/distill --config.seed=1
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags

from rehyat_jax.cli import print_message, printed_help, report_input_errors
from rehyat_jax.distributed import initialize, is_main_process
from rehyat_jax.errors import InputError, RunStoppedError
from rehyat_jax.evaluation.evaluators import Situation, check_evaluators, make_evaluators
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.models.lora import is_adapter, merged, split_tree
from rehyat_jax.parallel.compile_cache import keep_compiled_programs
from rehyat_jax.parallel.mesh import check_batch, make_mesh
from rehyat_jax.parallel.sharding import abstract_arrays, on_all_devices
from rehyat_jax.planning.memory import check_memory, reported_memory_errors
from rehyat_jax.training import distill
from rehyat_jax.training.checkpoints import Keep, RunCheckpoints
from rehyat_jax.training.command_line import parsed_config
from rehyat_jax.training.config import check_config, save_config
from rehyat_jax.training.continuation import check_continuation, describe_run
from rehyat_jax.training.directories import run_directories
from rehyat_jax.training.fields_page import fields_help
from rehyat_jax.training.inputs import input_fingerprints
from rehyat_jax.training.metrics import MetricWriter
from rehyat_jax.training.optimizer import learning_rate_schedule
from rehyat_jax.training.profile import StepTrace
from rehyat_jax.training.run_control import RunControl
from rehyat_jax.training.run_data import RunData
from rehyat_jax.training.setup import (
    calibration_batch,
    check_data,
    check_trajectories,
    initial_model,
    load_teacher,
    open_data,
)
from rehyat_jax.training.stages import STAGES, assemble, lora_config
from rehyat_jax.training.stop_signal import ALL_WAS_SAVED, StopSignal
from rehyat_jax.training.trouble import check_finite, next_batch, report_divergence
from rehyat_jax.weights.adapters import save_adapters
from rehyat_jax.weights.model_checkpoint import check_params, save_model


def train(config: ml_collections.ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None = None) -> Path:
    """Runs the configured stage to its last step.

    Args:
      config: see `rehyat_jax.training.config.default_config`.
      workdir: directory of the run; created if needed. Several processes must see the same one.
      devices: devices to train on; all by default.

    Returns:
      Path of the resulting model checkpoint.

    Raises:
      InputError: the configuration, the data or the initial model is wrong, or something cannot be read or written.
      RunStoppedError: SIGTERM asked the run to stop.
      RunDivergedError: config.max_skipped updates in a row were skipped.
    """
    check_config(config)
    check_evaluators(config)
    mesh = make_mesh(config.mesh, devices)
    with (
        reported_memory_errors(),
        run_directories(config, workdir),
        jax.set_mesh(mesh),
        StopSignal() as stop_signal,
    ):
        return _train(config, workdir, stop_signal)


def _train(config: ml_collections.ConfigDict, workdir: Path, stop_signal: StopSignal) -> Path:
    mesh, is_main = jax.sharding.get_mesh(), is_main_process()

    # ---------------------------------------------------------------------------------------------------------- data
    source = open_data(config)
    check_batch(mesh, config.batch_size // config.accumulation_steps)
    data = RunData(
        source,
        config,
        seed=config.seed,
        accumulation_steps=config.accumulation_steps,
        workers=config.data.workers,
    )

    # --------------------------------------------------------------------------------------------------- checkpoints
    keep = Keep(config.keep_checkpoints, config.keep_every, config.keep_best)
    checkpoints = RunCheckpoints(config.checkpoint_dir or workdir / "checkpoints", keep)
    first_step = checkpoints.latest_step or 0
    is_new = checkpoints.latest_step is None
    inputs = input_fingerprints(config, source)
    describe = lambda: describe_run(config, data.get_state(), examples=len(source), inputs=inputs)
    if not is_new:
        saved = checkpoints.description()
        changes = check_continuation(saved, describe(), first_step, str(workdir))
        data.set_state(saved["data"])
        if is_main:
            print_message(f"continuing {workdir} after step {first_step}", result=True)
            if changes:
                print_message(f"with a command that differs from the run's:\n{changes}", result=True)

    # --------------------------------------------------------------------------------------------------------- model
    # A resumed run takes its trained parameters from its checkpoint and reads only the frozen ones here.
    stage = STAGES[config.stage]
    model = initial_model(config, with_values=False)
    check_data(source, model, config)
    if is_new:
        check_trajectories(source, config)
    _, saved_params = split_tree(model.params, is_adapter)  # adapters are merged at the end
    check_params(saved_params, model.config)  # or the result could not be saved
    check_memory(config, model.config, source)
    if is_new or stage.freezes(config):
        model = initial_model(config)
    params, context = model.params, {"null_text": on_all_devices(source.null_text)}
    if teacher := stage.teacher_path(config):
        context["teacher"] = load_teacher(model, config, teacher)
    if model.fresh_feature_maps and is_new:
        batch = calibration_batch(source, config)
        params = distill.calibrated(model.model_def, params, batch, context["null_text"], config)

    # ---------------------------------------------------------------------------------------------------------- step
    schedule = learning_rate_schedule(config.optimizer.learning_rate, config)
    sharded, params, context = assemble(model.model_def, params, model.specs, context, config)
    step, initial_state, state_shardings = sharded
    if is_new:
        state = initial_state(params, context)
    else:
        state = checkpoints.restore(abstract_arrays(jax.eval_shape(initial_state, params, context), state_shardings))
    del params
    model = model._replace(params={})
    if is_main:
        save_config(config, workdir)

    # ---------------------------------------------------------------------------------------------------------- loop
    situation = Situation(model.model_def, model.config, source, context["null_text"], config)
    result = lambda: stage.join(state["ema"] or stage.of_result(state["params"]), context.get("frozen", {}))
    writer = MetricWriter(
        workdir, first_step=first_step, steps=config.steps, description=config.stage, is_silent=not is_main
    )
    trace = StepTrace(config.profile, workdir / "profile")
    # A save in progress is always finished.
    with closing(data), closing(writer), closing(checkpoints), closing(trace):
        control = RunControl(config, first_step, writer, stop_signal, schedule, make_evaluators(situation))
        for number in range(first_step + 1, config.steps + 1):
            try:
                batch = next_batch(data, number, writer.trouble)
            except InputError:
                if number > first_step + 1:
                    check_finite(state, number - 1, checkpoints.latest_step)
                    checkpoints.save(number - 1, state, describe())
                raise
            with trace.step(number):
                state, metrics = step(state, context, data.on_mesh(batch))
            trace.after(number, metrics)
            decision = control.after_step(number, metrics, more=data.metrics, params=result)
            if decision.save:
                check_finite(state, number, checkpoints.latest_step)
                checkpoints.save(number, state, describe(), decision.loss)
            if decision.skipped:
                report_divergence(workdir, data, number, decision.skipped)
            if decision.stop:
                raise RunStoppedError(ALL_WAS_SAVED)
            checkpoints.check()

    # -------------------------------------------------------------------------------------------------------- result
    params = result()
    if lora := lora_config(config):
        with reported_write_errors(workdir / "adapter"):
            save_adapters(workdir / "adapter", model.config, split_tree(params, is_adapter)[0], lora)
        params = merged(params, lora)
    with reported_write_errors(workdir / "model"):
        names = dict(codec=model.codec, text_encoder=model.text_encoder, models=model.models)
        how = dict(noise_by_chunk=config.noise_by_chunk, sampling=stage.sampling(config))
        save_model(workdir / "model", model.config, params, **how, **names)
    return workdir / "model"


class Arguments(NamedTuple):
    """The command line: the configuration with its overrides, the workdir, and options of `distributed.initialize`."""

    config: ml_collections.ConfigDict
    workdir: Path
    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line.

    Args:
      argv: the program's name and its arguments.

    Raises:
      InputError: a flag or a field is missing, unknown or has a wrong value, or the configuration file cannot be run.
    """
    values = flags.FlagValues()
    workdir_flag = flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    processes = (
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, of several", flag_values=values),
        flags.DEFINE_integer("num_processes", None, "processes of the run", flag_values=values),
        flags.DEFINE_integer("process_id", None, "which of them this is", flag_values=values),
    )
    config = parsed_config(values, argv, workdir_flag)
    if not workdir_flag.value or "://" in workdir_flag.value:
        raise InputError(
            f"--workdir: expected a directory of a filesystem, found {workdir_flag.value!r}; give one that all "
            f"processes see. only config.checkpoint_dir may be in an object store"
        )
    return Arguments(config, Path(workdir_flag.value), *(flag.value for flag in processes))


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code, 2 if the user's input is wrong."""
    argv = sys.argv if argv is None else ["train", *argv]
    if printed_help(argv, f"{__doc__}\n{fields_help()}"):
        return 0

    def run() -> None:
        config, workdir, *processes = parse_arguments(argv)
        initialize(*processes)
        keep_compiled_programs()
        model = train(config, workdir)
        if is_main_process():
            print_message(f"wrote {model}", result=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
