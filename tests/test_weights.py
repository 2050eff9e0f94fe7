"""Checkpoints: bit-exact conversion in both directions, what upstream's own libraries read, streaming and loading."""

import filecmp
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx, traverse_util
from oracles import random_wan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rehyat_jax.attention import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.weights import load_params, load_wan, read_model_metadata, save_model
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch
from rehyat_jax.weights.load import module_bytes
from rehyat_jax.weights.model_checkpoint import write_model_checkpoint
from rehyat_jax.weights.replacing import MARK
from rehyat_jax.weights.safetensors_file import read_header, read_tensor
from rehyat_jax.weights.streamed import StreamedArray, StreamedModel
from rehyat_jax.weights.torch_checkpoint import write_torch_checkpoint
from rehyat_jax.weights.torch_config import write_torch_config
from rehyat_jax.weights.wan.names import wan_table
from rehyat_jax.weights.wan.spec import WAN

WEIGHTS = "diffusion_pytorch_model.safetensors"

STUDENT = WanConfig(
    num_heads=2,
    head_dim=32,
    ffn_dim=48,
    num_layers=3,
    text_dim=24,
    text_length=8,
    hybrid_blocks=(0, 2),
    hybrid=HybridConfig(chunk_frames=2, stabilizer="joint", feature_map=FeatureMapConfig(features=16, num_layers=3)),
)
"""Not all of its blocks are hybrid, so that a row of stacked feature maps is not the index of a block."""


def cast_like_diffusers(model: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """Casts all but the modules that diffusers keeps in float32 in half-precision checkpoints."""
    keep = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in keep):
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def oracle(request) -> WanTransformer3DModel:
    """Half-precision ones keep some parameters in float32, as published checkpoints do."""
    model = random_wan()
    return model if request.param == "float32" else cast_like_diffusers(model, getattr(torch, request.param))


@pytest.fixture
def diffusers_folder(oracle, tmp_path) -> Path:
    """The oracle as diffusers writes it."""
    oracle.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


def random_params(config: WanConfig, seed: int = 0) -> dict:
    """Float32 parameters of a model, all of them random."""
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, dtype=np.float32), abstract)


def assert_same_folders(left: Path, right: Path) -> None:
    """The same files with the same bytes, but for an export's mark, and the version in config.json."""
    files = [sorted(file for file in folder.iterdir() if file.name != MARK) for folder in (left, right)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for file in files[0]:
        if file.name == "config.json":
            texts = [(folder / file.name).read_text().splitlines() for folder in (left, right)]
            assert texts[0][:2] + texts[0][3:] == texts[1][:2] + texts[1][3:]
            assert texts[0][2].startswith('  "_diffusers_version": ')
        else:
            assert filecmp.cmp(file, right / file.name, shallow=False), file.name


def assert_same_trees(left: dict, right: dict) -> None:
    """The same paths, dtypes and bits."""
    left, right = (traverse_util.flatten_dict(tree, sep=".") for tree in (left, right))
    assert left.keys() == right.keys()
    for path, array in left.items():
        assert array.dtype == right[path].dtype, path
        assert np.asarray(array).tobytes() == np.asarray(right[path]).tobytes(), path


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a fresh process from the repository's root; returns its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------ PyTorch round trips


@pytest.mark.parametrize("max_shard_bytes", [10**9, 150_000])
def test_export_has_the_bytes_that_diffusers_writes(tmp_path, oracle, max_shard_bytes):
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    convert_from_torch(tmp_path / "theirs", tmp_path / "model")
    convert_to_torch(tmp_path / "model", tmp_path / "ours", "diffusers", max_shard_bytes=max_shard_bytes)
    assert_same_folders(tmp_path / "theirs", tmp_path / "ours")
    is_sharded = len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert is_sharded == (max_shard_bytes < 10**9)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 150_000])
def test_diffusers_to_original_and_back_keeps_every_byte(tmp_path, diffusers_folder, max_shard_bytes):
    convert_from_torch(diffusers_folder, tmp_path / "a")
    convert_to_torch(tmp_path / "a", tmp_path / "original", "original", max_shard_bytes=max_shard_bytes)
    convert_from_torch(tmp_path / "original", tmp_path / "b")
    convert_to_torch(tmp_path / "b", tmp_path / "again", "diffusers")
    assert_same_folders(diffusers_folder, tmp_path / "again")


