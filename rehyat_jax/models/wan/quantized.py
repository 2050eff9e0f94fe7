"""Blocks whose widest layers multiply numbers of 8 bits, for sampling.

y = (x_q W_q) s_x s_W + b, where x_q = round(x / s_x) and W_q = round(W / s_W):

- W_q is made once. s_W is a scale for every column of W, so that the column's largest weight is the largest number.
- s_x is one scale for every block and input, from the largest value that the input took in a calibration. Larger values
  are clipped. Scales of every token would be more exact. They need another pass over the input, which costs as much as
  the narrower product saves (docs/cheaper_sampling.md).

qwix quantises the weights and multiplies; the products of int8 are summed in int32, those of fp8 in float32. Its own
calibration replaces functions of JAX while a model is called, and keeps statistics in the model. Here, blocks exist
only inside a scan, so the scales are measured by `input_ranges`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.models.linear import Linear
from rehyat_jax.models.modulation import times_gate
from rehyat_jax.models.wan.modeling import WanTransformer

Numbers = Literal["int8", "fp8"]
"""The numbers of 8 bits: integers, or float8_e4m3fn."""

_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}

INPUTS = {
    "self_attention.query": "self_attention",
    "self_attention.key": "self_attention",
    "self_attention.value": "self_attention",
    "feed_forward.up": "feed_forward",
    "feed_forward.down": "feed_forward.down",
}
"""Name of every layer of a block that can be quantised -> name of its input, which some layers share.

Three projections are left out, because rounding their inputs costs nearly the cycles that their products save: the
outputs of both kinds of attention, and the queries of cross-attention. Layers that share an input, and wide ones, gain.
"""


class QuantizedLinear(nnx.Module):
    """A `Linear` without an adapter, by numbers of 8 bits.

    Args:
      layer: the layer; its kernel is [..., in, out], with the leading axes of stacking.
      input_scale: s_x, float32 [..., 1, 1, 1].
      numbers: the numbers.
    """

    def __init__(self, layer: Linear, input_scale: nnx.Param, numbers: Numbers):
        kernel, scale = _narrowed(layer.kernel[...], numbers)
        self.kernel = layer.kernel.replace(kernel)
        self.kernel_scale = nnx.Param(scale, axes=(None, *layer.bias.get_metadata()["axes"]))
        self.bias = layer.bias
        self.input_scale = input_scale
        self.numbers = numbers

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, in] -> [B, N, out] in the same dtype."""
        from qwix import QArray, dot

        scaled = x.astype(jnp.float32) / self.input_scale[...]
        largest = _LARGEST[self.numbers]
        rounded = jnp.round(scaled) if self.numbers == "int8" else scaled
        quantized = jnp.clip(rounded, -largest, largest).astype(_DTYPES[self.numbers])
        y = dot(QArray(quantized, self.input_scale[...]), QArray(self.kernel[...], self.kernel_scale[...]))
        return (y + self.bias[...].astype(y.dtype)).astype(x.dtype)

    def gated(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """See `Linear.gated`."""
        return times_gate(self(x).astype(gate.dtype), gate)


@functools.partial(jax.jit, static_argnums=1)
def _narrowed(kernel: jax.Array, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
    """(W_q [..., in, out], s_W [..., 1, out]). Compiled, so that kernels of all blocks are not held in float32."""
    import qwix

    axes = range(kernel.ndim)
    found = qwix.quantize(kernel.astype(jnp.float32), _DTYPES[numbers], channelwise_axes=[*axes[:-2], axes[-1]])
    return found.qvalue, found.scale


class _Observed(nnx.Module):
    """A layer that reports the range of its input."""

    def __init__(self, layer: Linear, report: Callable[[jax.Array], None]):
        self.layer, self.report = layer, report

    def __call__(self, x: jax.Array) -> jax.Array:
        self.report(x)
        return self.layer(x)

    def gated(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        self.report(x)
        return self.layer.gated(x, gate)


def input_ranges(
    model: WanTransformer, latents: jax.Array, timestep: jax.Array, text: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`WanTransformer.__call__`, and the largest |x| of every input of `INPUTS` in every block, float32 [blocks]."""
    embedded = model.embedded(latents, timestep, text)
    block_def, params = nnx.split(model.blocks)

    def run(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        ranges: dict[str, jax.Array] = {}
        params, arguments = layer
        block = nnx.merge(block_def, params)

        def observed(name: str, layer: Linear) -> _Observed:
            return _Observed(layer, lambda x: ranges.update({INPUTS[name]: jnp.abs(x).max().astype(jnp.float32)}))

        _replace_layers(block, observed)
        attend = lambda inputs: model.attend(inputs, arguments)
        conditions = embedded.conditions
        x, _ = block(x, conditions.text, conditions.time_modulation, embedded.rope, embedded.frames, attend)
        return x, ranges

    x, ranges = jax.lax.scan(run, embedded.x, (params, model.per_block_attention()))
    return model.velocity_of(embedded, x), ranges


def quantized(
    model: WanTransformer, numbers: Numbers, ranges: Mapping[str, jax.Array], *, exact: Sequence[str] = ()
) -> WanTransformer:
    """Quantises the layers of `INPUTS` in all blocks, in place, and returns the model.

    Everything else keeps its dtype: the other projections, embedders, head, norms, modulation, feature maps and
    attention itself.

    Args:
      model: a model without adapters; merge them first.
      numbers: "int8" or "fp8".
      ranges: of `input_ranges`, the largest of a calibration.
      exact: names of layers that stay as they are.

    Raises:
      ValueError: a name is unknown, or a layer has an adapter.
    """
    if unknown := sorted(set(exact) - set(INPUTS)):
        raise ValueError(f"exact: expected some of {', '.join(INPUTS)}, found {', '.join(unknown)}")
    scale = lambda x: jnp.maximum(x, jnp.finfo(jnp.float32).tiny * 2**10) / _LARGEST[numbers]
    scales = {name: nnx.Param(scale(x)[:, None, None, None]) for name, x in ranges.items()}

    def checked(name: str, layer: Linear) -> Linear:
        if layer.lora is not None:
            raise ValueError(f"{name}: expected a layer without an adapter, found one; merge adapters first")
        return layer

    def narrow(name: str, layer: Linear) -> Linear | QuantizedLinear:
        return layer if name in exact else QuantizedLinear(layer, scales[INPUTS[name]], numbers)

    _replace_layers(model.blocks, checked)
    _replace_layers(model.blocks, narrow)
    return model


def unit_ranges(blocks: int) -> dict[str, jax.Array]:
    """Ranges of 1 for so many blocks, where only shapes matter."""
    return {name: jnp.ones(blocks) for name in INPUTS.values()}


def _replace_layers(block: Any, change: Callable[[str, Linear], Any]) -> None:
    for name in INPUTS:
        part, layer = name.split(".")
        module = getattr(block, part)
        setattr(module, layer, change(name, getattr(module, layer)))
