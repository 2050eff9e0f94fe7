"""The Wan2.1 text-to-video diffusion transformer as Flax NNX modules, with softmax or hybrid self-attention per block.

The numerics follow Wan2.1's `WanModel` and diffusers' `WanTransformer3DModel`: parameters are float32, matrix products
run in the compute dtype, and the timestep path, modulation, normalisation, gated residuals and head are float32. With
float64 as the compute dtype, which tests use, everything that depends on the latents is float64.

Blocks are stacked on a leading axis and scanned, so compile time does not grow with depth. A block does not know which
attention it runs: it is given `attend`, a function from queries, keys and values to the attention's output. Softmax
blocks, hybrid blocks and the distillation of one into the other are three such functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from rehyat_jax.attention.flat_tokens import flat, with_heads
from rehyat_jax.attention.forms.base import AttentionInputs, Features, Form
from rehyat_jax.attention.hybrid.backend import IMPLEMENTATIONS
from rehyat_jax.attention.hybrid.context_parallel import padded_frames
from rehyat_jax.attention.on_mesh import cross_attention_on_mesh
from rehyat_jax.attention.product import accumulation_dtype
from rehyat_jax.attention.residuals import ATTENTION_RESIDUALS
from rehyat_jax.models.hybrid import block_features, by_form, make_feature_maps, per_block_arguments, stacked
from rehyat_jax.models.linear import Linear, linear
from rehyat_jax.models.lora import LoraConfig
from rehyat_jax.models.modulation import modulated_norm
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.rope import rope_table, scaled_and_rotated
from rehyat_jax.parallel.mesh import axis_size
from rehyat_jax.parallel.sharding import HIDDEN, RESIDUAL, constrain, gathered

_BLOCK_INPUT = "block_input"


def _input_on_host(*saved: str) -> Callable[..., Any]:
    """The policy that keeps a block's input in the host's memory, and arrays of these names on the device."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_RESIDUALS),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": _input_on_host(),
    "attention_offload": _input_on_host(ATTENTION_RESIDUALS),
}
"""The arrays that a block keeps for the backward pass:

- none: everything;
- block: its input only;
- attention: its input and the residuals of the fused self-attention kernels;
- dots: its input and the results of its weight products;
- offload: as block, with the input in the host's memory;
- attention_offload: as attention, with the input in the host's memory.
"""


Attend = Callable[[AttentionInputs, Any], tuple[jax.Array, Any]]
"""(inputs, this block's slice of the per-block arguments) -> (attention output [B, N, H, d], auxiliary output)."""


