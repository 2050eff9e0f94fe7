"""What a fused flash attention computes, as dense products: stands in for GPU kernels where there is no GPU."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.gpu.flash_window import FlashAttention
from rehyat_jax.attention.product import product


def _scores(query, key, num_keys, scale):
    scores = scale * product("nqhd,nkhd->nhqk", query, key)
    return jnp.where(jnp.arange(key.shape[1]) < num_keys[:, None, None, None], scores, -jnp.inf)


def _forward(query, key, value, num_keys, scale):
    scores = _scores(query, key, num_keys, scale)
    output = product("nhqk,nkhd->nqhd", jax.nn.softmax(scores).astype(value.dtype), value)
    return output.astype(query.dtype), jax.nn.logsumexp(scores, axis=-1)


def _backward(query, key, value, num_keys, output, log_sum_exp, cotangent, scale):
    weights = jnp.exp(_scores(query, key, num_keys, scale) - log_sum_exp[..., None])
    delta = product("nqhd,nqhd->nhq", cotangent, output)[..., None]
    d_scores = scale * weights * (product("nqhd,nkhd->nhqk", cotangent, value) - delta)
    return (
        product("nhqk,nkhd->nqhd", d_scores, key).astype(query.dtype),
        product("nhqk,nqhd->nkhd", d_scores, query).astype(key.dtype),
        product("nhqk,nqhd->nkhd", weights, cotangent).astype(value.dtype),
    )


DENSE = FlashAttention(_forward, _backward)
