"""Wan2.1's VAE against diffusers' AutoencoderKLWan: complete clips, streams, gradients, bfloat16 and weights."""

import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx
from oracles import TINY_VAE, random_wan, random_wan_vae
from safetensors.torch import load_file, save_file
from test_weights import WEIGHTS, assert_same_folders, assert_same_trees

import rehyat_jax
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan_vae.config import WAN_VAE_PRESETS, WanVaeConfig
from rehyat_jax.models.wan_vae.modeling import RMSNorm, WanAutoencoder
from rehyat_jax.models.wan_vae.vae import WanVae, decode_clip, decode_stream, initial_decoder_state
from rehyat_jax.weights.models import VAES
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint, write_torch_checkpoint

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

# Both sum some 50 layers of float32 in other orders: errors are 7e-6 at values of 0.4.
TOLERANCE = 1e-4
# The two forms sum the same products; they differ by the compiler's order of the sums: errors are 3e-6.
FORM_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4

MEAN = np.array(WanVaeConfig().latents_mean, np.float32)
STD = np.array(WanVaeConfig().latents_std, np.float32)

SMALL = WanVaeConfig(base_dim=4, dim_mult=(1, 2, 1), num_res_blocks=1, temporal_downsample=(True, True))
"""Half as deep as the oracle, for tests without it: time and space change by 4."""


@pytest.fixture(scope="module")
def oracle():
    return random_wan_vae()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    """The oracle as diffusers writes it."""
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vae(folder):
    return rehyat_jax.load_vae(folder)


@pytest.fixture(scope="module")
def abstract():
    return abstract_small_vae()


def abstract_small_vae():
    """(graphdef, shapes of the parameters) of `SMALL`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanAutoencoder(SMALL, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


@pytest.fixture(scope="module")
def small(abstract):
    return random_small_vae(*abstract)


def random_small_vae(graphdef, shapes):
    """A VAE of `SMALL` sizes with random parameters."""
    rng = np.random.default_rng(3)
    scale = lambda leaf: math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.5
    return WanVae(
        nnx.merge(graphdef, jax.tree.map(lambda x: scale(x) * rng.standard_normal(x.shape, np.float32), shapes))
    )


def random_latents(frames, height=3, width=5):
    """Two clips; the sizes are odd, so that no axis can stand for another."""
    return np.random.default_rng(0).standard_normal((2, frames, height, width, 16), np.float32)


def random_video(frames, height=24, width=40):
    return np.random.default_rng(1).uniform(-1, 1, (2, frames, height, width, 3)).astype(np.float32)


def to_torch(array, dtype=torch.float32):
    return torch.tensor(np.asarray(array)).permute(0, 4, 1, 2, 3).to(dtype)


def to_numpy(tensor):
    return tensor.detach().float().permute(0, 2, 3, 4, 1).numpy()


def oracle_decode(oracle, latents, dtype=torch.float32):
    """diffusers' video; its pipeline restores the scale of the latents before calling the model."""
    with torch.no_grad():
        return to_numpy(oracle.decode(to_torch(latents * STD + MEAN, dtype)).sample)


def oracle_encode(oracle, video, dtype=torch.float32):
    with torch.no_grad():
        return (to_numpy(oracle.encode(to_torch(video, dtype)).latent_dist.mode()) - MEAN) / STD


# ---------------------------------------------------------------------------------------------------------- numerics


