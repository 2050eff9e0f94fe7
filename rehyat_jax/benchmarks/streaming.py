"""Memory and speed of streamed sampling by length: python -m rehyat_jax.benchmarks.streaming [--topology v5e:2x2].

With --topology: compiles the programs of Wan2.1 1.3B, all blocks causal hybrid, 480x832, bfloat16, one video with
guidance, for one chip, and prints their peak memory and cycles. No TPU is needed. All parts of a video except the last
run one program, and equal programs are compiled once. The programs of sampling chunk by chunk follow.

Without: samples videos of the tiny preset on this machine's CPU. The arrays of JAX, weights included, are all that a
device would hold. The rise of resident memory, in a process of its own, includes the latents of the complete video,
which are in the host's memory by design. Times are medians of runs that take turns.
"""

import argparse
import functools
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.benchmarks.peak_memory import measuring_process, peak_bytes
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.cost_model.static_cycles import StaticProgram
from rehyat_jax.cost_model.tpu_compile import compiled_for_tpu
from rehyat_jax.cost_model.tpu_target import check_libtpu
from rehyat_jax.diffusion.samplers import Coefficients, SolverState, coefficient_table, solver_step
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.chunks import chunk_state, chunk_step
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.guidance import guided_velocity
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.generation.streaming import PART_CHUNKS, part_step, stream_latents
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.models.wan.streaming import initial_states, part_positions

LATENTS = (60, 104)
"""Height and width of the latents of 480x832."""


def lowered(devices: Sequence[jax.Device], *, frames: int, kind: str) -> jax.stages.Lowered:
    """One step of the solver for `frames` latent frames; a case of `compiled_for_tpu`.

    Args:
      devices: the first one is used.
      frames: of the part, or of the complete video.
      kind: "part", "last part", or "one pass" for the complete video at once; "chunk" for a step of a chunk that is
        sampled by itself, and "state" for the evaluation that follows its last step.
    """
    config = WAN_PRESETS["t2v-1.3B"].replace(hybrid_blocks="all", hybrid=HybridConfig())
    dtypes = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), **dtypes)))
    params = nnx.to_pure_dict(state)

    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    history = SolverState(*[array(1, frames, *LATENTS, config.in_channels)] * len(SolverState._fields))
    step = Coefficients(*(column[0] for column in coefficient_table(wan_grid(2, 5.0), "unipc")))
    text = array(1, config.text_length, config.text_dim)
    conditions = text, text, array()
    mesh = Mesh(np.array(devices[:1]), ("chip",))
    here = NamedSharding(mesh, PartitionSpec())
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=here), tree
    )
    with jax.set_mesh(mesh):
        if kind == "one pass":

            @functools.partial(jax.jit, donate_argnums=1)
            def run(params, history, step, conditions):
                model = functools.partial(apply_model(graphdef), params)
                return solver_step(guided_velocity(model, *conditions), history, step)

            return run.lower(*place((params, history, step, conditions)))
        tokens = LATENTS[0] * LATENTS[1] // 4
        states = jax.eval_shape(functools.partial(initial_states, config, 2, tokens, jnp.bfloat16))
        positions = part_positions(0, frames, config.head_dim)
        if kind == "chunk":
            return chunk_step.lower(graphdef, *place((params, states, history, step, positions, conditions)))
        if kind == "state":
            return chunk_state.lower(graphdef, *place((params, states, history.latents, positions, conditions)))
        arguments = place((params, states, history, step, positions, conditions))
        return part_step.lower(graphdef, kind == "last part", *arguments)


@functools.cache
def static_figures(topology: str, frames: int, kind: str) -> tuple[int, int]:
    """(peak bytes of HBM, cycles) of a program."""
    case = f"{__spec__.name}:{lowered.__name__}"
    with compiled_for_tpu(case, dict(frames=frames, kind=kind), topology, for_all_devices=True) as program:
        return program.peak_bytes, StaticProgram(program).cost().cycles


