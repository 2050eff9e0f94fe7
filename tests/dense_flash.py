"""What cuDNN's flash attention computes, as dense products: stands in for it where there is no GPU."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp

from rehyat_jax.attention.hybrid.gpu.flash_merge import merged_forward
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels
from rehyat_jax.attention.product import product


def _scores(query, key, num_keys, scale):
    scores = scale * product("nqhd,nkhd->nhqk", query, key)
    return jnp.where(jnp.arange(key.shape[1]) < num_keys[:, None, None, None], scores, -jnp.inf)


def dense_forward(query, key, value, num_keys, scale):
    """As `cudnn_forward`."""
    scores = _scores(query, key, num_keys, scale)
    output = product("nhqk,nkhd->nqhd", jax.nn.softmax(scores).astype(value.dtype), value)
    return output.astype(query.dtype), jax.nn.logsumexp(scores, axis=-1)


def dense_backward(query, key, value, num_keys, output, log_sum_exp, cotangent):
    """As `cudnn_backward`."""
    scale = query.shape[-1] ** -0.5
    weights = jnp.exp(_scores(query, key, num_keys, scale) - log_sum_exp[..., None])
    delta = product("nqhd,nqhd->nhq", cotangent, output)[..., None]
    d_scores = scale * weights * (product("nqhd,nkhd->nhqk", cotangent, value) - delta)
    return (
        product("nhqk,nkhd->nqhd", d_scores, key).astype(query.dtype),
        product("nhqk,nqhd->nkhd", d_scores, query).astype(key.dtype),
        product("nhqk,nqhd->nkhd", weights, cotangent).astype(value.dtype),
    )


@contextlib.contextmanager
def dense_cudnn():
    """Within it, implementation "cudnn" runs anywhere, and in any dtype: with dense products for calls of cuDNN."""
    kernels = WindowKernels(functools.partial(merged_forward, dense_forward), dense_backward)
    with mock.patch.multiple("rehyat_jax.attention.hybrid.cudnn", KERNELS=kernels, why_not_cudnn=lambda query: None):
        yield
