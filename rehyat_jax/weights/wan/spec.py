"""Spec of Wan2.1's text-to-video transformer for reading, writing and converting its weights."""

from typing import Any

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.weights.spec import Inferred, ModelSpec, ShapeOf, UpstreamConfig
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.wan.names import wan_table

UPSTREAM: dict[Layout, UpstreamConfig] = {
    "diffusers": UpstreamConfig(
        fields={
            "attention_head_dim": "head_dim",
            "eps": "eps",
            "ffn_dim": "ffn_dim",
            "freq_dim": "freq_dim",
            "in_channels": "in_channels",
            "num_attention_heads": "num_heads",
            "num_layers": "num_layers",
            "out_channels": "out_channels",
            "patch_size": "patch_size",
            "text_dim": "text_dim",
        },
        fixed={
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.42.0",
            "added_kv_proj_dim": None,
            "cross_attn_norm": True,
            "image_dim": None,
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        },
        unsaid=("text_length",),
    ),
    "original": UpstreamConfig(
        fields={
            "dim": "width",
            "eps": "eps",
            "ffn_dim": "ffn_dim",
            "freq_dim": "freq_dim",
            "in_dim": "in_channels",
            "num_heads": "num_heads",
            "num_layers": "num_layers",
            "out_dim": "out_channels",
            "text_len": "text_length",
        },
        fixed={"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"},
    ),
}
"""The values, and the fields that are missing, are those of the published files."""


def _infer(shape: ShapeOf, source: Any) -> dict[str, Inferred]:
    """The fields of `WanConfig`, and "width", that the tensors' shapes imply. Raises InputError."""
    (*patch, in_channels, width), patch_name = shape("patch_embedding.kernel")
    (text_dim, _), text_name = shape("text_embedding.linear_1.kernel")
    (freq_dim, _), time_name = shape("time_embedding.linear_1.kernel")
    (_, ffn_dim), ffn_name = shape("blocks.feed_forward.up.kernel")
    (patch_out,), head_name = shape("head.projection.bias")
    patch_area = int(np.prod(patch))
    if not patch_area or patch_out % patch_area:
        raise InputError(
            f"{source}: tensor {head_name} should have a multiple of {patch_area} entries for patches of {patch}, "
            f"found {patch_out}; the tensors belong to different checkpoints"
        )
    return {
        "width": Inferred(width, patch_name),
        "in_channels": Inferred(in_channels, patch_name),
        "patch_size": Inferred(patch, patch_name),
        "text_dim": Inferred(text_dim, text_name),
        "freq_dim": Inferred(freq_dim, time_name),
        "ffn_dim": Inferred(ffn_dim, ffn_name),
        "out_channels": Inferred(patch_out // patch_area, head_name),
    }


WAN = ModelSpec(
    architecture="wan",
    description="Wan's text-to-video transformer",
    part="transformer",
    config=WanConfig,
    model=WanTransformer,
    table=wan_table,
    upstream=UPSTREAM,
    metadata={"codec": "wan_vae", "text_encoder": "umt5"},
    smallest=WanConfig(num_heads=1, head_dim=1, ffn_dim=1, num_layers=1),
    infer=_infer,
    foreign={("img_emb.", "condition_embedder.image_embedder."): "an image-to-video model"},
    is_transformer=True,
    unsupported="image conditioning or other normalisation",
    head_dim=128,
)
