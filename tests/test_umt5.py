"""The umT5 text encoder against transformers, its weights in both layouts, and its tokenizer."""

import io
import json
import random
import shlex
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from flax import nnx, traverse_util
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

import rehyat_jax
from rehyat_jax.errors import InputError
from rehyat_jax.generation.tokenizer import Tokenizer, clean
from rehyat_jax.models.umt5 import config as sizes
from rehyat_jax.models.umt5.modeling import UMT5Encoder, apply_encoder, relative_position_buckets
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.weights.load import load_module
from rehyat_jax.weights.models import TEXT_ENCODERS
from rehyat_jax.weights.safetensors_file import DTYPES
from rehyat_jax.weights.streamed import StreamedArray
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint, write_torch_checkpoint
from rehyat_jax.weights.umt5.names import umt5_table

# The largest difference measured is 3e-6, at 300 tokens and outputs of rms 0.8: sums in another order.
OUTPUT_TOLERANCE = 1e-5

WEIGHTS = "model.safetensors"
VOCABULARY = 96
WIDTH = 48

ORIGINAL_NAMES = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.1.layer_norm": "norm2",
}
"""transformers' names -> those of `T5Encoder` in wan/modules/t5.py of Wan2.1, where `gate` has the GELU."""


def random_umt5() -> UMT5EncoderModel:
    """A tiny encoder of transformers with every parameter random: norm scales of one and small biases hide errors."""
    torch.manual_seed(0)
    fields = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=80, num_layers=3, num_heads=4)
    model = UMT5EncoderModel(UMT5Config(**fields, feed_forward_proj="gated-gelu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "relative_attention_bias" in name else 0.3 * parameter.std() if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def oracle() -> UMT5EncoderModel:
    return random_umt5()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory) -> Path:
    """The oracle as transformers writes it. Tests do not change it."""
    path = tmp_path_factory.mktemp("umt5")
    oracle.save_pretrained(path)
    return path


def original_name(name: str) -> str:
    """The original code's name of a tensor of transformers."""
    module = name.removesuffix(".weight")
    if not module.startswith("encoder.block."):
        return f"{ORIGINAL_NAMES[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"blocks.{block}.{ORIGINAL_NAMES[rest]}.weight"


@pytest.fixture
def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def model_inputs(length: int, *, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of two prompts; the second has a third of the length, at least one token, if they are padded."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, length)).astype(np.int32)
    mask = np.ones((2, length), np.int32)
    if padded:
        mask[1, max(1, length // 3) :] = 0
    return ids, mask


def run_oracle(model: UMT5EncoderModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """transformers' output, with zeros at padding as Wan's pipelines make it."""
    with torch.no_grad():
        output = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    return output.float().numpy() * mask[..., None]


# ------------------------------------------------------------------------------------------------------------- encoder


# 129 tokens are the first with a distance of 128, where the last bucket begins; 300 have many beyond.
@pytest.mark.parametrize("length", [1, 7, 40, 129, 300])
def test_output_matches_transformers(oracle, folder, length):
    encoder = rehyat_jax.load_text_encoder(folder, dtype=jnp.float32)
    for padded in (False, True):
        inputs = model_inputs(length, padded=padded)
        found = np.asarray(encoder(*inputs))
        assert found.dtype == np.float32
        assert np.abs(found - run_oracle(oracle, *inputs)).max() < OUTPUT_TOLERANCE, f"padded={padded}"


def test_padding_is_zero_and_changes_no_token(folder):
    encoder = rehyat_jax.load_text_encoder(folder, dtype=jnp.float32)
    ids, mask = model_inputs(30, padded=True)
    padded, short = np.asarray(encoder(ids, mask)), np.asarray(encoder(ids[1:, :10], mask[1:, :10]))
    assert (padded[1, 10:] == 0).all()
    assert np.abs(padded[1, :10] - short[0]).max() < OUTPUT_TOLERANCE
    # Not even the ids of padding matter.
    ids[1, 10:] = 7
    assert (np.asarray(encoder(ids, mask)) == padded).all()


def test_bfloat16_is_as_close_to_float32_as_transformers_own(oracle, folder):
    low = UMT5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)
    encoder = rehyat_jax.load_text_encoder(folder)
    ours, theirs = [], []
    for length in (7, 40, 129):  # together, because the largest of few errors is chance
        inputs = model_inputs(length, padded=True)
        exact, output = run_oracle(oracle, *inputs), encoder(*inputs)
        assert output.dtype == jnp.bfloat16
        ours.append(np.abs(np.asarray(output, np.float32) - exact).ravel())
        theirs.append(np.abs(run_oracle(low, *inputs) - exact).ravel())
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype(jnp.bfloat16)}
    assert ours.mean() <= theirs.mean()
    assert ours.max() <= theirs.max()
    assert ours.mean() > 0, "nothing ran in bfloat16"


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 100), (16, 64), (8, 3)])
def test_buckets_are_those_of_transformers(num_buckets, max_distance):
    fields = dict(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
    attention = UMT5EncoderModel(UMT5Config(vocab_size=4, d_model=4, d_ff=4, num_layers=1, **fields)).encoder.block[0]
    positions = torch.arange(600)
    expected = attention.layer[0].SelfAttention._relative_position_bucket(positions[None, :] - positions[:, None])
    found = relative_position_buckets(600, num_buckets, max_distance)
    np.testing.assert_array_equal(found, expected.numpy())


def test_jaxpr_does_not_grow_with_depth():
    def program_size(num_layers):
        fields = dict(vocab_size=8, model_dim=8, num_heads=2, head_dim=4, ffn_dim=8)
        make = lambda: UMT5Encoder(sizes.UMT5Config(num_layers=num_layers, **fields), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(nnx.eval_shape(make))
        shape = jax.ShapeDtypeStruct((1, 5), jnp.int32)
        lowered = jax.jit(apply_encoder(graphdef)).lower(nnx.to_pure_dict(state), shape, shape)
        return len(lowered.as_text().splitlines())

    assert program_size(24) == program_size(2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_products_are_not_rounded_on_accelerators(dtype):
    """CPUs multiply float32 exactly in any case, so the outputs show nothing."""
    config = sizes.UMT5Config(vocab_size=8, model_dim=8, num_heads=2, head_dim=4, ffn_dim=8, num_layers=1)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), dtype=dtype)))
    shape = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    program = jax.jit(apply_encoder(graphdef)).lower(nnx.to_pure_dict(state), shape, shape).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 9
    assert all(("HIGHEST" in line) == (dtype == jnp.float32) for line in products)


