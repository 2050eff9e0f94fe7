"""Spec of Wan2.1's VAE for reading and writing its weights."""

from typing import Any

from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.modeling import WanAutoencoder
from rehyat_jax.weights.spec import Inferred, ModelSpec, ShapeOf, UpstreamConfig
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.wan_vae.names import wan_vae_table

UPSTREAM: dict[Layout, UpstreamConfig] = {
    "diffusers": UpstreamConfig(
        fields={
            "base_dim": "base_dim",
            "dim_mult": "dim_mult",
            "latents_mean": "latents_mean",
            "latents_std": "latents_std",
            "num_res_blocks": "num_res_blocks",
            "temperal_downsample": "temporal_downsample",
            "z_dim": "z_dim",
        },
        fixed={
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": "0.42.0",
            "attn_scales": [],
            "decoder_base_dim": None,
            "dropout": 0.0,
            "in_channels": 3,
            "is_residual": False,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
        },
    ),
}
"""The original code keeps its sizes in Python: a file in its layout has no config.json."""


def _infer(shape: ShapeOf, source: Any) -> dict[str, Inferred]:
    """The fields of `WanVaeConfig` that the tensors' shapes imply. Raises InputError."""
    (*_, base_dim), base_name = shape("encoder.conv_in.kernel")
    (*_, z_dim), z_name = shape("post_quant_conv.kernel")
    return {"base_dim": Inferred(base_dim, base_name), "z_dim": Inferred(z_dim, z_name)}


WAN_VAE = ModelSpec(
    architecture="wan_vae",
    description="Wan2.1's VAE",
    part="vae",
    config=WanVaeConfig,
    model=WanAutoencoder,
    table=wan_vae_table,
    upstream=UPSTREAM,
    metadata={},
    smallest=WanVaeConfig(base_dim=2),
    infer=_infer,
    foreign={
        ("blocks.", "patch_embedding."): "a transformer",
        ("encoder.downsamples.0.downsamples.", "encoder.down_blocks.0.resnets."): "the VAE of Wan2.2's TI2V-5B",
    },
    original_file="Wan*_VAE",
)
