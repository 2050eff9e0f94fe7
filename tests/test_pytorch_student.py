"""Students taken back to PyTorch: the exported folder, loaded by rehyat_torch, against the JAX student."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from flax import nnx
from safetensors.torch import load_file, save_file
from torch.nn.attention import flex_attention as flex

from rehyat_jax import FeatureMap, FeatureMapConfig, HybridConfig, WanConfig, WanTransformer, hybrid_attention, load_wan
from rehyat_jax.convert import main
from rehyat_jax.pytorch import rehyat_torch
from rehyat_jax.weights import load_params, save_model
from rehyat_jax.weights.conversion import convert_to_torch

WEIGHTS = "diffusion_pytorch_model.safetensors"

# As for the teacher against diffusers: upstream's sinusoids of the timestep are float32, good to 3e-5 at t = 737.
OUTPUT_TOLERANCE = 5e-5

FORM = HybridConfig(chunk_frames=3, overlap_frames=1, feature_map=FeatureMapConfig(features=16))
STUDENT = WanConfig(
    num_heads=2, head_dim=32, ffn_dim=48, num_layers=3, text_dim=24, text_length=8, hybrid_blocks=(0, 2), hybrid=FORM
)


def save_random_student(path, config):
    """A model checkpoint with every parameter random: zeros and ones, as at the start of training, hide errors."""
    abstract = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        return noise / leaf.shape[-2] ** 0.5 if kind == "kernel" else 0.2 * noise + (kind == "scale")

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.split(abstract)[1]))
    save_model(path, config, params, codec="wan_vae", text_encoder="umt5")
    return path


def export(model, folder):
    assert main(["to-torch", str(model), str(folder), "--layout", "diffusers"]) == 0
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """(model checkpoint, exported folder) of one student; not to be changed."""
    path = tmp_path_factory.mktemp("student")
    model = save_random_student(path / "model", STUDENT)
    return model, export(model, path / "exported")


@pytest.fixture
def exported(student, tmp_path):
    """A folder of one's own to damage."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for file in student[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def model_inputs(frames=7, height=4, width=6):
    """Latents of 7 frames end in a ragged chunk; the tokens of a frame, 2 x 3, tell height from width."""
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, frames, height, width, 16), np.float32)
    return latents, np.array([737.0, 12.5], np.float32), rng.standard_normal((2, 8, 24), np.float32)


def run_torch(transformer, latents, timestep, text, dtype=torch.float32):
    latents = torch.tensor(latents, dtype=dtype).permute(0, 4, 1, 2, 3)
    velocity = transformer(latents, torch.tensor(timestep), torch.tensor(text, dtype=dtype)).sample
    return velocity.permute(0, 2, 3, 4, 1).float()


def assert_same_velocity(model, folder, *sizes):
    transformer = rehyat_torch.load_student(folder)
    reference = load_wan(model, attention_implementation="reference")
    run_jax = jax.jit(lambda *inputs: reference(*inputs))
    for size in sizes:
        inputs = model_inputs(*size)
        with torch.no_grad():
            velocity = run_torch(transformer, *inputs).numpy()
        expected = np.asarray(run_jax(*inputs))
        assert velocity.shape == expected.shape
        assert np.abs(velocity - expected).max() < OUTPUT_TOLERANCE


@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_velocity_matches_jax(stabilizer, causal, tmp_path):
    form = dataclasses.replace(FORM, stabilizer=stabilizer, causal=causal)
    model = save_random_student(tmp_path / "model", STUDENT.replace(hybrid=form))
    assert_same_velocity(model, export(model, tmp_path / "exported"), (7, 4, 6))


def test_velocity_matches_jax_with_all_blocks_hybrid(tmp_path):
    model = save_random_student(tmp_path / "model", STUDENT.replace(hybrid_blocks="all"))
    assert_same_velocity(model, export(model, tmp_path / "exported"), (7, 4, 6))