def test_preset_has_the_published_size():
    config = sizes.UMT5_PRESETS["umt5-xxl"]
    model = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 5_680_910_336
    assert sum(len(row.names("diffusers")) for row in umt5_table(config)) == 242


@pytest.mark.parametrize(
    ("ids", "mask", "problem"),
    [
        (np.zeros(3, np.int32), np.ones(3), "ids must be"),
        (np.zeros((1, 3), np.float32), np.ones((1, 3)), "ids must be integers"),
        (np.zeros((1, 3), np.int32), np.ones((1, 4)), "mask must be"),
    ],
)
def test_wrong_inputs_are_named(folder, ids, mask, problem):
    with pytest.raises(ValueError, match=problem):
        rehyat_jax.load_text_encoder(folder)(ids, mask)


def test_unknown_id_is_not_another_token(folder):
    ids, mask = model_inputs(3, padded=False)
    ids[0, 0] = VOCABULARY
    output = np.asarray(rehyat_jax.load_text_encoder(folder, dtype=jnp.float32)(ids, mask))
    assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_export_has_the_bytes_that_transformers_writes(tmp_path, dtype, max_shard_bytes):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = random_umt5().to(getattr(torch, dtype))
    model.save_pretrained(theirs, max_shard_size=max_shard_bytes)
    ours.mkdir()
    opened = open_torch_checkpoint(theirs, specs=TEXT_ENCODERS)
    write_torch_checkpoint(ours, opened, "diffusers", max_shard_bytes=max_shard_bytes)

    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
    weights = sorted(theirs.glob("*.safetensors"))
    assert (len(weights) > 1) == (max_shard_bytes < 10**9)
    for file in weights:
        assert file.read_bytes() == (ours / file.name).read_bytes(), file.name
    for index in theirs.glob("*.index.json"):
        expected, found = (json.loads((at / index.name).read_text()) for at in (theirs, ours))
        assert found["weight_map"] == expected["weight_map"]
        assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]

    loaded, info = UMT5EncoderModel.from_pretrained(ours, output_loading_info=True)
    # A missing key is only a warning in transformers, and its parameter random.
    assert not any(info.values()), info
    expected = model.config.to_dict()
    differing = {name for name, value in loaded.config.to_dict().items() if expected.get(name) != value}
    assert differing <= {"_name_or_path", "scale_decoder_outputs", "tokenizer_class"}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_original_layout_has_the_original_names_and_comes_back(tmp_path, folder, tensors, max_shard_bytes):
    opened = open_torch_checkpoint(folder, specs=TEXT_ENCODERS)
    write_torch_checkpoint(tmp_path, opened, "original", max_shard_bytes=max_shard_bytes)
    written = {}
    for file in tmp_path.glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == {original_name(name) for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(written[original_name(name)], tensor), name

    # The transformer's config.json is next to the encoder in the original repositories.
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
    again = open_torch_checkpoint(tmp_path, specs=TEXT_ENCODERS)
    assert again.config == opened.config
    assert again.params.keys() == opened.params.keys()
    for path, array in opened.params.items():
        np.testing.assert_array_equal(again.params[path].read(), array.read(), strict=True)


def test_original_layout_refuses_sizes_that_its_code_does_not_have(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text()) | {"relative_attention_max_distance": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    opened = open_torch_checkpoint(tmp_path, specs=TEXT_ENCODERS)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"max_distance 128, found 64; write another layout"):
        write_torch_checkpoint(tmp_path / "out", opened, "original")


@pytest.mark.parametrize("kept", [True, False], ids=["both", "only_copy"])
def test_tied_embedding_may_be_stored_under_its_second_name(tmp_path, folder, tensors, kept):
    expected = open_torch_checkpoint(folder, specs=TEXT_ENCODERS).params["token_embedding"].read()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    if not kept:
        del tensors["shared.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    found = open_torch_checkpoint(tmp_path, specs=TEXT_ENCODERS).params["token_embedding"].read()
    np.testing.assert_array_equal(found, expected)


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

BAD_TENSORS = {
    "missing": ({Q: None}, rf"{Q} is missing \(1 of 32 tensors are\).*get it again"),
    "unknown": ({"encoder.extra.weight": (2,)}, r"tensor encoder.extra.weight is not part of the umT5.*remove it"),
    "shape": ({Q: (WIDTH, 32)}, rf"tensor {Q} should have shape \[32, 48\], found \[48, 32\].*different checkpoints"),
    "width": (
        {"encoder.final_layer_norm.weight": (40,)},
        r"tensor encoder.final_layer_norm.weight should have shape \[48\], found \[40\]",
    ),
    "axes": ({"shared.weight": (VOCABULARY,)}, r"tensor shared.weight should have 2 axes, found shape \[96\]"),
    "heads": ({BIAS: (32, 5)}, r"q.weight should have a multiple of the 5 heads of .*, found 32; the tensors belong"),
    "no heads": ({BIAS: (32, 0)}, r"should have a multiple of the 0 heads"),
    "buckets": ({BIAS: (3, 4)}, r"tensor encoder.block.1.*relative_attention_bias.weight should|num_buckets must be"),
    "decoder": ({"decoder.block.0.layer.0.layer_norm.weight": (4,)}, r"belongs to a umT5 with a decoder; only"),
    "copy": (
        {"encoder.embed_tokens.weight": (4, WIDTH)},
        r"tensor encoder.embed_tokens.weight should be a copy of shared.weight with shape \[96, 48\], found \[4, 48\]",
    ),
    "block": (
        {f"encoder.block.3.{rest}.weight": (1,) for rest in ORIGINAL_NAMES if rest.startswith("layer")}
        | {"encoder.block.5.layer.0.layer_norm.weight": (1,)},
        r"tensors of 5 blocks up to block 5, but none of block 4; .*get it again",
    ),
}
"""Changed tensors, None for removed -> message."""


@pytest.mark.parametrize("change", BAD_TENSORS)
def test_wrong_tensors_are_named(tmp_path, tensors, change):
    shapes, message = BAD_TENSORS[change]
    tensors |= {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    for name in [name for name, shape in shapes.items() if shape is None]:
        del tensors[name]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        rehyat_jax.load_text_encoder(tmp_path)


def test_wrong_tensor_of_the_original_layout_is_named(tmp_path, tensors):
    original = {original_name(name): tensor for name, tensor in tensors.items()}
    del original["blocks.2.ffn.fc1.weight"]
    save_file(original, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"tensor blocks.2.ffn.fc1.weight is missing"):
        rehyat_jax.load_text_encoder(tmp_path)


def test_damaged_values_are_named(tmp_path, tensors):
    tensors[Q][0, 0] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=f"tensor {Q} has 1 values that are NaN"):
        rehyat_jax.load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_ff", 81, r"config.json: d_ff should be 80 by the shape of encoder.block.0.*wi_1.weight, found 81"),
        ("num_layers", 4, r"num_layers should be 3 by the shape of encoder.block.2.\*, found 4"),
        ("num_heads", 8, r"num_heads should be 4 by the shape of .*relative_attention_bias.weight, found 8"),
        ("d_kv", 16, r"d_kv should be 8 by the shape of .*q.weight, found 16"),
        ("model_type", "t5", r"model_type should be one of \['umt5'\], found 't5'"),
        ("model_type", None, r"model_type should be one of \['umt5'\], found None"),
        ("feed_forward_proj", "relu", r"feed_forward_proj should be 'gated-gelu', found 'relu'"),
        ("layer_norm_epsilon", "small", r"field 'layer_norm_epsilon' should be float"),
        ("relative_attention_max_distance", 7, r"max_distance more than a quarter of it, found 32 and 7"),
    ],
)
def test_contradicting_configuration_is_named(tmp_path, folder, field, value, message):
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=message):
        rehyat_jax.load_text_encoder(tmp_path)