def test_diffusers_loads_an_export_completely(tmp_path, diffusers_folder):
    convert_from_torch(diffusers_folder, tmp_path / "model")
    convert_to_torch(tmp_path / "model", tmp_path / "export", "diffusers", max_shard_bytes=150_000)
    _, info = WanTransformer3DModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    # A missing key is only a warning in diffusers, and its parameter random.
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_diffusers_reads_the_original_layout_as_its_own_parameters(tmp_path):
    oracle = random_wan(seed=1)
    oracle.save_pretrained(tmp_path / "diffusers")
    convert_from_torch(tmp_path / "diffusers", tmp_path / "model")
    convert_to_torch(tmp_path / "model", tmp_path / "original", "original")
    # Its converter from the original names is the oracle of our table.
    loaded = WanTransformer3DModel.from_single_file(
        str(tmp_path / "original" / WEIGHTS), config=str(tmp_path / "diffusers")
    )
    expected = oracle.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_weights_are_laid_out_as_flax_expects(tmp_path):
    model = random_wan()
    model.save_pretrained(tmp_path / "torch")
    _, params, _ = load_params(tmp_path / "torch")
    ours = traverse_util.flatten_dict(params, sep=".")
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    up = "ffn.net.0.proj.weight"
    np.testing.assert_array_equal(ours["blocks.feed_forward.up.kernel"][1], theirs[f"blocks.1.{up}"].T)
    convolution = theirs["patch_embedding.weight"]
    np.testing.assert_array_equal(ours["patch_embedding.kernel"], np.moveaxis(convolution, (0, 1), (-1, -2)))


def test_original_config_is_the_published_one(tmp_path):
    metadata = {"codec": "wan_vae", "text_encoder": "umt5"}
    write_torch_config(WAN, tmp_path, WAN_PRESETS["t2v-1.3B"], metadata, "original")
    # config.json of Wan-AI/Wan2.1-T2V-1.3B.
    published = """{
  "_class_name": "WanModel",
  "_diffusers_version": "0.30.0",
  "dim": 1536,
  "eps": 1e-06,
  "ffn_dim": 8960,
  "freq_dim": 256,
  "in_dim": 16,
  "model_type": "t2v",
  "num_heads": 12,
  "num_layers": 30,
  "out_dim": 16,
  "text_len": 512
}
"""
    assert (tmp_path / "config.json").read_text() == published
    assert not (tmp_path / "rehyat.json").exists()


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_student_keeps_its_form_and_its_makers(tmp_path, layout):
    params = random_params(STUDENT)
    names = {"codec": "space_to_depth", "text_encoder": "word_vectors"}
    save_model(tmp_path / "student", STUDENT, params, **names)
    convert_to_torch(tmp_path / "student", tmp_path / "torch", layout)
    convert_from_torch(tmp_path / "torch", tmp_path / "again")
    config, restored, metadata = load_params(tmp_path / "again")
    assert (config, metadata) == (STUDENT, names)
    assert_same_trees(restored, params)
    tensors = load_file(tmp_path / "torch" / WEIGHTS)
    attention = {"diffusers": "attn1", "original": "self_attn"}[layout]
    kernel = tensors[f"blocks.2.{attention}.feature_map_key.layers.1.weight"]
    np.testing.assert_array_equal(kernel.numpy(), params["feature_maps"]["key"]["layer_1"]["kernel"][1])


# ----------------------------------------------------------------------------------------------------- configurations


def test_config_comes_from_shapes_where_there_is_no_config_file(tmp_path):
    random_wan(head_dim=128).save_pretrained(tmp_path)
    expected, _ = read_model_metadata(tmp_path)
    (tmp_path / "config.json").unlink()
    found, metadata = read_model_metadata(tmp_path / WEIGHTS)
    assert found == expected
    assert metadata == {"codec": "wan_vae", "text_encoder": "umt5"}


