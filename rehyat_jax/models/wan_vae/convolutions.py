"""The convolutions of Wan's VAE that take most of its time: causal ones with their norms, and changes of resolution.

Each has two forms. XLA's convolutions are the definition, run on every platform and have the derivatives. On TPUs,
Pallas kernels compute the same for frames in bfloat16, several times as fast.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.models.wan_vae.places import Places

WINDOW = 3
"""Frames that a convolution in time sees."""


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) * sqrt(C) * scale over the channels, float32 [..., C]."""
    x = x.astype(jnp.float32)
    # The maximum keeps the gradient finite at zero.
    squares = jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24)
    return x * jax.lax.rsqrt(squares) * (x.shape[-1] ** 0.5 * scale)


def norm_silu(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """SiLU of the norm in the dtype of `x`; `x` itself if there is no scale."""
    return x if scale is None else nnx.silu(rms_norm(x, scale)).astype(x.dtype)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    zeros_before: int = 0,
    time_stride: int = 1,
    space_stride: int = 1,
    space_padding: tuple[int, int] | None = None,
) -> jax.Array:
    """XLA's convolution over frames, height and width.

    Args:
      x: [B, T, H, W, C].
      kernel: [frames, height, width, C, N]; `bias`: [N].
      zeros_before: frames of zeros before `x`.
      space_padding: zeros before and after height and width; None keeps their sizes for stride 1.

    Returns:
      [B, (zeros_before + T - kernel frames) / time_stride + 1, H', W', N] in the dtype of `x`.
    """
    height, width = kernel.shape[1:3]
    rows, columns = [space_padding or (size // 2,) * 2 for size in (height, width)]
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    if (height, width) == (1, 1):  # matrix products, which XLA lays out better than convolutions
        x = jnp.pad(x, ((0, 0), (zeros_before, 0), (0, 0), (0, 0), (0, 0)))
        last = x.shape[1] - kernel.shape[0]
        seen = [x[:, tap : tap + last + 1 : time_stride] for tap in range(kernel.shape[0])]
        product = functools.partial(jnp.einsum, "...c,cn->...n", preferred_element_type=jnp.float32)
        return functools.reduce(jnp.add, map(product, seen, kernel[:, 0, 0])).astype(x.dtype) + bias
    if kernel.shape[0] == 1:  # frames take the place of a batch
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[2:]),
            kernel[0],
            window_strides=(space_stride,) * 2,
            padding=(rows, columns),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(*x.shape[:2], *y.shape[1:]) + bias
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(time_stride, space_stride, space_stride),
        padding=((zeros_before, 0), rows, columns),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    return y + bias


def first_caches(x: jax.Array, places: Places) -> jax.Array:
    """The zeros that a clip's first `causal_step` sees as its past, [B, 2, H, W, C].

    A kernel's past has more channels: a multiple of 128. The last ones are never read.
    """
    channels = x.shape[-1]
    if places.use_kernels(x.dtype):
        # All kernels are imported where they are used.
        from rehyat_jax.models.wan_vae.tpu.causal_convolution import padded
        from rehyat_jax.models.wan_vae.tpu.planar_convolution import takes_planes

        channels = channels if takes_planes(channels) else padded(channels)
    return jnp.zeros((x.shape[0], WINDOW - 1, *x.shape[2:4], channels), x.dtype)


def causal_step(
    x: jax.Array,
    past: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    norm_scale: jax.Array | None,
    residual: jax.Array | None,
    shortcut: tuple[jax.Array, jax.Array] | None,
    only_last: jax.Array,
    places: Places,
) -> tuple[jax.Array, jax.Array]:
    """convolution(silu(norm(x))) + shortcut(residual) over the next frames of a stream.

    Args:
      x: [B, T, H, W, C], zero in the padding of `places`.
      past: `first_caches`, or the second result of the step before.
      kernel: [3, 3, 3, C, N]; `bias`: [N].
      norm_scale: scale of the norm before SiLU, [C]; None for neither.
      residual: [B, T, H, W, M], or None.
      shortcut: kernel [1, 1, 1, M, N] and bias [N] of a convolution of the residual; None if M is N.
      only_last: bool []; True if all frames but the last are padding: the convolution sees zeros in their place.

    Returns:
      ([B, T, H, W, N], the past of the next step).
    """
    channels = x.shape[-1]

    def seen(x: jax.Array, norm_scale: jax.Array | None, only_last: jax.Array) -> jax.Array:
        x = norm_silu(x, norm_scale)
        is_frame = jnp.arange(x.shape[1]) == x.shape[1] - 1
        return jnp.where((is_frame | ~only_last)[:, None, None, None], x, 0) if x.shape[1] > 1 else x

    def by_xla(pixels: Any, others: Any) -> tuple[jax.Array, jax.Array]:
        (x, past, residual), (kernel, bias, norm_scale, shortcut, only_last) = pixels, others
        # A TPU's compiler would otherwise join the frames inside the convolution, which then takes 40 times as long.
        window = jax.lax.optimization_barrier(
            jnp.concatenate([past[..., :channels], seen(x, norm_scale, only_last)], axis=1)
        )
        y = convolve(window, kernel, bias)
        after = window[:, 1 - WINDOW :]
        after = jnp.pad(after, [(0, 0)] * 4 + [(0, past.shape[-1] - channels)])
        return y if residual is None else y + through_shortcut(residual, shortcut), after

    def by_kernel(pixels: Any, others: Any) -> tuple[jax.Array, jax.Array]:
        from rehyat_jax.models.wan_vae.tpu.causal_convolution import causal_convolution
        from rehyat_jax.models.wan_vae.tpu.planar_convolution import planar_convolution, takes_planes

        (x, past, residual), (kernel, bias, norm_scale, shortcut, only_last) = pixels, others
        rows = lambda at: jnp.concatenate(
            [past[:, :, at, :, :channels], seen(x[:, :, at], norm_scale, only_last)], axis=1
        )
        above, below = places.rows_around(rows(slice(0, 1)), rows(slice(-1, None)))
        if takes_planes(channels):
            window = rows(slice(None))
            y = planar_convolution(window, kernel, bias, above=above, below=below)
            return y if residual is None else y + through_shortcut(residual, shortcut), window[:, 1 - WINDOW :]
        matrix = None if shortcut is None else (shortcut[0][0, 0, 0], shortcut[1])
        options: dict[str, Any] = dict(norm_scale=norm_scale, residual=residual, shortcut=matrix, only_last=only_last)
        return causal_convolution(x, past, kernel, bias, above=above, below=below, **options)

    others = kernel, bias, norm_scale, shortcut, only_last
    return _choose(by_xla, by_kernel, (x, past, residual), others, places)


def through_shortcut(residual: jax.Array, shortcut: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """The residual, or its convolution if the shortcut has one: (kernel, bias)."""
    return residual if shortcut is None else convolve(residual, *shortcut)


def doubled(x: jax.Array, kernel: jax.Array, bias: jax.Array, places: Places) -> jax.Array:
    """Repeats every pixel twice along both sides, then convolves: [B, T, H, W, C] -> [B, T, 2H, 2W, N].

    Args:
      kernel: [3, 3, C, N]; `bias`: [N].
    """

    def by_xla(x: jax.Array, others: Any) -> jax.Array:
        kernel, bias = others
        return convolve(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3), kernel[None], bias)

    def by_kernel(x: jax.Array, others: Any) -> jax.Array:
        from rehyat_jax.models.wan_vae.tpu.resampling import doubled_convolution

        above, below = places.rows_around(x[:, :, :1], x[:, :, -1:])
        return doubled_convolution(x, *others, above=above, below=below)

    return _choose(by_xla, by_kernel, x, (kernel, bias), places)


def halved(x: jax.Array, kernel: jax.Array, bias: jax.Array, places: Places) -> jax.Array:
    """Convolves at every second pixel, zeros below and on the right: [B, T, H, W, C] -> [B, T, H / 2, W / 2, N].

    Args:
      kernel: [3, 3, C, N]; `bias`: [N].
    """

    def by_xla(x: jax.Array, others: Any) -> jax.Array:
        kernel, bias = others
        return convolve(x, kernel[None], bias, space_stride=2, space_padding=(0, 1))

    def by_kernel(x: jax.Array, others: Any) -> jax.Array:
        from rehyat_jax.models.wan_vae.tpu.resampling import halved_convolution

        _, below = places.rows_around(x[:, :, :1], x[:, :, -1:])
        return halved_convolution(x, *others, below=below)

    return _choose(by_xla, by_kernel, x, (kernel, bias), places)


def _choose(by_xla: Callable, by_kernel: Callable, pixels: Any, others: Any, places: Places) -> Any:
    """by_xla(pixels, others), or by_kernel on each device. Differentiation runs by_xla."""
    if not places.use_kernels(jax.tree.leaves(pixels)[0].dtype):
        return by_xla(pixels, others)
    fast = jax.custom_jvp(lambda pixels, others: places.on_devices(by_kernel, pixels, others))
    fast.defjvp(lambda primals, tangents: jax.jvp(by_xla, primals, tangents))
    return fast(pixels, others)