def test_other_models_are_refused(tmp_path):
    save_file({"patch_embedding.weight": torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"neither .* of the umT5 text encoder; give its checkpoint"):
        rehyat_jax.load_text_encoder(tmp_path)


def test_encoder_is_not_taken_for_a_transformer(folder):
    with pytest.raises(InputError, match="neither"):
        rehyat_jax.load_wan(folder)


def test_pickle_is_refused_with_the_command_that_converts_it(tmp_path, tensors):
    file = tmp_path / "models_t5_it's umt5-xxl-enc-bf16.pth"
    torch.save({original_name(name): tensor for name, tensor in tensors.items()}, file)
    for path in (file, tmp_path):
        with pytest.raises(InputError, match="never read: get the safetensors version") as refused:
            rehyat_jax.load_text_encoder(path)
    program, *arguments = shlex.split(str(refused.value).split("make one: ")[1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    loaded = open_torch_checkpoint(file.with_suffix(".safetensors"), specs=TEXT_ENCODERS)
    np.testing.assert_array_equal(loaded.params["token_embedding"].read(), tensors["shared.weight"].numpy())


@pytest.mark.parametrize(
    "shape",
    [
        dict(data=1, fsdp=2, context=2, tensor=2),
        dict(data=2, fsdp=1, context=1, tensor=4),
        dict(data=1, fsdp=8, context=1, tensor=1),  # its batch of 2 does not divide the mesh
    ],
    ids=str,
)
def test_sharded_encoder_has_the_same_output(folder, shape):
    inputs = model_inputs(33, padded=True)
    expected = np.asarray(rehyat_jax.load_text_encoder(folder, dtype=jnp.float32)(*inputs))
    with jax.set_mesh(make_mesh(shape)):
        encoder = rehyat_jax.load_text_encoder(folder, dtype=jnp.float32)
        found = np.asarray(encoder(*inputs))
    query = encoder.params["blocks"]["attention"]["query"]["kernel"]
    part = (3, WIDTH // (shape["fsdp"] * shape["context"]), 32 // shape["tensor"])
    assert {shard.data.shape for shard in query.addressable_shards} == {part}
    embedding = encoder.params["token_embedding"]
    assert len(embedding.addressable_shards) == 8
    assert embedding.addressable_shards[0].data.size * 8 == embedding.size * shape["data"]
    assert np.abs(found - expected).max() < OUTPUT_TOLERANCE


def test_mesh_that_does_not_divide_the_encoder_is_refused(folder):
    with (
        jax.set_mesh(make_mesh(dict(data=1, fsdp=1, context=1, tensor=8))),
        pytest.raises(InputError, match=r"mesh.tensor is 8, which does not divide .*; mesh.tensor of 1, 2, 4 would"),
    ):
        rehyat_jax.load_text_encoder(folder)


def test_one_parameter_is_in_the_hosts_memory_at_a_time(folder):
    alive, most_alive = set(), []
    opened = open_torch_checkpoint(folder, specs=TEXT_ENCODERS)

    def watched(path: str, array: StreamedArray) -> StreamedArray:
        def read() -> np.ndarray:
            values = array.read()
            alive.add(path)
            weakref.finalize(values, alive.remove, path)
            most_alive.append(len(alive))
            return values

        return StreamedArray(array.shape, array.dtype, read)

    opened = opened._replace(params={path: watched(path, array) for path, array in opened.params.items()})
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=4, context=1, tensor=2))):
        encoder = load_module(folder, opened, dtype=jnp.bfloat16)
    assert len(most_alive) == len(opened.params) and max(most_alive) == 1
    found = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(encoder)), sep=".")
    for path, array in opened.params.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array.read().astype(DTYPES["BF16"]), strict=True)