def test_velocity_matches_jax_for_unrotated_deep_maps_and_changing_sizes(tmp_path):
    maps = FeatureMapConfig(24, num_layers=3, degree=3, output_activation="softplus", input="unrotated")
    form = dataclasses.replace(FORM, feature_map=maps)
    model = save_random_student(tmp_path / "model", STUDENT.replace(hybrid=form))
    assert_same_velocity(model, export(model, tmp_path / "exported"), (7, 4, 6), (2, 6, 4))


def test_bfloat16_keeps_float32_where_diffusers_does(student):
    transformer = rehyat_torch.load_student(student[1], torch_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    in_float32 = ("time_embedder", "scale_shift_table", "norm2", "log_scale")
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if any(part in name for part in in_float32) else torch.bfloat16), name
    assert transformer.rope.freqs_cos.dtype == torch.float32


def test_bfloat16_is_as_close_to_float32_as_with_softmax_attention(student):
    exact = rehyat_torch.load_student(student[1])
    low = rehyat_torch.load_student(student[1], torch_dtype=torch.bfloat16)
    inputs = model_inputs()

    def error():
        with torch.no_grad():
            return (run_torch(low, *inputs, dtype=torch.bfloat16) - run_torch(exact, *inputs)).square().mean().sqrt()

    hybrid = error()
    for transformer in (exact, low):
        transformer.set_attn_processor(WanAttnProcessor())
    # The rest of the model rounds the same, and the errors are 0.0071 and 0.0068.
    assert 0 < hybrid < 1.5 * error()


@pytest.mark.parametrize(
    "config",
    [
        FeatureMapConfig(8, num_layers=1, degree=1, output_activation="elu_plus_one"),
        FeatureMapConfig(8, num_layers=2, degree=2, hidden_activation="silu", output_activation="relu"),
        FeatureMapConfig(12, num_layers=3, degree=3, hidden_activation="relu", output_activation="softplus"),
        FeatureMapConfig(8, num_layers=2, degree=4, hidden_activation="gelu"),
        FeatureMapConfig(12, kind="hedgehog"),
    ],
    ids=lambda config: f"{config.kind}-{config.hidden_activation}-{config.output_activation}",
)
def test_feature_map_matches_jax(config):
    reference = FeatureMap(config, heads=3, head_dim=4, rngs=nnx.Rngs(0))
    reference.log_scale[...] = jnp.array([-1.0, 0.0, 2.0])
    options = dataclasses.asdict(config)
    del options["input"]
    feature_map = rehyat_torch.make_feature_map(3, 4, **options)
    state = {"log_scale": torch.tensor(np.asarray(reference.log_scale[...]))}
    for i in range(reference.num_kernels):
        state[f"layers.{i}.weight"] = torch.tensor(np.asarray(getattr(reference, f"layer_{i}").kernel[...]))
    feature_map.load_state_dict(state)

    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4), np.float32)
    expected = np.asarray(reference(x))
    found = feature_map(torch.tensor(x)).detach().numpy()
    # Float32 rounding of three sums of up to 12 products; the largest features are fourth powers. 3.4e-7 was seen.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def attention_inputs(frames, tokens_per_frame, dtype=np.float64, scale=1.0):
    rng = np.random.default_rng(0)
    shape = (2, frames * tokens_per_frame, 3)
    query, key, value = (rng.standard_normal((*shape, 4)) for _ in range(3))
    phi_query, phi_key = (rng.random((*shape, 5)) for _ in range(2))
    return [array.astype(dtype) for array in (scale * query, key, value, phi_query, phi_key)]


GEOMETRIES = {
    "ragged": (7, dict(tokens_per_frame=2, chunk_frames=3, overlap_frames=1)),
    "less_than_a_chunk": (2, dict(tokens_per_frame=3, chunk_frames=4, overlap_frames=2)),
    "no_overlap": (4, dict(tokens_per_frame=1, chunk_frames=2, overlap_frames=0)),
    "whole_overlap": (5, dict(tokens_per_frame=1, chunk_frames=2, overlap_frames=2)),
}