SIZES = [(1, 3, 5), (5, 3, 5), (9, 1, 3), (17, 1, 3)]
"""Frames of a clip, height and width of its latents."""


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decoded_video_matches_diffusers(oracle, vae, size):
    frames, height, width = size
    latents = random_latents((frames + 3) // 4, height, width)
    expected = oracle_decode(oracle, latents)
    for whole in (True, False):
        video = vae.decode(latents, whole=whole)
        assert video.shape == expected.shape == (2, frames, 8 * height, 8 * width, 3) and video.dtype == jnp.float32
        assert np.abs(video - expected).max() < TOLERANCE, whole


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_latents_match_diffusers(oracle, vae, size):
    frames, height, width = size
    video = random_video(frames, 8 * height, 8 * width)
    expected = oracle_encode(oracle, video)
    for whole in (True, False):
        latents = vae.encode(video, whole=whole)
        assert latents.shape == expected.shape == (2, (frames + 3) // 4, height, width, 16)
        assert latents.dtype == jnp.float32
        assert np.abs(latents - expected).max() < TOLERANCE, whole


def test_decoded_video_is_clipped(oracle, vae):
    latents = 20 * random_latents(2)
    for whole in (True, False):
        video = vae.decode(latents, whole=whole)
        assert np.abs(video).max() == 1
        assert np.abs(video - oracle_decode(oracle, latents)).max() < TOLERANCE


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_clip_cut_anywhere_gives_the_same_frames_and_latents(small, cut):
    latents, video = random_latents(5), random_video(17, 12, 20)
    first, state = small.decode_chunk(latents[:, :cut])
    second, _ = small.decode_chunk(latents[:, cut:], state)
    assert first.shape[1] == 4 * (cut - 1) + 1 and second.shape[1] == 4 * (5 - cut)
    assert np.abs(np.concatenate([first, second], 1) - small.decode(latents, whole=True)).max() < FORM_TOLERANCE

    first, state = small.encode_chunk(video[:, : 4 * cut - 3])
    second, _ = small.encode_chunk(video[:, 4 * cut - 3 :], state)
    assert first.shape[1] == cut and second.shape[1] == 5 - cut
    assert np.abs(np.concatenate([first, second], 1) - small.encode(video, whole=True)).max() < FORM_TOLERANCE


def test_a_stream_of_single_latent_frames_is_traced_once(oracle, vae, monkeypatch):
    latents, traced, state, frames = random_latents(5, 1, 3), [], None, []
    decode = WanAutoencoder.decode
    monkeypatch.setattr(WanAutoencoder, "decode", lambda *inputs: traced.append(inputs) or decode(*inputs))
    decode_stream.clear_cache()
    for index in range(latents.shape[1]):
        video, state = vae.decode_chunk(latents[:, index : index + 1], state)
        frames.append(video)
    assert [video.shape[1] for video in frames] == [1, 4, 4, 4, 4]
    assert np.abs(np.concatenate(frames, 1) - oracle_decode(oracle, latents)).max() < TOLERANCE
    # The shapes of the caches may take another one, without a program.
    assert 1 <= len(traced) <= 2


def lowered(abstract, decode, frames):
    """The program that decodes latents of 32x40 pixels."""
    state = jax.eval_shape(lambda params: initial_decoder_state(abstract[0], params, 1, 8, 10), abstract[1])
    latents = jax.ShapeDtypeStruct((1, frames, 8, 10, 16), jnp.float32)
    return decode.lower(*abstract, latents, *([state] if decode is decode_stream else []))


def is_kernel(path):
    return "kernel" in jax.tree_util.keystr(path)


def test_a_streams_program_has_one_decoder_for_every_length(abstract):
    programs = [lowered(abstract, decode_stream, frames).as_text() for frames in (1, 21)]
    shapes = [leaf.shape[-4:-2] for path, leaf in jax.tree.leaves_with_path(abstract[1]["decoder"]) if is_kernel(path)]
    expected = sum(shape != (1, 1) for shape in shapes)  # others are matrix products
    assert [program.count("stablehlo.convolution") for program in programs] == [expected, expected]
    assert len({len(program.splitlines()) for program in programs}) == 1


def test_a_streams_memory_does_not_grow_with_its_length(abstract):
    def growth(decode):
        programs = (lowered(abstract, decode, frames).compile() for frames in (12, 2))
        long, short = (program.memory_analysis().temp_size_in_bytes for program in programs)
        return long - short

    video = 4 * (12 - 2) * 32 * 40 * 3 * 4
    # The video is in memory twice, as steps and as a clip.
    assert growth(decode_stream) <= 2 * video
    # The limit can be exceeded: without caches, all activations grow.
    assert growth(decode_clip) > 2 * video


def test_gradients_match_diffusers(oracle, folder, vae, tmp_path):
    latents = random_latents(2, 1, 3)
    cotangent = np.random.default_rng(2).standard_normal((2, 5, 8, 24, 3), np.float32)

    oracle.zero_grad()
    inputs = to_torch(latents * STD + MEAN).requires_grad_()
    (oracle.decode(inputs).sample * to_torch(cotangent)).sum().backward()
    # Gradients have the parameters' names and shapes, so they are read like a checkpoint. The encoder's are zero.
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in oracle.named_parameters()}
    save_file({name: grad.contiguous() for name, grad in grads.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = rehyat_jax.load_vae(tmp_path).params

    loss = lambda params, latents: (decode_clip(vae.graphdef, params, latents) * cotangent).sum()
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(vae.params, latents)
    wanted = (expected, to_numpy(inputs.grad) * STD)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        name, difference, size = jax.tree_util.keystr(path), np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        assert difference <= GRADIENT_TOLERANCE * size, f"{name}: {difference} of {size}"
        assert (size == 0) == ("['encoder']" in name or "['quant_conv']" in name), name


def test_a_streams_gradients_are_those_of_the_complete_clip(small):
    latents = random_latents(2, 1, 3)
    cotangent = np.random.default_rng(2).standard_normal((2, 5, 4, 12, 3), np.float32)
    loss = lambda decode: lambda params: (decode(params) * cotangent).sum()

    def stream(params):
        state = initial_decoder_state(small.graphdef, params, 2, 1, 3)
        return decode_stream(small.graphdef, params, latents, state)[0][:, 3:]

    whole = lambda params: decode_clip(small.graphdef, params, latents)
    found, wanted = (jax.jit(jax.grad(loss(decode)))(small.params)["decoder"] for decode in (stream, whole))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        difference, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        assert difference <= GRADIENT_TOLERANCE * size > 0, jax.tree_util.keystr(path)


def test_the_norms_gradient_at_zero_is_that_of_torch():
    """A root has no derivative at zero, but the norm has, because of its least length."""
    x = torch.zeros(2, 3, requires_grad=True)
    torch.nn.functional.normalize(x, dim=-1).sum().backward()
    ours = jax.grad(lambda x: RMSNorm(3)(x).sum())(jnp.zeros((2, 3)))
    np.testing.assert_allclose(ours, x.grad * 3**0.5, rtol=1e-6)


def test_bfloat16_is_as_close_to_float32_as_diffusers_own(oracle, folder):
    latents, video = random_latents(2), random_video(5)
    low = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.bfloat16)
    vae = rehyat_jax.load_vae(folder, dtype=jnp.bfloat16)
    for ours, theirs, exact in (
        (vae.decode(latents), oracle_decode(low, latents, torch.bfloat16), oracle_decode(oracle, latents)),
        (vae.encode(video, whole=True), oracle_encode(low, video, torch.bfloat16), oracle_encode(oracle, video)),
    ):
        ours, theirs = np.abs(ours - exact), np.abs(theirs - exact)
        assert ours.mean() <= theirs.mean()
        assert ours.max() <= theirs.max()
        assert ours.mean() > 0, "nothing ran in bfloat16"


def test_preset_has_the_published_size():
    model = nnx.eval_shape(lambda: WanAutoencoder(WAN_VAE_PRESETS["wan2.1"], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 126_892_531


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        ("encode", (1, 6, 24, 40, 3), "4n + 1 frames"),
        ("encode", (1, 0, 24, 40, 3), "4n + 1 frames"),
        ("encode", (1, 5, 24, 44, 3), "multiples of 8"),
        ("encode", (1, 5, 20, 40, 3), "multiples of 8"),
        ("encode", (1, 3, 5, 24, 40), "width, 3"),
        ("encode", (5, 24, 40, 3), "batch"),
        ("decode", (1, 16, 2, 3, 5), "width, 16"),
        ("decode", (2, 3, 5, 16), "batch"),
        ("decode", (1, 0, 3, 5, 16), "frames"),
    ],
)
def test_wrong_shapes_are_named(vae, method, shape, expected):
    with pytest.raises(InputError, match=f"{re.escape(expected)}.* found shape {re.escape(str(shape))}"):
        getattr(vae, method)(np.zeros(shape, np.float32))


def test_chunks_of_other_sizes_than_the_state_are_refused(vae):
    _, state = vae.decode_chunk(random_latents(1))
    with pytest.raises(InputError, match=r"latents must be .*\(2, 3, 5\).* found \(1, 3, 5\)"):
        vae.decode_chunk(random_latents(1)[:1], state)
    _, state = vae.encode_chunk(random_video(1))
    with pytest.raises(InputError, match="4n frames"):
        vae.encode_chunk(random_video(5), state)


# ----------------------------------------------------------------------------------------------------------- weights


def convert(source, destination, layout, **options):
    """Writes a PyTorch checkpoint in another layout."""
    destination.mkdir()
    write_torch_checkpoint(destination, open_torch_checkpoint(source, specs=VAES), layout, **options)
    return destination


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 500_000], ids=["one file", "shards"])
def test_both_layouts_keep_every_byte(tmp_path, dtype, max_shard_bytes):
    random_wan_vae().to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    convert(tmp_path / "theirs", tmp_path / "ours", "diffusers", max_shard_bytes=max_shard_bytes)
    assert_same_folders(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "theirs", tmp_path / "original", "original")
    assert [file.name for file in (tmp_path / "original").iterdir()] == [WEIGHTS]
    convert(tmp_path / "original", tmp_path / "weights", "diffusers", max_shard_bytes=max_shard_bytes)
    # The original layout has no sizes; those that shapes do not tell are the published ones, as the oracle's are.
    assert_same_folders(tmp_path / "theirs", tmp_path / "weights")