# ----------------------------------------------------------------------------------------------------------- tokenizer

WORDS = (
    "a cat runs across the green field while dogs watch camera pans left over ocean waves naïve café über 猫 草地 奔跑"
)

TEXTS = {
    "plain": "a cat runs across the green field",
    "empty": "",
    "white space": "  a \t\n cat\u3000runs\u00a0 \r\n left  ",
    "entities": "caf&eacute; &amp;amp; &lt;cat&gt; &amp;lt;dogs&amp;gt;",
    "markup": "a <b>cat</b> &amp;amp; dogs",  # ftfy leaves entities next to "<" as they are
    "accents": "a nai\u0308ve caf\u00e9, u\u0308ber",
    "chinese": "一只猫，在草地上奔跑。海浪！",
    "full width": "ａ ｃａｔ ① ½ ﬁeld …",
    "mojibake": "a cafÃ© â€œcatâ€\x9d",
    "unknown": "zzz 😀😀 ñandú",
}


def train_tokenizer(file: Path, **options) -> Path:
    """A sentencepiece unigram model of at most 90 tokens, some of them complete words."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS.split(), k=8)) for _ in range(300)]
    settings = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> tuple[T5Tokenizer, Path]:
    """transformers' tokenizer, and its folder with spiece.model and tokenizer.json."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(path / "spiece.model")
    tokenizer = T5Tokenizer.from_pretrained(path, extra_ids=0)
    tokenizer.save_pretrained(path)
    return tokenizer, path