def test_pipeline_folder_is_read_through_its_transformer(tmp_path):
    random_wan().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert read_model_metadata(tmp_path) == read_model_metadata(tmp_path / "transformer")


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model.", "model.diffusion_model."])
def test_a_prefix_of_all_names_in_a_repackaged_file_is_left_out(tmp_path, prefix):
    random_wan().save_pretrained(tmp_path / "published")
    (tmp_path / "repackaged").mkdir()
    (tmp_path / "repackaged" / "config.json").write_bytes((tmp_path / "published" / "config.json").read_bytes())
    tensors = {prefix + name: tensor for name, tensor in load_file(tmp_path / "published" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "repackaged" / "wan.safetensors")
    for name in ("published", "repackaged"):
        convert_from_torch(tmp_path / name, tmp_path / f"{name}.model")
    (config, params, metadata), expected = (load_params(tmp_path / f"{n}.model") for n in ("repackaged", "published"))
    assert (config, metadata) == (expected[0], expected[2])
    assert_same_trees(params, expected[1])

    save_file(tensors | {"vae.conv1.weight": torch.zeros(2)}, tmp_path / "repackaged" / "wan.safetensors")
    with pytest.raises(InputError, match=rf"begin with '{prefix}' or none, found {prefix}blocks.* and vae.conv1"):
        read_model_metadata(tmp_path / "repackaged")


# ------------------------------------------------------------------------------------------------- safetensors files


def test_tensors_are_read_as_safetensors_reads_them(diffusers_folder):
    file = diffusers_folder / WEIGHTS
    header = read_header(file)
    with safe_open(file, framework="pt") as expected:
        assert sorted(header) == sorted(expected.keys())
        for name, tensor in header.items():
            bits = expected.get_tensor(name).contiguous().view(torch.uint8).numpy()
            assert read_tensor(tensor).tobytes() == bits.tobytes(), name


# -------------------------------------------------------------------------------------------------- model checkpoints


def test_plain_orbax_restores_a_converted_checkpoint(tmp_path, diffusers_folder):
    convert_from_torch(diffusers_folder, tmp_path / "model")
    _, params, _ = load_params(tmp_path / "model")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        assert_same_trees(checkpointer.restore(tmp_path / "model" / "params"), params)


SHARDED_RESTORE = """
import sys
import jax, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rehyat_jax.weights import load_params

_, expected, _ = load_params(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
spec = {3: P(None, "fsdp", "tensor"), 2: P("fsdp", "tensor")}
abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec.get(a.ndim, P()))), expected
)
args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(sys.argv[1] + "/params", args=args)

def check(path, wanted, array, values):
    assert isinstance(array, jax.Array) and array.sharding == wanted.sharding, path
    assert np.asarray(array).tobytes() == values.tobytes(), path

jax.tree.map_with_path(check, abstract, restored, expected)
kernel = restored["blocks"]["feed_forward"]["up"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (2, 32, 56)
"""


def test_converted_checkpoint_restores_straight_into_shardings(tmp_path):
    random_wan().save_pretrained(tmp_path / "torch")
    convert_from_torch(tmp_path / "torch", tmp_path / "model")
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    run_python(SHARDED_RESTORE, tmp_path / "model", **environment)


@pytest.mark.parametrize("kind", [np.asarray, jax.numpy.asarray])
def test_saved_model_is_loaded_again(tmp_path, kind):
    params = random_params(STUDENT)
    names = {"codec": "space_to_depth", "text_encoder": "word_vectors"}
    save_model(tmp_path / "model", STUDENT, jax.tree.map(kind, params), **names)
    config, restored, metadata = load_params(tmp_path / "model")
    assert (config, metadata) == (STUDENT, names) == read_model_metadata(tmp_path / "model")
    assert_same_trees(restored, params)


def test_saving_replaces_a_model_but_nothing_else(tmp_path):
    names = {"codec": "wan_vae", "text_encoder": "umt5"}
    for seed in (0, 1):
        params = random_params(STUDENT, seed)
        save_model(tmp_path / "model", STUDENT, params, **names)
    assert_same_trees(load_params(tmp_path / "model")[1], params)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("irreplaceable")
    with pytest.raises(InputError, match="thesis: already exists"):
        save_model(tmp_path / "thesis", STUDENT, params, **names)
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == ["chapter.txt", "commit_success.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]


def test_parameters_of_another_configuration_are_not_saved(tmp_path):
    params = random_params(STUDENT)
    for config, problem in (
        (STUDENT.replace(ffn_dim=40), r"blocks.feed_forward.\w+.\w+ should have shape \(3, .*40.*\), found"),
        (STUDENT.replace(hybrid_blocks=()), "feature_maps.key.layer_0.kernel is not a parameter"),
        (STUDENT.replace(hybrid_blocks=(1,)), r"feature_maps.\w+.\w+.* should have shape \(1, .*found \(2, "),
    ):
        with pytest.raises(ValueError, match=problem):
            save_model(tmp_path / "model", config, params, codec="wan_vae", text_encoder="umt5")
    del params["head"]["projection"]["bias"]
    with pytest.raises(ValueError, match=r"head\.projection\.bias is missing"):
        save_model(tmp_path / "model", STUDENT, params, codec="wan_vae", text_encoder="umt5")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ loading


def test_loaded_model_has_the_checkpoint_in_float32_and_the_given_options(tmp_path, diffusers_folder):
    convert_from_torch(diffusers_folder, tmp_path / "model")
    expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), load_params(diffusers_folder)[1])
    for path in (diffusers_folder, tmp_path / "model"):
        model = load_wan(path, dtype=jax.numpy.bfloat16, remat="block")
        assert (model.dtype, model.remat) == (jax.numpy.bfloat16, "block")
        assert_same_trees(nnx.to_pure_dict(nnx.state(model)), expected)


