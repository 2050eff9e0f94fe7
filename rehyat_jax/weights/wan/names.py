"""Names of Wan2.1's parameters: in this package, diffusers' `WanTransformer3DModel` and the original `WanModel`."""

import numpy as np

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.weights.table import CONVOLUTION, MODULATION, Row, feature_map_rows, in_blocks, linear_rows


def wan_table(config: WanConfig) -> list[Row]:
    """The rows of a model, in the order of diffusers' state dict."""
    width, patch, text = config.width, config.patch_size, "condition_embedder.text_embedder."
    patch_out = int(np.prod(patch)) * config.out_channels
    time = "condition_embedder.time_embedder."
    before = [
        Row("head.modulation", (2, width), "scale_shift_table", "head.modulation", MODULATION),
        Row(
            "patch_embedding.kernel",
            (*patch, config.in_channels, width),
            "patch_embedding.weight",
            "patch_embedding.weight",
            CONVOLUTION,
        ),
        Row("patch_embedding.bias", (width,), "patch_embedding.bias", "patch_embedding.bias"),
        *linear_rows("time_embedding.linear_1", time + "linear_1", "time_embedding.0", config.freq_dim, width),
        *linear_rows("time_embedding.linear_2", time + "linear_2", "time_embedding.2", width, width),
        *linear_rows("time_projection", "condition_embedder.time_proj", "time_projection.1", width, 6 * width),
        *linear_rows("text_embedding.linear_1", text + "linear_1", "text_embedding.0", config.text_dim, width),
        *linear_rows("text_embedding.linear_2", text + "linear_2", "text_embedding.2", width, width),
    ]
    block = [
        Row("modulation", (6, width), "scale_shift_table", "modulation", MODULATION),
        *_attention("self_attention", "attn1", "self_attn", width),
        *_attention("cross_attention", "attn2", "cross_attn", width),
        Row("cross_attention_norm.scale", (width,), "norm2.weight", "norm3.weight"),
        Row("cross_attention_norm.bias", (width,), "norm2.bias", "norm3.bias"),
        *linear_rows("feed_forward.up", "ffn.net.0.proj", "ffn.0", width, config.ffn_dim),
        *linear_rows("feed_forward.down", "ffn.net.2", "ffn.2", config.ffn_dim, width),
    ]
    after = linear_rows("head.projection", "proj_out", "head.head", width, patch_out)
    return [
        *before,
        *(in_blocks(row, "blocks.", tuple(range(config.num_layers))) for row in block),
        *feature_map_rows(config.block_forms, config.num_heads, config.head_dim),
        *after,
    ]


def _attention(path: str, diffusers: str, original: str, width: int) -> list[Row]:
    projections = (("query", "to_q", "q"), ("key", "to_k", "k"), ("value", "to_v", "v"), ("output", "to_out.0", "o"))
    rows = []
    for ours, theirs, short in projections:
        rows += linear_rows(f"{path}.{ours}", f"{diffusers}.{theirs}", f"{original}.{short}", width, width)
    for ours, theirs in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        rows.append(
            Row(f"{path}.{ours}.scale", (width,), f"{diffusers}.{theirs}.weight", f"{original}.{theirs}.weight")
        )
    return rows