def their_tokens(tokenizer: T5Tokenizer, text: str, length: int) -> tuple[list[int], list[int]]:
    """Ids and mask as diffusers' pipeline makes them."""
    tokens = tokenizer([prompt_clean(text)], padding="max_length", max_length=length, truncation=True)
    return tokens.input_ids[0], tokens.attention_mask[0]


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_ids_are_those_of_transformers(tokenizers, file):
    reference, path = tokenizers
    tokens = Tokenizer(path / file)(list(TEXTS.values()), 64)
    assert tokens.ids.dtype == np.int32 and tokens.mask.dtype == bool and not tokens.cut
    for kind, ids, mask in zip(TEXTS, tokens.ids, tokens.mask, strict=True):
        assert (ids.tolist(), mask.astype(int).tolist()) == their_tokens(reference, TEXTS[kind], 64), kind
    empty = list(TEXTS).index("empty")
    assert tokens.ids[empty].tolist() == [1] + 63 * [0] and tokens.mask[empty].sum() == 1


@pytest.mark.parametrize("text", TEXTS)
def test_cleaning_is_that_of_diffusers(text):
    assert clean(TEXTS[text]) == prompt_clean(TEXTS[text])


def test_cleaning_changes_what_it_should():
    assert clean(TEXTS["mojibake"]) == 'a café "cat"'
    assert clean(TEXTS["entities"]) == "café & <cat> <dogs>"
    assert clean(TEXTS["markup"]) == "a <b>cat</b> & dogs"
    assert clean(TEXTS["white space"]) == "a cat runs left"


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_long_prompt_is_cut_before_its_end_token_and_reported(tokenizers, file):
    reference, path = tokenizers
    tokenizer = Tokenizer(path / file)
    long = "the cat runs " * 300
    full = len(reference([prompt_clean(long)]).input_ids[0])
    tokens = tokenizer([long, "a cat"])
    assert tokens.ids.shape == (2, 512)
    assert (tokens.ids[0].tolist(), tokens.mask[0].astype(int).tolist()) == their_tokens(reference, long, 512)
    assert tokens.ids[0, -1] == 1
    assert tokens.cut == {long: full}
    # Exactly as many tokens as there is room for, and one more.
    count = int(tokens.mask[1].sum())
    assert not tokenizer(["a cat"], count).cut
    assert tokenizer(["a cat"], count - 1).cut == {"a cat": count}


