"""The attentions that the CPU benchmark compares, each as a call without arguments, with inputs and compiled program.

All compute y from queries, keys and values in float32; the hybrid ones include their feature maps. "forward and
backward" adds the gradients of queries, keys, values and feature maps.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, HybridState, hybrid_attention
from rehyat_jax.cli import not_a_command

CHUNK_FRAMES, OVERLAP_FRAMES = 3, 1
FORWARD, BACKWARD = "forward", "forward and backward"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of videos; queries, keys and values are [batch, frames * tokens_per_frame, heads, head_dim]."""

    batch: int
    frames: int
    tokens_per_frame: int
    heads: int
    head_dim: int

    @property
    def array(self) -> tuple[int, int, int, int]:
        return self.batch, self.frames * self.tokens_per_frame, self.heads, self.head_dim

    @property
    def form(self) -> dict[str, int]:
        return {
            "tokens_per_frame": self.tokens_per_frame,
            "chunk_frames": CHUNK_FRAMES,
            "overlap_frames": OVERLAP_FRAMES,
        }


Run = Callable[[], Any]


def prepare(attention: str, shape: Shape, direction: str) -> Run | None:
    """The attention named in `ATTENTIONS` as a call that repeats all its work; None if it lacks the direction."""
    return ATTENTIONS[attention](shape, direction)


def _random_inputs(shape: Shape) -> list[np.ndarray]:
    """Query, key, value, cotangent."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape.array, dtype=np.float32) for _ in range(4)]


def _jax_run(attend: Callable, maps: Any, shape: Shape, direction: str) -> Run:
    """attend(maps, query, key, value) -> y."""
    *inputs, cotangent = (jnp.asarray(array) for array in _random_inputs(shape))

    def gradients(maps, query, key, value, cotangent):
        output, pullback = jax.vjp(attend, maps, query, key, value)
        return output, pullback(cotangent)

    function, arguments = (attend, ()) if direction == FORWARD else (gradients, (cotangent,))
    arguments = (maps, *inputs, *arguments)
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def _jax_maps(shape: Shape) -> tuple[Any, Any]:
    """(graph definition, state) of the feature maps of queries and keys."""
    make = lambda: FeatureMap(FeatureMapConfig(), heads=shape.heads, head_dim=shape.head_dim, rngs=nnx.Rngs(0))
    return nnx.split((make(), make()))


def _jax_hybrid(implementation: str) -> Callable[[Shape, str], Run]:
    def prepare(shape: Shape, direction: str) -> Run:
        graphdef, maps = _jax_maps(shape)

        def attend(maps, query, key, value):
            phi_query, phi_key = nnx.merge(graphdef, maps)
            return hybrid_attention(
                query, key, value, phi_query(query), phi_key(key), implementation=implementation, **shape.form
            )

        return _jax_run(attend, maps, shape, direction)

    return prepare


def _jax_hybrid_streamed(shape: Shape, direction: str) -> Run | None:
    """Attends to complete chunks one after another and frees each output, like generation."""
    if direction == BACKWARD or shape.frames % CHUNK_FRAMES:
        return None
    graphdef, maps = _jax_maps(shape)

    @jax.jit
    def step(maps, state, query, key, value):
        phi_query, phi_key = nnx.merge(graphdef, maps)
        return hybrid_attention(
            query, key, value, phi_query(query), phi_key(key), initial_state=state, return_state=True, **shape.form
        )

    inputs = [np.split(array, shape.frames // CHUNK_FRAMES, axis=1) for array in _random_inputs(shape)[:3]]
    chunks = [tuple(map(jnp.asarray, chunk)) for chunk in zip(*inputs, strict=True)]
    start = HybridState.zeros(
        shape.batch,
        shape.heads,
        shape.head_dim,
        FeatureMapConfig().features,
        tokens_per_frame=shape.tokens_per_frame,
        overlap_frames=OVERLAP_FRAMES,
    )
    compiled = step.lower(maps, start, *chunks[0]).compile()

    def run():
        state = start
        for chunk in chunks:
            output, state = jax.block_until_ready(compiled(maps, state, *chunk))
        return output

    return run


def _torch_run(attend: Callable, parameters: list[Any], shape: Shape, direction: str) -> Run:
    """attend(query, key, value) -> y, with the gradients of the parameters, which are tensors."""
    import torch

    *inputs, cotangent = map(torch.from_numpy, _random_inputs(shape))
    if direction == FORWARD:

        def run():
            with torch.no_grad():
                return attend(*inputs)

    else:
        differentiable = [array.requires_grad_() for array in inputs] + parameters
        run = lambda: torch.autograd.grad(attend(*inputs), differentiable, cotangent)
    return run


def _torch_hybrid(shape: Shape, direction: str) -> Run:
    from rehyat_jax.pytorch import rehyat_torch

    phi_query, phi_key = (rehyat_torch.FeatureMap(shape.heads, shape.head_dim) for _ in range(2))

    def attend(query, key, value):
        return rehyat_torch.hybrid_attention(query, key, value, phi_query(query), phi_key(key), **shape.form)

    return _torch_run(attend, [*phi_query.parameters(), *phi_key.parameters()], shape, direction)


def _torch_full(shape: Shape, direction: str) -> Run:
    from torch.nn.functional import scaled_dot_product_attention

    attend = lambda *arrays: scaled_dot_product_attention(*(x.transpose(1, 2) for x in arrays)).transpose(1, 2)
    return _torch_run(attend, [], shape, direction)


ATTENTIONS = {
    "full attention, PyTorch": _torch_full,
    "hybrid, reference": _jax_hybrid("reference"),
    "hybrid, PyTorch": _torch_hybrid,
    "hybrid, xla": _jax_hybrid("xla"),
    "hybrid, scan": _jax_hybrid("scan"),
    "hybrid, streamed": _jax_hybrid_streamed,
}
"""Name -> (shape, direction) -> call. "streamed" gives the default implementation a video chunk by chunk."""


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.cpu"))