def test_weights_in_the_compute_dtype_take_half_the_memory_and_give_the_same_outputs(tmp_path):
    random = lambda leaf: (0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape)).astype(np.float32)
    names = dict(codec="wan_vae", text_encoder="umt5")
    save_model(tmp_path / "model", STUDENT, jax.tree.map(random, random_params(STUDENT)), **names)
    convert_to_torch(tmp_path / "model", tmp_path / "torch", "original")
    bf16 = jax.numpy.bfloat16
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1, 5, 4, 4, 16)), np.array([500]), rng.normal(size=(1, 8, 24))
    inputs = [array.astype(np.float32) for array in inputs]
    # float32: the timestep path, modulation, norms and the head, as in upstream's bfloat16 models; and all of the
    # feature maps but their kernels.
    exact = {
        *("time_embedding.linear_1", "time_embedding.linear_2", "time_projection", "head.projection", "head"),
        *("blocks", "blocks.cross_attention_norm"),
        *(f"blocks.{kind}_attention.{side}_norm" for kind in ("self", "cross") for side in ("query", "key")),
    }

    def is_exact(name):
        of_maps = name.split(".")[0] == "feature_maps"
        return not name.endswith(".kernel") if of_maps else name.rpartition(".")[0] in exact

    mesh = make_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 2}, jax.devices()[:4])
    for path in (tmp_path / "model", tmp_path / "torch"):
        models = [load_wan(path, dtype=bf16), load_wan(path, dtype=bf16, param_dtype=bf16)]
        with jax.set_mesh(mesh):
            sharded = load_wan(path, dtype=bf16, param_dtype=bf16)
        full, half, parts = (
            traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep=".") for model in (*models, sharded)
        )
        for name, leaf in half.items():
            assert leaf.dtype == parts[name].dtype == (np.float32 if is_exact(name) else bf16), name
            np.testing.assert_array_equal(leaf, full[name].astype(leaf.dtype), err_msg=name)
            np.testing.assert_array_equal(leaf, parts[name], err_msg=name)
        # Every product that rounds its parameters finds them rounded: the same operations on the same numbers.
        outputs = [jax.jit(apply_model(nnx.graphdef(model)))(nnx.state(model), *inputs) for model in models]
        np.testing.assert_array_equal(*outputs)
    # The tiny timestep path and head are a larger part of it than in a published model.
    table = {row.path: int(np.prod(row.stacked_shape)) for row in wan_table(WAN_PRESETS["t2v-1.3B"])}
    size = sum(count * (4 if is_exact(name) else 2) for name, count in table.items())
    assert size == module_bytes(WAN_PRESETS["t2v-1.3B"], dtype=bf16, param_dtype=bf16) < 0.53 * 4 * sum(table.values())


def test_the_place_of_the_vae_and_text_encoder_is_carried_along(tmp_path, diffusers_folder):
    place = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers@main"
    convert_from_torch(diffusers_folder, tmp_path / "model", models=place)
    for layout in ("diffusers", "original"):
        convert_to_torch(tmp_path / "model", tmp_path / f"as {layout}", layout)
        convert_from_torch(tmp_path / f"as {layout}", tmp_path / f"from {layout}")
        assert read_model_metadata(tmp_path / f"from {layout}")[1]["models"] == place
    assert "models" not in read_model_metadata(diffusers_folder)[1]


def test_quantised_files_are_refused_by_name(tmp_path):
    save_file({"blocks.0.ffn.0.weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "wan-Q4_K_M.gguf").touch()
    for path, problem in (
        (tmp_path / "a.safetensors", r"tensor blocks.0.ffn.0.weight has dtype F8_E4M3 \(fp8"),
        (tmp_path / "a.gguf", "is a GGUF file, expected safetensors; its weights are quantised; get the safetensors"),
        (tmp_path / "folder", "found only GGUF files \\(wan-Q4_K_M.gguf\\); its weights are quantised"),
    ):
        with pytest.raises(InputError, match=problem):
            load_wan(path)


def test_unknown_option_of_a_loaded_model_is_refused(tmp_path):
    random_wan().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="remats"):
        load_wan(tmp_path, remats="block")


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("layout", ["model checkpoint", "diffusers", "original"])
def test_one_parameter_is_in_memory_at_a_time(tmp_path, layout):
    alive, most_alive = set(), []

    def streamed(path: str, shape: tuple[int, ...]) -> StreamedArray:
        def read() -> np.ndarray:
            values = np.ones(shape, np.float32)
            alive.add(path)
            weakref.finalize(values, alive.remove, path)
            most_alive.append(len(alive))
            return values

        return StreamedArray(shape, np.dtype(np.float32), read)

    params = {row.path: streamed(row.path, row.stacked_shape) for row in wan_table(STUDENT)}
    model = StreamedModel(STUDENT, {"codec": "wan_vae", "text_encoder": "umt5"}, params)
    if layout == "model checkpoint":
        write_model_checkpoint(tmp_path, model)
    else:
        write_torch_checkpoint(tmp_path, model, layout)
    assert len(most_alive) == len(params)
    # TensorStore's threads let go of what they wrote a moment after they report it written.
    assert max(most_alive) <= (2 if layout == "model checkpoint" else 1)