def test_options_in_a_tokenizers_file_are_not_used(tokenizers, tmp_path):
    content = json.loads((tokenizers[1] / "tokenizer.json").read_text())
    expected = Tokenizer(tokenizers[1] / "tokenizer.json")(["a cat runs"]).ids
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(Tokenizer(tmp_path / "tokenizer.json")(["a cat runs"]).ids, expected)


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_prompt_that_is_not_utf8_is_refused(tokenizers, file):
    with pytest.raises(InputError, match="expected text in UTF-8"):
        Tokenizer(tokenizers[1] / file)(["a \udcff cat"])


# The package tokenizers panics: what it raises is no Exception.
PANIC = b'{"version": "1.0", "normalizer": {"type": "Precompiled", "precompiled_charsmap": "a"}, "model": {}}'


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b'{"version": "1.0"}', PANIC], ids=range(4))
def test_damaged_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: (is not a tokenizer|token <pad> should have id 0)"):
        Tokenizer(tmp_path / name)


def test_tokenizer_with_other_special_tokens_is_refused(tmp_path):
    file = train_tokenizer(tmp_path / "spiece.model", pad_id=1, eos_id=0)
    with pytest.raises(InputError, match="token <pad> should have id 0, found 1; give umT5's tokenizer"):
        Tokenizer(file)


# ------------------------------------------------------------------------------------------------------------- prompts