def timestep_embedding(timestep: jax.Array, dim: int) -> jax.Array:
    """Sinusoids [cos, sin] of timesteps [...] in 0..1000 at frequencies 10000^(-2i/dim); float32 [..., dim]."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the model's complete width, before the split into heads; float32 inside."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(width), axes=("tensor",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x * self.inverse_rms(x) * self.scale[...]).astype(x.dtype)

    def inverse_rms(self, x: jax.Array) -> jax.Array:
        """1 / RMS of every row, float32 [..., 1]."""
        return jax.lax.rsqrt(jnp.square(x.astype(accumulation_dtype(x.dtype))).mean(-1, keepdims=True) + self.eps)


class Attention(nnx.Module):
    """Projections and query-key norms shared by self-attention and cross-attention."""

    def __init__(self, config: WanConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs, **dtypes: jnp.dtype):
        width = config.width

        def projection(name: str, axes: tuple[str, str]) -> Linear:
            return linear(width, width, axes, lora=lora and lora.on(name), rngs=rngs, **dtypes)

        self.query, self.key, self.value = (projection(name, ("fsdp", "tensor")) for name in ("query", "key", "value"))
        self.output = projection("output", ("tensor", "fsdp"))
        self.query_norm = RMSNorm(width, eps=config.eps)
        self.key_norm = RMSNorm(width, eps=config.eps)
        self.num_heads = config.num_heads

    def project(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries of x [B, N, D] and keys and values of context [B, M, D], each [B, tokens, H, d]."""
        query, key = self.query_norm(self.query(x)), self.key_norm(self.key(context))
        return self._heads(query), self._heads(key), self._heads(self.value(context))

    def project_rotated(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """Queries, keys and values of x [B, N, D] as `AttentionInputs` has them, each [B, N, H, d]."""
        projected = {}
        for name, layer, norm in (("query", self.query, self.query_norm), ("key", self.key, self.key_norm)):
            y = layer(x)
            rotated = scaled_and_rotated(y, norm.inverse_rms(y), norm.scale[...], rope)
            sources = {f"unrotated_{name}": self._heads(norm(y)), f"unnormed_{name}": self._heads(y)}
            projected |= {name: self._heads(rotated), **sources}
        return projected | {"value": self._heads(self.value(x))}

    def merge(self, y: jax.Array) -> jax.Array:
        """Output projection of y [B, N, H, d]; [B, N, D]."""
        return self.output(flat(y))

    def gated_merge(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """`merge` times a gate, see `modulation`; float32."""
        return self.output.gated(flat(y), gate)

    def _heads(self, y: jax.Array) -> jax.Array:
        return with_heads(y, self.num_heads)


class FeedForward(nnx.Module):
    """Two linear layers around a tanh-GELU."""

    def __init__(self, config: WanConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs, **dtypes: jnp.dtype):
        options, on = dict(rngs=rngs, **dtypes), lambda name: lora and lora.on(name)
        self.up = linear(config.width, config.ffn_dim, ("fsdp", "tensor"), lora=on("up"), **options)
        self.down = linear(config.ffn_dim, config.width, ("tensor", "fsdp"), lora=on("down"), **options)

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """The output for x [B, N, D], times a gate, see `modulation`; float32."""
        return self.down.gated(nnx.gelu(constrain(self.up(x), HIDDEN), approximate=True), gate)


class WanBlock(nnx.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(self, config: WanConfig, *, lora: LoraConfig | None, rngs: nnx.Rngs, **dtypes: jnp.dtype):
        # Zero, as in adaLN-zero: a block starts as the identity. Checkpoints overwrite it.
        self.modulation = nnx.Param(jnp.zeros((6, config.width)))
        self.self_attention = Attention(config, lora=lora, rngs=rngs, **dtypes)
        self.cross_attention = Attention(config, lora=lora, rngs=rngs, **dtypes)
        self.cross_attention_norm = nnx.LayerNorm(
            config.width, epsilon=config.eps, dtype=accumulation_dtype(dtypes["dtype"]), rngs=rngs
        )
        self.feed_forward = FeedForward(config, lora=lora, rngs=rngs, **dtypes)
        self.eps = config.eps

    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        time_modulation: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        frames: tuple[int, int],
        attend: Callable[[AttentionInputs], tuple[jax.Array, Any]],
    ) -> tuple[jax.Array, Any]:
        """One block.

        Args:
          x: [B, N, D] residual stream in the compute dtype.
          text: [B, L, D] projected text tokens.
          time_modulation: [B, 6, D] float32, or [B, T, 6, D] with a modulation of every frame.
          rope: cosines and sines [N, d].
          frames: tokens_per_frame and num_frames of `AttentionInputs`.
          attend: the self-attention.

        Returns:
          (x [B, N, D], attend's auxiliary output).
        """
        dtype = x.dtype
        modulation = self.modulation[...] + time_modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (modulation[..., i, None, :] for i in range(6))

        y, aux = attend(self._attention_inputs(x, shift, scale, rope, frames))
        x = (x + self.self_attention.gated_merge(y, gate)).astype(dtype)

        normed = self.cross_attention_norm(x).astype(dtype)
        y = cross_attention_on_mesh(*self.cross_attention.project(normed, text))
        x = x + self.cross_attention.merge(y)

        normed = modulated_norm(x, ffn_shift, ffn_scale, eps=self.eps).astype(dtype)
        x = (x + self.feed_forward(normed, ffn_gate)).astype(dtype)
        return constrain(x, RESIDUAL), aux

    def attention_inputs(
        self,
        x: jax.Array,
        time_modulation: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        frames: tuple[int, int],
    ) -> AttentionInputs:
        """The inputs that `__call__` gives to `attend`."""
        modulation = self.modulation[...] + time_modulation
        return self._attention_inputs(x, *(modulation[..., i, None, :] for i in range(2)), rope, frames)

    def _attention_inputs(self, x, shift, scale, rope, frames) -> AttentionInputs:
        normed = modulated_norm(x, shift, scale, eps=self.eps).astype(x.dtype)
        tokens_per_frame, num_frames = frames
        inputs = self.self_attention.project_rotated(normed, rope)
        return AttentionInputs(**inputs, tokens_per_frame=tokens_per_frame, num_frames=num_frames)


class Conditions(NamedTuple):
    """All that blocks and head read in addition to the tokens; made by `WanTransformer.conditions`.

    Attributes:
      text: projected text tokens [B, L, D].
      time: timestep embedding [B, D], float32; or [B, T, D] with a timestep for every frame.
      time_modulation: its projection [B, 6, D] or [B, T, 6, D], float32.
    """

    text: jax.Array
    time: jax.Array
    time_modulation: jax.Array

    def for_frames(self, frames: int) -> "Conditions":
        """The conditions of so many frames of patches; zeros for padding. Those of all frames stay as they are."""
        if self.time.ndim == 2:
            return self
        cut = lambda x: x[:, :frames]
        pad = lambda x: jnp.pad(x, [(0, 0), (0, frames - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return self._replace(time=pad(cut(self.time)), time_modulation=pad(cut(self.time_modulation)))


class Embedded(NamedTuple):
    """The inputs of the blocks; made by `WanTransformer.embedded`.

    Attributes:
      x: tokens [B, N, D].
      conditions: see `Conditions`.
      grid: how many tokens there are along frames, height and width, padding included.
      rope, frames: see `WanBlock.__call__`.
    """

    x: jax.Array
    conditions: Conditions
    grid: tuple[int, int, int]
    rope: tuple[jax.Array, jax.Array]
    frames: tuple[int, int]


class Embedder(nnx.Module):
    """Two linear layers around an activation, for the timestep and for the text."""

    def __init__(self, in_dim: int, width: int, activation: Callable, *, rngs: nnx.Rngs, **linear_options: Any):
        init = nnx.initializers.normal(0.02)
        self.linear_1 = linear(in_dim, width, ("fsdp", None), kernel_init=init, rngs=rngs, **linear_options)
        self.linear_2 = linear(width, width, ("fsdp", None), kernel_init=init, rngs=rngs, **linear_options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class PatchEmbedding(nnx.Module):
    """Convolution with kernel = stride = patch_size, as one matrix product over patches."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype):
        shape = (*config.patch_size, config.in_channels, config.width)
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2, 3), out_axis=4)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(config.width, param_dtype))
        self.dtype = dtype

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, T, H, W, C] -> [B, T/pt, H/ph, W/pw, D]; rows that don't fill a patch are dropped, as by the stride."""
        pt, ph, pw = self.kernel.shape[:3]
        _, frames, height, width, _ = latents.shape
        whole = latents[:, : frames // pt * pt, : height // ph * ph, : width // pw * pw].astype(self.dtype)
        patches = rearrange(whole, "b (t pt) (h ph) (w pw) c -> b t h w (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        kernel = self.kernel[...].astype(self.dtype).reshape(patches.shape[-1], -1)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class Head(nnx.Module):
    """Modulated LayerNorm and projection to patches of the velocity; float32."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        pt, ph, pw = config.patch_size
        self.modulation = nnx.Param(jnp.zeros((2, config.width)))
        self.projection = nnx.Linear(
            config.width,
            pt * ph * pw * config.out_channels,
            kernel_init=nnx.initializers.zeros,
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )
        self.eps = config.eps

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """x [B, N, D] and `Conditions.time` (before the six-fold projection) -> [B, N, pt*ph*pw*C]."""
        shift, scale = (self.modulation[i] + time[..., None, :] for i in range(2))
        return self.projection(modulated_norm(x, shift, scale, eps=self.eps))


class WanTransformer(nnx.Module):
    """Wan2.1 text-to-video transformer; maps noisy latents to the flow-matching velocity.

    Args:
      config: architecture, including which blocks are hybrid.
      rngs: initialisation of the parameters (`rngs.params`).
      dtype: compute dtype.
      param_dtype: dtype of the parameters of products that run in the compute dtype: float32 for training. For
        inference, the compute dtype gives the same outputs, because those products round their parameters to it. The
        timestep path, modulation, norms, the feature maps' scales and the head stay float32.
      scan_layers: scan the blocks (compile time independent of depth) or unroll them in Python.
      remat: name in `REMAT_POLICIES`.
      attention_implementation: passed to `hybrid_attention` for hybrid blocks; None picks the best.
      lora: the adapters of the blocks' linear layers; None for a model without any.

    `nnx.split(model)` gives (graphdef, parameters); pure functions merge them and call the model.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        scan_layers: bool = True,
        remat: str = "none",
        attention_implementation: str | None = None,
        lora: LoraConfig | None = None,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {sorted(REMAT_POLICIES)}, found {remat!r}")
        if attention_implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"attention_implementation must be one of {IMPLEMENTATIONS} or None, found {attention_implementation!r}"
            )
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.scan_layers = scan_layers
        self.remat = remat
        self.attention_implementation = attention_implementation

        width = config.width
        exact, dtypes = jax.lax.Precision.HIGHEST, dict(dtype=dtype, param_dtype=param_dtype)
        self.patch_embedding = PatchEmbedding(config, rngs=rngs, **dtypes)
        self.text_embedding = Embedder(config.text_dim, width, nnx.gelu, rngs=rngs, **dtypes)
        self.time_embedding = Embedder(config.freq_dim, width, nnx.silu, precision=exact, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.time_projection = linear(width, 6 * width, ("fsdp", None), kernel_init=zeros, precision=exact, rngs=rngs)
        self.blocks = stacked(lambda r: WanBlock(config, lora=lora, rngs=r, **dtypes), config.num_layers, rngs)
        self.head = Head(config, rngs=rngs)
        sizes = dict(num_heads=config.num_heads, head_dim=config.head_dim, param_dtype=param_dtype)
        if (feature_maps := make_feature_maps(config.block_forms, **sizes, rngs=rngs)) is not None:
            self.feature_maps = feature_maps

    def __call__(self, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> jax.Array:
        """Velocity of noisy latents.

        Args:
          latents: [B, T, H, W, C_in].
          timestep: [B], in 0..1000; or [B, T], a timestep for every latent frame, of which the frames of one patch have
            one.
          text: [B, L, text_dim], L at most config.text_length. It is zero-padded to that length, and no position is
            masked, as in Wan.

        Returns:
          [B, T, H, W, C_out] float32; rows and columns that don't fill a patch are dropped, as upstream.

        Raises:
          ValueError: on arrays of other ranks or widths.
        """
        velocity, _ = self.forward(latents, timestep, text, self.attend, self.per_block_attention())
        return velocity

    def forward(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        text: jax.Array,
        attend: Attend,
        per_block: Any,
        *,
        frames: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """`__call__` with another self-attention.

        Args:
          latents, timestep, text: see `__call__`.
          attend: self-attention of every block.
          per_block: pytree of arrays with a leading layer axis; a block's slice is attend's second argument.
          frames: `frame_table` of the positions of the frames of patches; by default they begin at 0.

        Returns:
          (velocity, attend's auxiliary outputs stacked on a leading layer axis).
        """
        embedded = self.embedded(latents, timestep, text, frames=frames)
        x, aux = self.run_blocks(embedded, attend, per_block)
        return self.velocity_of(embedded, x), aux

    def embedded(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        text: jax.Array,
        *,
        frames: tuple[jax.Array, jax.Array] | None = None,
    ) -> Embedded:
        """The first part of `forward`, up to the blocks; the arguments are its own."""
        self._check(latents, timestep, text)
        conditions = self.conditions(timestep, text)
        x, grid = self.embed(latents)
        conditions = conditions.for_frames(grid[0])
        num_frames = latents.shape[1] // self.config.patch_size[0]
        rope = rope_table(grid, self.config.head_dim, frames=frames)
        return Embedded(x, conditions, grid, rope, (grid[1] * grid[2], num_frames))

    def run_blocks(self, embedded: Embedded, attend: Attend, per_block: Any) -> tuple[jax.Array, Any]:
        """The second part of `forward`: (the last block's tokens [B, N, D], attend's auxiliary outputs)."""
        x, conditions, _, rope, sizes = embedded
        block_def, block_params = nnx.split(self.blocks)

        def run_block(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            params, arguments = layer
            x = checkpoint_name(x, _BLOCK_INPUT)
            block = nnx.merge(block_def, gathered(params, self.dtype))
            run = lambda inputs: attend(inputs, arguments)
            return block(x, conditions.text, conditions.time_modulation, rope, sizes, run)

        if self.remat != "none":
            # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
            run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_layers)
        layers = (block_params, per_block)
        if self.scan_layers:
            return jax.lax.scan(run_block, x, layers)
        outputs = []
        for index in range(self.config.num_layers):
            x, output = run_block(x, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def velocity_of(self, embedded: Embedded, x: jax.Array) -> jax.Array:
        """The last part of `forward`: the velocity [B, T, H, W, C_out] from the last block's tokens [B, N, D]."""
        num_frames = embedded.frames[1] * self.config.patch_size[0]
        return self.velocity(x, embedded.conditions, embedded.grid)[:, :num_frames]

    def conditions(self, timestep: jax.Array, text: jax.Array) -> Conditions:
        """The first step of `forward`. With timesteps [B, T], those of frames of patches."""
        config = self.config
        if timestep.ndim == 2:
            timestep = timestep[:, :: config.patch_size[0]]
        text = jnp.pad(text, ((0, 0), (0, config.text_length - text.shape[1]), (0, 0)))
        text = self.text_embedding(text.astype(self.dtype))
        time = self.time_embedding(timestep_embedding(timestep, config.freq_dim)).astype(accumulation_dtype(self.dtype))
        return Conditions(
            text, time, rearrange(self.time_projection(nnx.silu(time)), "... (six d) -> ... six d", six=6)
        )

    def embed(self, latents: jax.Array) -> tuple[jax.Array, tuple[int, int, int]]:
        """(tokens [B, N, D] of latents, how many there are along frames, height and width)."""
        patches = self.patch_embedding(latents)
        num_frames, *_ = grid = patches.shape[1:4]
        # If a video is sharded along time, all devices hold the same number of complete chunks, of every form.
        grid = (padded_frames(num_frames, self.config.block_forms.chunk_frames, axis_size("context")), *grid[1:])
        patches = jnp.pad(patches, [(0, 0), (0, grid[0] - num_frames), (0, 0), (0, 0), (0, 0)])
        return constrain(rearrange(patches, "b t h w d -> b (t h w) d"), RESIDUAL), grid

    def velocity(self, x: jax.Array, conditions: Conditions, grid: tuple[int, int, int]) -> jax.Array:
        """The velocity [B, T, H, W, C_out] from the last block's tokens [B, N, D]; `grid` is that of `embed`."""
        pt, ph, pw = self.config.patch_size
        return rearrange(
            self.head(x, conditions.time),
            "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
            **dict(zip("thw", grid, strict=True)),
            pt=pt,
            ph=ph,
            pw=pw,
        )

    def attend(self, inputs: AttentionInputs, per_block: Any) -> tuple[jax.Array, None]:
        """Self-attention in the block's own form; an `Attend`."""

        def in_form(form: Form) -> Callable[[], jax.Array]:
            features = lambda: self.features(form, inputs, per_block.get("feature_maps"))
            return lambda: form.attend(inputs, features(), implementation=self.attention_implementation)

        return by_form(self.config.block_forms, per_block, in_form), None

    def features(self, form: Form, inputs: AttentionInputs, feature_maps: Any) -> Features:
        """Features of one block's queries and keys; `feature_maps` is the block's slice of the parameters."""
        modules = getattr(self, "feature_maps", None)
        return block_features(self.config.block_forms, form, modules, feature_maps, inputs)

    def per_block_attention(self) -> dict[str, Any]:
        """Per-block arguments of `attend`, see `per_block_arguments`."""
        return per_block_arguments(self.config.block_forms, getattr(self, "feature_maps", None))

    def _check(self, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[-1] != config.in_channels:
            raise ValueError(
                f"latents must be [batch, frames, height, width, {config.in_channels}] (channels last), "
                f"found {latents.shape}"
            )
        if timestep.shape not in (latents.shape[:1], latents.shape[:2]):
            raise ValueError(
                f"timestep must be [{latents.shape[0]}], or [{', '.join(map(str, latents.shape[:2]))}] with one for "
                f"every latent frame, found {timestep.shape}"
            )
        if text.ndim != 3 or text.shape[0] != latents.shape[0] or text.shape[2] != config.text_dim:
            raise ValueError(f"text must be [{latents.shape[0]}, tokens, {config.text_dim}], found {text.shape}")
        if text.shape[1] > config.text_length:
            raise ValueError(
                f"text has {text.shape[1]} tokens, more than text_length {config.text_length}; truncate it"
            )


def apply_model(graphdef: nnx.GraphDef) -> Callable[..., jax.Array]:
    """The transformer as a pure function of its parameters.

    Args:
      graphdef: from `nnx.split(model)` or `nnx.graphdef(model)`.

    Returns:
      (params, latents, timestep, text) -> velocity; params is the nested dict of the model's arrays.
    """

    def apply(params: dict[str, Any], latents: jax.Array, timestep: jax.Array, text: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(latents, timestep, text)

    return apply
