"""Copies the parameters of a JAX model into Wan in PyTorch without writing them to disk."""

from typing import Any

import jax
import torch
from diffusers import WanTransformer3DModel
from flax import traverse_util

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.weights.wan.names import wan_table
from rehyat_jax.weights.wan.spec import UPSTREAM


def diffusers_transformer(
    config: WanConfig, params: dict[str, Any], dtype: torch.dtype, device: str
) -> WanTransformer3DModel:
    """diffusers' transformer, with the dtypes of `from_pretrained(torch_dtype=dtype)`: some parameters stay float32."""
    described = config.to_dict()
    arguments = {theirs: described[ours] for theirs, ours in UPSTREAM["diffusers"].fields.items()}
    with torch.device(device):
        model = WanTransformer3DModel(**arguments).eval()
    arrays = traverse_util.flatten_dict(params, sep=".")
    tensors = dict(model.named_parameters())
    for row in wan_table(config.replace(hybrid_blocks=())):
        array = arrays[row.path]
        for part, name in zip(array if row.blocks is not None else [array], row.names("diffusers"), strict=True):
            transformed = jax.block_until_ready(row.transform.to_torch(part))
            with torch.no_grad():
                tensors.pop(name).copy_(torch.from_dlpack(transformed))
            if device == "cuda":
                torch.cuda.synchronize()  # JAX may reuse the memory at once
    if tensors:
        raise ValueError(f"parameters of diffusers' model without a value: {sorted(tensors)}")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model