@pytest.fixture
def flex_as_on_gpus(monkeypatch):
    """PyTorch's dense flex attention does on CPUs what it refuses there: gradients, and a row's largest score."""
    validate = flex._apply_kernel_options

    def with_largest_scores(*arguments):
        *arguments, wanted = arguments
        return validate(*arguments, wanted._replace(max_scores=False)) | {"OUTPUT_MAX": True}

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_apply_kernel_options", with_largest_scores)

    def attend(*tensors, return_aux, **options):
        return flex.flex_attention(*tensors, return_aux=return_aux._replace(max_scores=True), **options)

    monkeypatch.setattr(rehyat_torch, "_flex_attention", lambda device: attend)
    monkeypatch.setattr(rehyat_torch, "_takes_flex", lambda implementation, *tensors: implementation == "flex")


@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("frames", "geometry"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_attention_and_its_gradients_match_the_definition(frames, geometry, causal, stabilizer, flex_as_on_gpus):
    options = dict(geometry, causal=causal, stabilizer=stabilizer)
    arrays = attention_inputs(frames, geometry["tokens_per_frame"])
    arrays[3][:, ::3] = 0  # queries without linear mass
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    found = {}
    for implementation in ("plain", "sdpa", "flex"):
        y = rehyat_torch.hybrid_attention(*tensors, **options, implementation=implementation)
        cotangent = np.random.default_rng(1).standard_normal(y.shape)
        found[implementation] = (y.detach(), *torch.autograd.grad(y, tensors, torch.tensor(cotangent)))

    with jax.enable_x64(True):
        reference = lambda *arrays: hybrid_attention(*arrays, **options, implementation="reference")
        pull_back = jax.jit(lambda cotangent, *arrays: jax.vjp(reference, *arrays)[1](cotangent))
        expected, expected_gradients = jax.jit(reference)(*arrays), pull_back(cotangent, *arrays)
    # Float64: sums of a few dozen terms of unit size, in another order. 2.7e-15 was seen.
    for tensors in found.values():
        for tensor, wanted in zip(tensors, (expected, *expected_gradients), strict=True):
            np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=1e-14)


OTHER_OPTIONS = {
    "anchors": dict(anchor_frames=2),
    "linear_window": dict(linear_window=True),
    "decay": dict(log_decay=torch.tensor([-0.1, -0.5, -2.0])),
    "branch_gate": dict(branch_gate=torch.tensor([0.2, -0.4, 0.9])),
}