def test_diffusers_reads_the_original_layout_as_its_own_parameters(oracle, folder, tmp_path):
    convert(folder, tmp_path / "original", "original")
    # Its converter from the original names is the oracle of our table.
    loaded = AutoencoderKLWan.from_single_file(str(tmp_path / "original" / WEIGHTS), config=str(folder))
    expected = oracle.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_every_kind_of_source_gives_the_same_parameters(folder, vae, tmp_path):
    original = convert(folder, tmp_path / "original", "original")
    # Repackaged files lie next to a transformer's configuration.
    (original / WEIGHTS).rename(original / "Wan2.1_VAE.safetensors")
    (original / "config.json").write_text('{"_class_name": "WanModel"}')
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "vae").symlink_to(folder)
    for source in (folder / WEIGHTS, original, original / "Wan2.1_VAE.safetensors", tmp_path / "pipeline"):
        loaded = rehyat_jax.load_vae(source)
        assert loaded.config == vae.config == WanVaeConfig(base_dim=8)
        assert_same_trees(loaded.params, vae.params)


def test_statistics_of_the_latents_come_from_config_json(oracle, folder, vae, tmp_path):
    statistics = {"latents_mean": [-0.5, *[0.25] * 15], "latents_std": [2.0] * 16}
    AutoencoderKLWan(**TINY_VAE, **statistics).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    ours, usual = (model.encode(random_video(1)) for model in (rehyat_jax.load_vae(tmp_path), vae))
    expected = (usual * STD + MEAN - np.array(statistics["latents_mean"], np.float32)) / 2
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_half_precision_files_become_float32_parameters(tmp_path):
    random_wan_vae().to(torch.bfloat16).save_pretrained(tmp_path)
    params = rehyat_jax.load_vae(tmp_path).params
    theirs = load_file(tmp_path / WEIGHTS)["decoder.conv_in.weight"].float().numpy()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["decoder"]["conv_in"]["kernel"], theirs.transpose(2, 3, 4, 1, 0))