def link_tokenizer(tokenizers, folder: Path, file: str = "tokenizer.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes((tokenizers[1] / file).read_bytes())


@pytest.fixture(scope="module")
def pipeline_folder(folder, tokenizers, tmp_path_factory) -> Path:
    """A folder like that of a diffusers pipeline."""
    path = tmp_path_factory.mktemp("pipeline")
    (path / "text_encoder").mkdir()
    for file in folder.iterdir():
        (path / "text_encoder" / file.name).write_bytes(file.read_bytes())
    link_tokenizer(tokenizers, path / "tokenizer")
    return path


def test_prompts_have_the_embeddings_of_diffusers_pipeline(oracle, tokenizers, pipeline_folder):
    pipeline = WanPipeline(tokenizers[0], oracle, vae=None, scheduler=None)
    long = "the camera pans left over the ocean, " * 4
    prompts = ["a cat runs", "", "一只猫，在草地上奔跑。 &amp; the camera", long, "a cat runs"]
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=24, device="cpu").numpy()
    encode = rehyat_jax.load_text_encoder(pipeline_folder, dtype=jnp.float32).for_prompts(24)
    assert (encode.length, encode.text_dim) == (24, WIDTH)
    with pytest.warns(UserWarning, match=r"prompt 'the camera pans .*': has \d+ tokens, only the first 24 are used"):
        found = encode(prompts)
    assert found.dtype == np.float32 and found.shape == (5, 24, WIDTH)
    assert np.abs(found - expected).max() < OUTPUT_TOLERANCE
    assert ((found == 0) == (expected == 0)).all()
    assert encode([]).shape == (0, 24, WIDTH)


def test_prompt_that_fits_exactly_does_not_warn(pipeline_folder):
    encoder = rehyat_jax.load_text_encoder(pipeline_folder)
    count = int(encoder.tokenizer(["a cat runs"]).mask.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embeddings = encoder.for_prompts(count)(["a cat runs"])
    assert (embeddings != 0).any(axis=-1).all()
    with pytest.warns(UserWarning, match=f"has {count} tokens, only the first {count - 1} are used"):
        encoder.for_prompts(count - 1)(["a cat runs"])


@pytest.mark.parametrize("length", [0, 513])
def test_length_outside_the_limits_is_refused(pipeline_folder, length):
    with pytest.raises(ValueError, match=f"length must be from 1 to 512, found {length}"):
        rehyat_jax.load_text_encoder(pipeline_folder).for_prompts(length)


def test_one_string_is_not_a_list_of_prompts(pipeline_folder):
    with pytest.raises(ValueError, match="wrap it in a list"):
        rehyat_jax.load_text_encoder(pipeline_folder).for_prompts(8)("a cat")


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("place", ["encoder", "tokenizer"])
def test_tokenizer_is_found_in_the_folder_or_next_to_it(tmp_path, folder, tokenizers, place, file):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    link_tokenizer(tokenizers, tmp_path / place, file)
    encoder = rehyat_jax.load_text_encoder(tmp_path / "encoder")
    assert encoder.tokenizer.file == tmp_path / place / file


def test_folder_of_an_original_repository_is_read(tmp_path, tensors, tokenizers, folder):
    original = {original_name(name): tensor for name, tensor in tensors.items()}
    save_file(original, tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    save_file({"patch_embedding.weight": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    link_tokenizer(tokenizers, tmp_path / "google" / "umt5-xxl")
    inputs = model_inputs(9, padded=True)
    encoder = rehyat_jax.load_text_encoder(tmp_path)
    assert encoder.tokenizer is not None
    expected = rehyat_jax.load_text_encoder(folder)(*inputs)
    np.testing.assert_array_equal(np.asarray(encoder(*inputs)), np.asarray(expected))


def test_missing_tokenizer_is_reported_where_it_is_needed(folder):
    encoder = rehyat_jax.load_text_encoder(folder)
    assert encoder.tokenizer is None
    with pytest.raises(InputError, match=r"expected the text encoder's tokenizer \(tokenizer.json or spiece.model\)"):
        encoder.for_prompts()


def test_tokenizer_with_more_tokens_than_the_encoder_is_refused(tmp_path, tensors, tokenizers):
    tensors["shared.weight"] = tensors["shared.weight"][:40].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    link_tokenizer(tokenizers, tmp_path)
    with pytest.raises(InputError, match=r"tokenizer.json: has \d\d tokens, expected at most the 40 of"):
        rehyat_jax.load_text_encoder(tmp_path)
