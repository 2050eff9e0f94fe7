"""The Flax transformer against diffusers' WanTransformer3DModel: outputs, gradients, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import random_wan, save_wan
from safetensors.torch import save_file

import rehyat_jax
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.weights import load_params

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Upstream's sinusoids of the timestep are float32: at t = 737 an angle is good to 3e-5, and unit outputs follow.
OUTPUT_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-4

GRADIENTS = (
    "patch_embedding.kernel",
    "text_embedding.linear_1.kernel",
    "time_embedding.linear_2.bias",
    "time_projection.kernel",
    "blocks.modulation",
    "blocks.self_attention.query.kernel",
    "blocks.self_attention.key_norm.scale",
    "blocks.cross_attention.value.kernel",
    "blocks.cross_attention_norm.bias",
    "blocks.feed_forward.down.kernel",
    "head.modulation",
    "head.projection.kernel",
)


@pytest.fixture(scope="module", params=[32, 128], ids=["head_dim32", "head_dim128"])
def oracle(request, tmp_path_factory):
    """(diffusers model, its folder)."""
    model = random_wan(head_dim=request.param)
    return model, save_wan(model, tmp_path_factory.mktemp("oracle"))


def model_inputs(frames=5, height=6, width=10, *, levels="of videos"):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, frames, height, width, 16), np.float32)
    timestep = np.array([737.0, 12.5], np.float32)
    if levels == "of frames":
        timestep = np.stack([np.linspace(0, 999, frames), np.linspace(625, 3, frames)]).astype(np.float32)
    return latents, timestep, rng.standard_normal((2, 20, 48), np.float32)


def run_oracle(model, latents, timestep, text, dtype=torch.float32):
    """diffusers' velocity, channels last; its pipeline zero-pads the text to 512 tokens before calling the model.

    It takes a timestep of every token instead of every frame.
    """
    if timestep.ndim == 2:
        _, _, height, width, _ = latents.shape
        timestep = np.repeat(timestep, (height // 2) * (width // 2), axis=1)
    text = np.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0)))
    latents = torch.tensor(latents).permute(0, 4, 1, 2, 3).to(dtype)
    velocity = model(latents, torch.tensor(timestep), torch.tensor(text).to(dtype)).sample
    return velocity.permute(0, 2, 3, 4, 1).float()


def lookup(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return np.asarray(tree)


# The loop over blocks and the size of the video have nothing in common: each is tried with both kinds of levels.
@pytest.mark.parametrize(
    ("size", "levels", "scan_layers"),
    [
        ((5, 6, 10), "of videos", True),
        ((3, 7, 9), "of videos", False),
        ((1, 2, 2), "of videos", True),
        ((3, 7, 9), "of frames", True),
        ((2, 2, 2), "of frames", False),
    ],
    ids=["even", "odd", "one_token", "odd_levels_of_frames", "levels_of_frames_of_one_token"],
)
def test_output_matches_diffusers(oracle, scan_layers, size, levels):
    reference, folder = oracle
    inputs = model_inputs(*size, levels=levels)
    model = rehyat_jax.load_wan(folder, scan_layers=scan_layers)
    with torch.no_grad():
        expected = run_oracle(reference, *inputs).numpy()
    velocity = np.asarray(jax.jit(lambda *x: model(*x))(*inputs))
    assert velocity.shape == expected.shape
    assert np.abs(velocity - expected).max() < OUTPUT_TOLERANCE


@pytest.mark.parametrize(
    ("scan_layers", "levels"),
    [(True, "of videos"), (False, "of videos"), (True, "of frames")],
    ids=["scan", "unrolled", "levels_of_frames"],
)
def test_gradients_match_diffusers(oracle, scan_layers, levels, tmp_path):
    reference, folder = oracle
    inputs = model_inputs(levels=levels)
    cotangent = np.random.default_rng(1).standard_normal(inputs[0].shape, np.float32)

    reference.zero_grad()
    (run_oracle(reference, *inputs) * torch.tensor(cotangent)).sum().backward()
    # Gradients have the parameters' names and shapes, so they are read like a checkpoint.
    save_file(
        {name: parameter.grad.contiguous() for name, parameter in reference.named_parameters()},
        tmp_path / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    _, expected, _ = load_params(tmp_path)

    graphdef, state = nnx.split(rehyat_jax.load_wan(folder, scan_layers=scan_layers))
    loss = lambda params: (apply_model(graphdef)(params, *inputs) * cotangent).sum()
    grads = jax.jit(jax.grad(loss))(nnx.to_pure_dict(state))
    for path in GRADIENTS:
        found, wanted = lookup(grads, path), lookup(expected, path)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < GRADIENT_TOLERANCE, f"{path}: relative error {error:.2e}"


def test_bfloat16_is_as_close_to_float32_as_diffusers_own(oracle):
    reference, folder = oracle
    inputs = model_inputs()
    with torch.no_grad():
        exact = run_oracle(reference, *inputs).numpy()
        low = type(reference).from_pretrained(folder, torch_dtype=torch.bfloat16)
        theirs = np.abs(run_oracle(low, *inputs, dtype=torch.bfloat16).numpy() - exact)
    model = rehyat_jax.load_wan(folder, dtype=jnp.bfloat16)
    ours = np.abs(np.asarray(jax.jit(lambda *x: model(*x))(*inputs), np.float32) - exact)
    assert ours.mean() <= theirs.mean()
    assert ours.max() <= theirs.max()
    assert ours.mean() > 0, "nothing ran in bfloat16"


def test_jaxpr_does_not_grow_with_depth():
    """A scan's body is traced once, so the program, and with it the compile time, is the same for 3 and 30 layers."""

    def program_size(num_layers):
        # A mixture of softmax and hybrid blocks: the choice is made inside the body too.
        config = WAN_PRESETS["tiny"].replace(num_layers=num_layers, hybrid_blocks=(0, 2))
        graphdef, state = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
        shapes = [(1, 6, 6, 6, 16), (1,), (1, 8, 64)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = lambda params, *x: apply_model(graphdef)(params, *x).sum()
        return len(jax.jit(jax.grad(loss)).lower(nnx.to_pure_dict(state), *inputs).as_text().splitlines())

    assert program_size(30) == program_size(3)


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        (((1, 16, 3, 4, 4), (1,), (1, 8, 48)), "latents"),
        (((1, 3, 4, 4, 16), (2,), (1, 8, 48)), "timestep"),
        (((1, 3, 4, 4, 16), (1, 2), (1, 8, 48)), "timestep"),
        (((1, 3, 4, 4, 16), (1,), (1, 8, 64)), "text"),
        (((1, 3, 4, 4, 16), (1,), (1, 513, 48)), "text_length"),
    ],
)
def test_wrong_inputs_are_named(oracle, shape, field):
    model = rehyat_jax.load_wan(oracle[1])
    with pytest.raises(ValueError, match=field):
        model(*(np.zeros(s, np.float32) for s in shape))


@pytest.mark.parametrize(("preset", "parameters"), [("t2v-1.3B", 1_418_996_800), ("t2v-14B", 14_288_491_584)])
def test_presets_have_the_published_sizes(preset, parameters):
    model = nnx.eval_shape(lambda: WanTransformer(WAN_PRESETS[preset], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == parameters
