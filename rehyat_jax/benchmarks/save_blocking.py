"""How long a save blocks the loop: python -m rehyat_jax.benchmarks.save_blocking [--config configs/demo_teacher.py].

The benchmark waits for every step, so that the time of `save` has only its own work: copying the state and starting the
write. The step that runs during the write shares the processors with it.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_collections

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.parallel.sharding import on_all_devices
from rehyat_jax.train import parse_arguments
from rehyat_jax.training.checkpoints import Keep, RunCheckpoints
from rehyat_jax.training.checksums import find_damage
from rehyat_jax.training.continuation import describe_run
from rehyat_jax.training.run_data import RunData
from rehyat_jax.training.setup import initial_model, open_data
from rehyat_jax.training.stages import assemble


def measure(config: ml_collections.ConfigDict, folder: Path, saves: int) -> dict[str, list[float]]:
    """Seconds of each kind, one figure for every save, in a run that trains the complete transformer."""
    source = open_data(config)
    data = RunData(source, config, seed=config.seed, accumulation_steps=config.accumulation_steps)
    model = initial_model(config)
    context = {"null_text": on_all_devices(source.null_text)}
    (step, initial_state, _), params, context = assemble(model.model_def, model.params, model.specs, context, config)
    state = initial_state(params, context)
    del model, params
    checkpoints = RunCheckpoints(folder, Keep(2))
    times = {kind: [] for kind in ("a step alone", "save() in the loop", "the step after it", "until it is on disk")}
    times |= {"comparing a checkpoint with its checksums": []}

    def timed(kind: str, function, *arguments):
        started = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        times[kind].append(time.perf_counter() - started)
        return result

    state, _ = jax.block_until_ready(step(state, context, data.on_mesh(next(data))))
    for number in range(1, saves + 1):
        state, _ = timed("a step alone", step, state, context, data.on_mesh(next(data)))
        description = describe_run(config, data.get_state(), examples=len(source))
        started = time.perf_counter()
        timed("save() in the loop", checkpoints.save, number, state, description)
        state, _ = timed("the step after it", step, state, context, data.on_mesh(next(data)))
        checkpoints.wait()
        times["until it is on disk"].append(time.perf_counter() - started)
        timed("comparing a checkpoint with its checksums", find_damage, checkpoints.directory / str(number))
    checkpoints.close()
    data.close()
    return times


def main() -> None:
    parser = CommandParser("benchmarks.save_blocking", __doc__, "--saves 10")
    parser.add_argument("--config", default="configs/demo_teacher.py")
    parser.add_argument("--saves", type=int, default=10)
    arguments = parser.parse_args()
    config = parse_arguments(["train", f"--config={arguments.config}", "--workdir=unused"]).config
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        times = measure(config, Path(folder), arguments.saves)
        bytes_on_disk = sum(file.stat().st_size for file in (Path(folder) / str(arguments.saves)).rglob("*"))
    alone = times["a step alone"]
    print(
        "| | fastest, ms | share of the fastest step | median, ms | share of the median step |\n|---|---|---|---|---|"
    )
    for kind, seconds in times.items():
        cells = (f"{1e3 * of(seconds):.1f} | {of(seconds) / of(alone):.1%}" for of in (min, statistics.median))
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"\n{arguments.saves} saves of {bytes_on_disk / 1e6:.1f} MB; {describe_environment()}")


if __name__ == "__main__":
    main()
