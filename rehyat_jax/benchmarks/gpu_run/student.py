"""Section "student": a hybrid model exported to PyTorch and run on this device, compared with the JAX model."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.benchmarks.gpu_run.random_arrays import abstract_params, random_params
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.weights import load_wan, save_model
from rehyat_jax.weights.conversion import convert_to_torch

STUDENT = WanConfig(
    num_heads=2,
    head_dim=64,
    ffn_dim=256,
    num_layers=3,
    text_dim=24,
    text_length=8,
    hybrid_blocks=(0, 2),
    hybrid=HybridConfig(feature_map=FeatureMapConfig(features=64)),
)

FLOAT32_TOLERANCE = 5e-5
"""diffusers' sinusoids of the timestep are float32, accurate to 3e-5 at t = 737."""


def rows(sizes: Sizes) -> Iterator[Row]:
    """In float32, the largest difference; in bfloat16, the error of each model against the JAX model in float32."""
    import torch

    from rehyat_jax.pytorch.rehyat_torch import load_student

    device = "cuda" if sizes.device == "gpu" else "cpu"
    rng = np.random.default_rng(1)
    latents, text = rng.standard_normal((2, 7, 8, 12, 16), np.float32), rng.standard_normal((2, 8, 24), np.float32)
    timestep = np.array([737.0, 12.5], np.float32)

    def run_torch(folder: Path, dtype: torch.dtype) -> np.ndarray:
        transformer = load_student(folder, torch_dtype=dtype).to(device)
        tensor = lambda array: torch.tensor(array, device=device)
        inputs = tensor(latents).permute(0, 4, 1, 2, 3).to(dtype), tensor(timestep), tensor(text).to(dtype)
        # The patch embedding is a convolution, which cuDNN computes in TF32 by default.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return transformer(*inputs).sample.permute(0, 2, 3, 4, 1).float().cpu().numpy()

    def run_jax(model: Path, dtype: jnp.dtype, implementation: str | None) -> np.ndarray:
        student = load_wan(model, dtype=dtype, attention_implementation=implementation)
        graphdef, params = nnx.split(student)
        run = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
        return np.asarray(run(params, latents, timestep, text))

    with tempfile.TemporaryDirectory() as folder:
        model, exported = Path(folder) / "model", Path(folder) / "exported"
        save_model(model, STUDENT, random_params(abstract_params(STUDENT)), codec="wan_vae", text_encoder="umt5")
        convert_to_torch(model, exported, "diffusers")
        with jax.default_matmul_precision("highest"):
            exact = run_jax(model, jnp.float32, "reference")
        difference = float(np.abs(run_torch(exported, torch.float32) - exact).max())
        yield {"dtype": "float32", "difference": difference, "right": difference < FLOAT32_TOLERANCE}
        error = lambda found: float(np.sqrt(np.mean((found - exact) ** 2)))
        ours, theirs = error(run_jax(model, jnp.bfloat16, None)), error(run_torch(exported, torch.bfloat16))
        # Both round alike; a mistake would have the size of the velocity, which is about 1.
        yield {"dtype": "bfloat16", "jax_error": ours, "torch_error": theirs, "right": max(ours, theirs) < 0.05}