@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
@pytest.mark.parametrize("options", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_fused_attention_matches_plain_attention_in_every_form(options, implementation, flex_as_on_gpus):
    options = dict(chunk_frames=3, overlap_frames=1, **options)
    assert_matches_plain(rehyat_torch.hybrid_attention, implementation, **options)


@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
def test_sdpa_matches_plain_attention_with_a_stride(stabilizer):
    assert_matches_plain(rehyat_torch.strided_attention, "sdpa", stride=3, stabilizer=stabilizer)


@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
def test_fused_attention_matches_plain_attention_without_features(implementation, flex_as_on_gpus):
    without = lambda *tensors, **options: rehyat_torch.window_attention(
        *tensors[:3], *(tensor[..., :0] for tensor in tensors[3:]), **options
    )
    assert_matches_plain(without, implementation, chunk_frames=3, overlap_frames=1, anchor_frames=1)


def assert_matches_plain(attend, implementation, dtype=torch.float64, tolerance=1e-13, device="cpu", size=2, **options):
    tensors = [torch.tensor(array, dtype=dtype, device=device) for array in attention_inputs(8, size)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    results = []
    for name in ("plain", implementation):
        y = attend(*tensors, tokens_per_frame=size, **options, implementation=name)
        gradients = torch.autograd.grad(y.square().sum(), tensors, materialize_grads=True)
        results.append([y.detach(), *gradients])
    assert not torch.equal(results[0][0], results[1][0])  # two implementations, not one
    # Sums of a few dozen terms in another order.
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex"])
def test_fused_attention_is_float32_where_plain_attention_is(implementation, stabilizer, flex_as_on_gpus):
    options = dict(chunk_frames=3, overlap_frames=1, stabilizer=stabilizer)
    # 2.9e-6 was seen, in gradients of up to 8.
    assert_matches_plain(rehyat_torch.hybrid_attention, implementation, torch.float32, 5e-6, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex attention needs a GPU")
@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
def test_compiled_flex_matches_plain_attention_on_a_gpu(stabilizer):
    attend = lambda *tensors, **options: rehyat_torch.hybrid_attention(
        *(F.pad(tensor, (0, 12)) for tensor in tensors), **options
    )[..., :4]
    # Several blocks of 128 queries, and sums of a few hundred terms in float32.
    options = dict(size=50, chunk_frames=3, overlap_frames=1, stabilizer=stabilizer)
    assert_matches_plain(attend, "flex", torch.float32, 2e-5, device="cuda", **options)


@pytest.mark.parametrize(
    ("stabilizer", "compiler"), [("row_max", None), ("joint", None), ("row_max", "eager")], ids=str
)
def test_flex_matches_plain_attention_on_cpus_within_compiled_models_too(stabilizer, compiler):
    options = dict(tokens_per_frame=2, chunk_frames=3, overlap_frames=1, anchor_frames=1, stabilizer=stabilizer)
    attend = functools.partial(rehyat_torch.hybrid_attention, **options)
    flex_attend = functools.partial(attend, implementation="flex")
    if compiler:
        flex_attend = torch.compile(flex_attend, backend=compiler)
    tensors = [torch.tensor(array) for array in attention_inputs(8, 2)]
    # Float64: sums of a few dozen terms of unit size, in another order.
    torch.testing.assert_close(flex_attend(*tensors), attend(*tensors, implementation="plain"), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("tokens", "chunk", "overlap", "anchors"),
    [(700, 300, 100, 0), (640, 256, 128, 128), (700, 150, 150, 70), (500, 40, 0, 0), (90, 30, 10, 10)],
)
def test_window_masks_list_the_blocks_that_an_array_of_all_pairs_gives(tokens, chunk, overlap, anchors):
    with torch.inference_mode():
        found = rehyat_torch._window_mask(tokens, chunk, overlap, anchors, torch.device("cpu"))
    assert not found.kv_indices.is_inference()  # a later training step may take it from the cache
    expected = flex.create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    assert found.shape == expected.shape == (1, 1, tokens, tokens)
    complete = lambda mask: flex.BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices).to_dense()
    for blocks in (flex.BlockMask.to_dense, complete):
        assert torch.equal(blocks(found), blocks(expected))


def test_flex_is_refused_where_pytorch_cannot(monkeypatch):
    tensors = [torch.tensor(array) for array in attention_inputs(7, 2, np.float32)]
    options = dict(tokens_per_frame=2, chunk_frames=3, overlap_frames=1)
    attend = functools.partial(rehyat_torch.hybrid_attention, *tensors, **options)
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="\"flex\" has no gradients on the device 'cpu'"):
        attend(implementation="flex")
    attend(implementation="auto").sum().backward()
    monkeypatch.delattr(flex, "AuxRequest")
    with torch.no_grad(), pytest.raises(ValueError, match=r"needs PyTorch 2\.9 or later, found 2"):
        attend(implementation="flex")


def test_auto_takes_sdpa_for_large_chunks():
    def attend(tokens_per_frame, implementation):
        tensors = [torch.tensor(array) for array in attention_inputs(3, tokens_per_frame, np.float32)]
        options = dict(tokens_per_frame=tokens_per_frame, chunk_frames=2, overlap_frames=1)
        return rehyat_torch.hybrid_attention(*tensors, **options, implementation=implementation)

    for tokens_per_frame, expected, other in ((256, "sdpa", "plain"), (2, "plain", "sdpa")):
        found = attend(tokens_per_frame, "auto")
        assert torch.equal(
            found[:, : 2 * tokens_per_frame], attend(tokens_per_frame, expected)[:, : 2 * tokens_per_frame]
        )
        assert not torch.equal(found, attend(tokens_per_frame, other))


@pytest.mark.parametrize("implementation", ["plain", "sdpa", "flex"])
@pytest.mark.parametrize("stabilizer", ["row_max", "joint"])
def test_attention_is_finite_at_extreme_scores_and_without_linear_mass(stabilizer, implementation, flex_as_on_gpus):
    options = dict(tokens_per_frame=1, chunk_frames=2, overlap_frames=1, stabilizer=stabilizer)
    query, key, value, phi_query, phi_key = attention_inputs(6, 1, np.float32, scale=200.0)
    query[0], key[0] = -np.abs(query[0]), np.abs(key[0])  # All scores far below zero.
    phi_query[:, ::2] = 0
    tensors = [torch.tensor(array, requires_grad=True) for array in (query, key, value, phi_query, phi_key)]
    y = rehyat_torch.hybrid_attention(*tensors, **options, implementation=implementation)
    for tensor in (y, *torch.autograd.grad(y.sum(), tensors)):
        assert tensor.isfinite().all()
    doubles = (tensor.detach().double() for tensor in tensors)
    exact = rehyat_torch.hybrid_attention(*doubles, **options, implementation="plain")
    # A score of a few hundred is off by 1e-5 in float32, and its exponential as much. 1.1e-5 was seen.
    np.testing.assert_allclose(y.detach().numpy(), exact.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["plain", "sdpa", "flex"])
def test_attention_computes_in_float32_under_autocast(implementation):
    options = dict(tokens_per_frame=2, chunk_frames=3, overlap_frames=1, implementation=implementation)
    tensors = [torch.tensor(array) for array in attention_inputs(7, 2, np.float32)]
    expected = rehyat_torch.hybrid_attention(*tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rehyat_torch.hybrid_attention(*tensors, **options), expected)


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Remembers the bytes of the largest tensor that is made, apart from views of `inputs` and the joined output."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {tensor.data_ptr() for tensor in inputs}
        self.nbytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func is not torch.cat:
            storage = result.untyped_storage()
            if storage.data_ptr() not in self.inputs:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return result


def test_attention_memory_does_not_grow_with_the_video():
    def largest(frames):
        # bfloat16, so that a conversion of whole inputs to float32 would show.
        tensors = [torch.tensor(array).bfloat16() for array in attention_inputs(frames, 9, np.float32)]
        with LargestTensor(tensors) as mode:
            rehyat_torch.hybrid_attention(*tensors, tokens_per_frame=9, chunk_frames=2, overlap_frames=1)
        return mode.nbytes

    scores = 4 * 2 * 3 * 18 * 27  # float32 [batch, heads, chunk's tokens, window's tokens]
    assert largest(8) == largest(40) == scores


def test_state_dict_has_exactly_the_exported_names(student, capfd):
    transformer = rehyat_torch.load_student(student[1])
    assert capfd.readouterr() == ("", ""), "loading warned"
    stored, loaded = load_file(student[1] / WEIGHTS), transformer.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    maps = {name.removeprefix("blocks.2.attn1.") for name in stored if name.startswith("blocks.2.attn1.feature_map_")}
    sides = ("feature_map_query", "feature_map_key")
    assert maps == {f"{side}.{name}" for side in sides for name in ("layers.0.weight", "layers.1.weight", "log_scale")}
    assert not any("blocks.1.attn1.feature_map_" in name for name in stored)
    assert not transformer.training


def test_saved_student_returns_to_jax_bit_for_bit(student, tmp_path):
    model, folder = student
    rehyat_torch.save_student(rehyat_torch.load_student(folder), tmp_path / "saved")
    config, params, metadata = load_params(tmp_path / "saved")
    expected_config, expected, expected_metadata = load_params(model)
    assert (config, metadata) == (expected_config, expected_metadata)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"], "temporary files are left"
    with pytest.raises(FileExistsError, match="already exists"):
        rehyat_torch.save_student(rehyat_torch.load_student(folder), tmp_path / "saved")


def test_sharded_student_loads(student, tmp_path):
    model, folder = student
    convert_to_torch(model, tmp_path / "sharded", "diffusers", max_shard_bytes=200_000)
    assert len(list(tmp_path.glob("sharded/*.safetensors"))) > 2
    expected = rehyat_torch.load_student(folder).state_dict()
    for name, tensor in rehyat_torch.load_student(tmp_path / "sharded").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_exported_folder_needs_neither_jax_nor_this_package(student):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import rehyat_torch; rehyat_torch.load_student(sys.argv[1]); "
        "print(rehyat_torch.__file__, {'jax', 'flax', 'rehyat_jax'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code, student[1]], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(student[1] / "rehyat_torch.py"), "set()"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_every_parameter_learns_and_checkpointing_keeps_the_gradients(student, use_reentrant):
    transformer = rehyat_torch.load_student(student[1]).train()

    def gradients():
        transformer.zero_grad()
        run_torch(transformer, *model_inputs()).square().sum().backward()
        return {name: parameter.grad for name, parameter in transformer.named_parameters()}

    expected = gradients()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name
    checkpoint = lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=use_reentrant)
    transformer.enable_gradient_checkpointing(checkpoint)
    for name, gradient in gradients().items():
        # The same operations run again; only the blocks' shares of the text's gradient are added in another order.
        assert (gradient - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def test_videos_of_two_sizes_cannot_be_mixed_up_under_checkpointing(student):
    transformer = rehyat_torch.load_student(student[1])
    transformer.enable_gradient_checkpointing()
    velocity = run_torch(transformer, *model_inputs(7, 4, 6))
    run_torch(transformer, *model_inputs(3, 4, 6))
    with pytest.raises(ValueError, match="run backward before the next video"):
        velocity.sum().backward()


def test_copies_of_a_model_keep_their_own_grid(student):
    transformer = rehyat_torch.load_student(student[1])
    duplicate = copy.deepcopy(transformer)
    inputs = model_inputs(7, 4, 6)
    with torch.no_grad():
        expected = run_torch(transformer, *inputs)
        assert torch.equal(run_torch(duplicate, *inputs), expected)


def test_loaded_student_does_not_depend_on_its_files(student, exported):
    transformer = rehyat_torch.load_student(exported)
    size = (exported / WEIGHTS).stat().st_size
    with open(exported / WEIGHTS, "r+b") as file:
        file.write(bytes(size))
    for name, tensor in load_file(student[1] / WEIGHTS).items():
        assert torch.equal(transformer.state_dict()[name], tensor), name


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def damage_json(file, change):
    def damage(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


SCALE = "blocks.2.attn1.feature_map_key.log_scale"
FEATURE_MAP = "blocks.1.attn1.feature_map_query.layers.0.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_tensors(lambda tensors: tensors.pop(SCALE)), ValueError, rf"missing: \['{SCALE}'\]"),
        (
            damage_tensors(lambda tensors: tensors.update({FEATURE_MAP: torch.zeros(2, 32, 16)})),
            ValueError,
            rf"unexpected: \['{FEATURE_MAP}'\]",
        ),
        (damage_tensors(lambda tensors: tensors.update({SCALE: torch.zeros(3)})), RuntimeError, SCALE),
        (lambda folder: (folder / "rehyat.json").unlink(), FileNotFoundError, "rehyat.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
        (damage_json("rehyat.json", lambda form: form.pop("attention")), ValueError, "no hybrid blocks"),
        (
            damage_json("rehyat.json", lambda form: form["attention"][0]["feature_map"].update(input="both")),
            ValueError,
            "rotated.*found 'both'",
        ),
        (damage_json("config.json", lambda config: config.update(_class_name="WanModel")), ValueError, "WanModel"),
    ],
    ids=["missing", "unexpected", "shape", "no_form", "no_weights", "no_blocks", "input", "original_layout"],
)
def test_wrong_folders_are_named(exported, damage, error, message):
    damage(exported)
    with pytest.raises(error, match=message):
        rehyat_torch.load_student(exported)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens_per_frame=4), "whole frames of 4 tokens, found 14"),
        (dict(chunk_frames=0, overlap_frames=0), "found 0 and 0"),
        (dict(overlap_frames=4), "found 4 and 3"),
        (dict(stabilizer="none"), "found 'none'"),
        (dict(implementation="flash"), "found 'flash'"),
    ],
)
def test_wrong_attention_arguments_are_named(options, message):
    arguments = dict(tokens_per_frame=2, chunk_frames=3, overlap_frames=1) | options
    with pytest.raises(ValueError, match=message):
        rehyat_torch.hybrid_attention(*map(torch.tensor, attention_inputs(7, 2)), **arguments)
