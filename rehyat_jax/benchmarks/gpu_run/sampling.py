"""Section "sampling": one guided step of the softmax, all-hybrid and diffusers models with the same weights."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.benchmarks.gpu_run.random_arrays import abstract_params, random_params
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.flops import forward_flops
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model

GUIDED = 2
"""The batch size of a step with guidance: one row with the prompt, one without."""


def rows(sizes: Sizes) -> Iterator[Row]:
    """Rows of the short video (hybrid, softmax), the long video, and diffusers; times are for one model evaluation."""
    softmax = WAN_PRESETS[sizes.preset]
    hybrid = softmax.replace(hybrid_blocks="all")
    params = random_params(abstract_params(hybrid))
    # A softmax model has the same parameters except the feature maps.
    without_maps = {name: tree for name, tree in params.items() if name != "feature_maps"}
    inputs = _inputs(sizes, softmax, sizes.latents[0])
    velocity, row = _step(hybrid, params, inputs, sizes.repeats)
    yield row
    velocity, row = _step(softmax, without_maps, inputs, sizes.repeats)
    yield row
    long = _inputs(sizes, softmax, sizes.long_frames)
    yield _step(hybrid, params, long, sizes.repeats)[1]
    yield _step(softmax, without_maps, long, 1)[1]
    # Last, so that a failure in PyTorch costs no other row.
    yield _diffusers_step(softmax, without_maps, inputs, velocity, sizes)


def _inputs(sizes: Sizes, config: WanConfig, frames: int) -> dict[str, jax.Array]:
    """Latents, timestep and text of a guided step: both halves see the same latents."""
    latents = jax.random.normal(jax.random.key(1), (1, frames, *sizes.latents[1:], config.in_channels))
    text = jax.random.normal(jax.random.key(2), (GUIDED, config.text_length, config.text_dim))
    return dict(latents=jnp.repeat(latents, GUIDED, axis=0), timestep=jnp.full(GUIDED, 737.0), text=text)


def _step(config: WanConfig, params: Any, inputs: dict[str, jax.Array], repeats: int) -> tuple[np.ndarray, Row]:
    """(velocity, row) of this package's model in bfloat16."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))
    start = time.perf_counter()
    run = jax.jit(apply_model(graphdef)).lower(params, **inputs).compile()
    compile_seconds = time.perf_counter() - start
    velocity = np.asarray(run(params, **inputs))  # and warms up
    model = "all hybrid" if config.hybrid_blocks else "softmax"
    took = _milliseconds(lambda: jax.block_until_ready(run(params, **inputs)), repeats)
    row = _row(model, config, inputs, took) | {"compile_seconds": compile_seconds}
    return velocity, row | {"temporary_bytes": run.memory_analysis().temp_size_in_bytes}


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that waits for its results and has run before."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _row(model: str, config: WanConfig, inputs: dict[str, jax.Array], took: float) -> Row:
    latents = inputs["latents"].shape[1:4]
    count = forward_flops(config, latents)
    total = count.outside + count.blocks
    return {"model": model, "frames": latents[0], "milliseconds": took, "tflop": GUIDED * total / 1e12}


def _diffusers_step(
    config: WanConfig, params: Any, inputs: dict[str, jax.Array], velocity: np.ndarray, sizes: Sizes
) -> Row:
    import torch

    from rehyat_jax.benchmarks.gpu_run.torch_weights import diffusers_transformer

    device = "cuda" if sizes.device == "gpu" else "cpu"
    transformer = diffusers_transformer(config, params, torch.bfloat16, device)
    as_tensor = lambda array: torch.from_dlpack(jax.block_until_ready(array)).to(device)
    latents = as_tensor(inputs["latents"]).permute(0, 4, 1, 2, 3).bfloat16()
    timestep, text = as_tensor(inputs["timestep"]), as_tensor(inputs["text"]).bfloat16()

    def run():
        with torch.no_grad():
            result = transformer(latents, timestep, text).sample
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    theirs = run().permute(0, 2, 3, 4, 1).float().cpu().numpy()
    took = _milliseconds(run, sizes.repeats)
    difference = np.sqrt(np.mean((theirs - velocity) ** 2) / np.mean(theirs**2))
    return _row("diffusers", config, inputs, took) | {"rms_difference_from_ours": float(difference)}