def print_static(topology: str, lengths: Sequence[int]) -> None:
    """Prints a table by length, and the ratio to one pass at the shortest length."""
    check_libtpu()
    part_frames = PART_CHUNKS * HybridConfig().chunk_frames
    print("| latent frames | parts | peak memory, GB | M cycles of a step |\n|---|---|---|---|")
    totals = {}
    for frames in lengths:
        parts = [part_frames] * (frames // part_frames) + ([frames % part_frames] if frames % part_frames else [])
        figures = [static_figures(topology, part, "part") for part in parts[:-1]]
        figures.append(static_figures(topology, parts[-1], "last part"))
        totals[frames] = sum(cycles for _, cycles in figures)
        peak = max(peak for peak, _ in figures)
        print(f"| {frames} | {len(parts)} | {peak / 1e9:.3f} | {totals[frames] / 1e6:,.1f} |", flush=True)
    first = min(lengths)
    peak, cycles = static_figures(topology, first, "one pass")
    print(
        f"\n{first} latent frames in one pass: {peak / 1e9:.3f} GB, {cycles / 1e6:,.1f} M cycles; streaming runs at "
        f"{cycles / totals[first]:.1%} of its speed"
    )
    chunk_frames = HybridConfig().chunk_frames
    (peak, cycles), (_, of_state) = (static_figures(topology, chunk_frames, kind) for kind in ("chunk", "state"))
    print(
        f"Chunk by chunk: {peak / 1e9:.3f} GB, {cycles / 1e6:,.1f} M cycles for a step of a chunk of {chunk_frames} "
        f"frames, and {of_state / 1e6:,.1f} M for its state"
    )


def tiny_video(frames: int, size: int) -> dict:
    """Arguments that `generate_latents` and `stream_latents` share: a model of the tiny preset, and noise."""
    config = WAN_PRESETS["tiny"].replace(hybrid_blocks="all", hybrid=HybridConfig())
    text = np.zeros((1, config.text_length, config.text_dim), np.float32)
    return dict(
        model=WanTransformer(config, rngs=nnx.Rngs(0)),
        text=text,
        negative_text=text,
        noise=np.array(host_noise(0, 1, (frames, size, size, config.in_channels))),  # no array of JAX
        guidance_scale=5.0,
        flow_shift=5.0,
    )


def memory(frames: int, size: int) -> tuple[int, int, int]:
    """Bytes while a video is sampled: the most in JAX's arrays, the rise of resident memory, the host's latents."""
    video = tiny_video(frames, size)
    stream_latents(**tiny_video(21, size), steps=2)  # compiles
    stopped, live = threading.Event(), [0]

    def watch() -> None:
        while not stopped.wait(0.002):
            live[0] = max(live[0], sum(array.nbytes for array in jax.live_arrays()))

    resident = peak_bytes(functools.partial(stream_latents, **video, steps=2))
    watcher = threading.Thread(target=watch)
    watcher.start()
    stream_latents(**video, steps=2)
    stopped.set()
    watcher.join()
    return live[0], resident, 4 * video["noise"].nbytes


def print_measured(lengths: Sequence[int], size: int, runs: int) -> None:
    """Prints memory by length, and the ratio of times at the shortest length."""
    print(f"tiny preset, latents of {size}x{size}, guidance, 2 steps; {describe_environment()}\n")
    print("| latent frames | arrays of JAX, MiB | rise of resident memory, MiB | latents on the host, MiB |")
    print("|---|---|---|---|")
    with measuring_process() as process:
        for frames in lengths:
            cells = (f"{count / 2**20:.1f}" for count in process.submit(memory, frames, size).result())
            print(f"| {frames} | {' | '.join(cells)} |", flush=True)

    video = tiny_video(min(lengths), size)
    seconds: dict = {generate_latents: [], stream_latents: []}
    for number in range(runs + 1):
        for sample, found in seconds.items():
            start = time.perf_counter()
            jax.block_until_ready(sample(**video, steps=2))
            if number:  # the first run compiles
                found.append(time.perf_counter() - start)
    one_pass, streamed = map(statistics.median, seconds.values())
    print(
        f"\n{min(lengths)} latent frames: one pass {one_pass:.3f} s, streamed {streamed:.3f} s (medians of {runs}); "
        f"streaming runs at {one_pass / streamed:.0%} of its speed"
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of the memory and the speed."""
    parser = CommandParser("benchmarks.streaming", __doc__, "--topology v5e:2x2 --frames 21 81 321")
    option = parser.add_argument
    option("--topology", help="v5e:2x2 v5p:2x2x1 v6e:2x2...: compile for one of its chips, and run nothing")
    option("--frames", type=int, nargs="+", default=[21, 201, 2001], help="latent frames (default: %(default)s)")
    option("--size", type=int, default=6, help="height and width of the latents on a CPU (default: %(default)s)")
    option("--runs", type=int, default=9, help="timed runs of each (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return report_input_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Runs the benchmark that the options choose."""
    if arguments.topology:
        print_static(arguments.topology, arguments.frames)
    else:
        print_measured(arguments.frames, arguments.size, arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
