"""Sections "train_*": a train step of real shapes with random weights."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from rehyat_jax.benchmarks.gpu_run.cases import train_case
from rehyat_jax.benchmarks.gpu_run.profile import kernel_times
from rehyat_jax.benchmarks.gpu_run.random_arrays import random_arrays
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.planning.train_step import abstract_step
from rehyat_jax.training.stages import STAGES

WARM_UP_STEPS, STEPS = 1, 3


def rows(sizes: Sizes, **case: Any) -> Iterator[Row]:
    """First a row with the step's time, memory and FLOPs, then one for each of the longest kernels.

    Args:
      sizes: sizes of the model and the video.
      **case: keyword arguments of `cases.train_case`.
    """
    config, wan, latents = train_case(sizes, **case)
    flops = STAGES[config.stage].step_flops(wan, latents, config)
    device = jax.devices()[0]
    with jax.set_mesh(make_mesh(config.mesh, [device])):
        abstract = abstract_step(config, wan, latents)
        start = time.perf_counter()
        step = abstract.step.lower(abstract.state, abstract.context, abstract.batch).compile()
        compile_seconds = time.perf_counter() - start
        memory = step.memory_analysis()
        state, context = random_arrays(abstract.state), random_arrays(abstract.context)
        # Second moments are not negative.
        absolute = jax.jit(lambda tree: jax.tree.map(abs, tree), donate_argnums=0)
        state["opt_state"] = absolute(state["opt_state"])
        batch = random_arrays(abstract.batch, scale=1.0)

        seconds = []
        for _ in range(WARM_UP_STEPS + STEPS):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, context, batch))
            seconds.append(time.perf_counter() - start)
        milliseconds = 1e3 * statistics.median(seconds[WARM_UP_STEPS:])
        yield {
            "stage": case["stage"],
            "model": sizes.preset,
            "latents": latents,
            "hybrid_blocks": len(wan.hybrid_block_indices),
            "blocks": wan.num_layers,
            "remat": config.remat,
            "implementation": config.attention_implementation,
            "milliseconds": milliseconds,
            "compile_seconds": compile_seconds,
            "model_tflop": flops.model / 1e12,
            "recomputed_tflop": flops.recomputed / 1e12,
            "loss": float(metrics["loss"]),
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        yield from kernel_times(lambda: jax.block_until_ready(step(state, context, batch)), step.as_text())