NORM, KERNEL = "decoder.up_blocks.1.resnets.2.norm1.gamma", "encoder.down_blocks.2.resample.1.weight"

DAMAGED = {
    "missing": (lambda t, c: t.pop(NORM), NORM, "missing", "get it again"),
    "missing, of which sizes follow": (
        lambda t, c: t.pop("post_quant_conv.weight"),
        "post_quant_conv.weight",
        "missing",
        "get it again",
    ),
    "unknown": (lambda t, c: t.update(extra=torch.zeros(2)), "extra", "not part of Wan2.1's VAE", "remove it"),
    "mis-shaped": (
        lambda t, c: t.update({KERNEL: torch.zeros(8, 8, 3)}),
        KERNEL,
        "[8, 8, 3, 3], found [8, 8, 3]",
        "different checkpoints",
    ),
    "mis-shaped norm": (lambda t, c: t.update({NORM: torch.zeros(32)}), NORM, "[32, 1, 1, 1], found [32]"),
    "NaN": (lambda t, c: t[NORM].fill_(float("nan")), NORM, "NaN"),
    "transformer's": (lambda t, c: t.update({"blocks.0.a": torch.zeros(2)}), "blocks.0.a", "a transformer"),
    "Wan2.2": (lambda t, c: c.update(is_residual=True), "config.json", "is_residual should be False, found True"),
    "other width": (lambda t, c: c.update(base_dim=16), "base_dim should be 8", "encoder.conv_in.weight", "found 16"),
    "other class": (lambda t, c: c.update(_class_name="AutoencoderKL"), "_class_name", "AutoencoderKLWan"),
    "unknown field": (lambda t, c: c.update(z_dims=16), "unknown field 'z_dims'", "'z_dim'", "rename"),
    "statistics": (lambda t, c: c.update(latents_mean=[0.0]), "latents_mean", "each of the 16 channels", "found 1"),
    "infinite mean": (lambda t, c: c.update(latents_mean=[float("inf")] * 16), "latents_mean", "finite", "correct"),
    "zero deviation": (lambda t, c: c.update(latents_std=[0.0] * 16), "latents_std must be positive"),
    "stages": (lambda t, c: c.update(temperal_downsample=[True]), "temporal_downsample", "one entry less"),
    "no stages": (lambda t, c: c.update(dim_mult=[]), "dim_mult"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_checkpoints_are_refused_by_name(folder, tmp_path, damage):
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    change, *expected = DAMAGED[damage]
    change(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refusal:
        rehyat_jax.load_vae(tmp_path)
    assert all(part in str(refusal.value) for part in (str(tmp_path), *expected)), refusal.value
    assert refusal.value.exit_code == 2


def test_models_are_not_taken_for_one_another(folder, tmp_path):
    with pytest.raises(InputError, match=r"neither .*Wan's text-to-video transformer"):
        rehyat_jax.load_wan(folder)
    random_wan(num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"blocks\.0\.\S+ belongs to a transformer; only .*Wan2\.1's VAE"):
        rehyat_jax.load_vae(tmp_path)


def test_a_pickle_is_refused_with_the_command_that_converts_it(folder, vae, tmp_path):
    tensors = load_file(convert(folder, tmp_path / "original", "original") / WEIGHTS)
    tensors["conv1.bias"] = tensors["conv1.bias"].repeat(2)[: tensors["conv1.bias"].numel()]  # a part of its storage
    torch.save(tensors, tmp_path / "Wan 2.1's VAE.pth")
    with pytest.raises(InputError, match="pickle") as refusal:
        rehyat_jax.load_vae(tmp_path / "Wan 2.1's VAE.pth")
    command = str(refusal.value).split("make one: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert_same_trees(rehyat_jax.load_vae(tmp_path / "Wan 2.1's VAE.safetensors").params, vae.params)
