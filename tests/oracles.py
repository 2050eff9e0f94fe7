"""Models nobody here wrote, with every parameter randomised: defaults of zero and one hide errors."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

TINY = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    in_channels=16,
    out_channels=16,
    text_dim=48,
    freq_dim=256,
    ffn_dim=112,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    rope_max_seq_len=1024,
)


def random_wan(head_dim: int = 32, num_layers: int = 2, seed: int = 0) -> WanTransformer3DModel:
    """A tiny diffusers Wan transformer; norms, biases and modulation tables are perturbed too."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(attention_head_dim=head_dim, num_layers=num_layers, **TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_wan(model: WanTransformer3DModel, folder: Path) -> Path:
    """Writes the model as diffusers does and returns the folder."""
    model.save_pretrained(folder)
    return folder


TINY_VAE = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])


def random_wan_vae(seed: int = 0, **sizes: Any) -> AutoencoderKLWan:
    """A tiny diffusers VAE of Wan2.1; norms and biases are perturbed too. `sizes` replace those of `TINY_VAE`."""
    torch.manual_seed(seed)
    model = AutoencoderKLWan(**TINY_VAE | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
