"""The conversion's command line: what it refuses and how it says so, and that it never leaves or removes too much."""

import errno
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import random_wan
from safetensors.torch import load_file, save_file

from rehyat_jax.convert import main
from rehyat_jax.errors import InputError
from rehyat_jax.weights import load_params, safetensors_file
from rehyat_jax.weights.torch_folder import find_tensors

VERSION_1 = Path(__file__).parent / "fixtures" / "version_1"

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00005.safetensors"

FFN = "blocks.1.ffn.net.0.proj.weight"
FFN_PATH = "blocks.feed_forward.up.kernel"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Good checkpoints: `single` and `sharded` by diffusers, and `model`, converted from them."""
    folder = tmp_path_factory.mktemp("originals")
    oracle = random_wan()
    oracle.save_pretrained(folder / "single")
    oracle.save_pretrained(folder / "sharded", max_shard_size=150_000)
    assert (folder / "sharded" / SHARD).exists()
    assert main(["from-torch", str(folder / "single"), str(folder / "model")]) == 0
    return folder


@pytest.fixture
def work(originals, tmp_path) -> Path:
    """A copy of the good checkpoints, to be damaged."""
    return Path(shutil.copytree(originals, tmp_path / "work"))


def refusal(capsys, *arguments: object) -> str:
    """Runs a conversion that must be refused; returns the message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") or "\nerror: " in message
    assert "Traceback" not in message
    return message


def assert_refused(capsys, work: Path, source: Path, *expected: str, layout: str | None = None) -> None:
    """The conversion of a damaged source names what is expected and leaves nothing behind."""
    before = sorted(path.name for path in work.iterdir())
    command = ["to-torch", "--layout", layout] if layout else ["from-torch"]
    message = refusal(capsys, *command, source, work / "destination")
    for part in expected:
        assert part in message, message
    assert sorted(path.name for path in work.iterdir()) == before


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = f"single/{WEIGHTS}") -> Callable:
    """A damage that rewrites a safetensors file with changed tensors."""

    def damage(work: Path) -> None:
        tensors = load_file(work / file)
        change(tensors)
        save_file(tensors, work / file, metadata={"format": "pt"})

    return damage


def edit_json(file: str, change: Callable[[dict], object]) -> Callable:
    """A damage that rewrites a JSON file."""

    def damage(work: Path) -> None:
        content = json.loads((work / file).read_text())
        change(content)
        (work / file).write_text(json.dumps(content))

    return damage


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable:
    """A damage that rewrites a file."""
    return lambda work: (work / file).write_bytes(change((work / file).read_bytes()))


def cast(name: str, dtype: torch.dtype) -> Callable:
    """A damage that casts one tensor."""
    return edit_tensors(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def set_value(name: str, value: float) -> Callable:
    """A damage that sets one entry of a tensor."""
    return edit_tensors(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def header(content: bytes) -> bytes:
    """A safetensors file of a header alone."""
    return len(content).to_bytes(8, "little") + content


TENSORS = {
    "missing": (edit_tensors(lambda t: t.pop(FFN)), FFN, "missing"),
    "missing outside blocks": (edit_tensors(lambda t: t.pop("proj_out.bias")), "proj_out.bias", "missing"),
    "missing block": (
        edit_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.0.")]),
        "blocks.0.",
        "missing",
    ),
    "extra": (edit_tensors(lambda t: t.update(extra=torch.zeros(3))), "extra", "not part of"),
    "image branch": (
        edit_tensors(lambda t: t.update({"condition_embedder.image_embedder.norm1.weight": torch.zeros(3)})),
        "condition_embedder.image_embedder.norm1.weight",
        "image-to-video",
    ),
    "feature maps without rehyat.json": (
        edit_tensors(lambda t: t.update({"blocks.0.attn1.feature_map_query.log_scale": torch.zeros(2)})),
        "blocks.0.attn1.feature_map_query.log_scale",
        "rehyat.json",
    ),
    "wrong shape": (edit_tensors(lambda t: t.update({FFN: t[FFN].T.contiguous()})), FFN, "[112, 64]", "[64, 112]"),
    "wrong number of axes": (
        edit_tensors(lambda t: t.update({"patch_embedding.weight": t["patch_embedding.weight"].flatten(1)})),
        "patch_embedding.weight",
        "5 axes",
        "[64, 64]",
    ),
    "integers": (cast(FFN, torch.int8), FFN, "I8", "F32, BF16, F16"),
    "float64": (cast(FFN, torch.float64), FFN, "F64", "F32, BF16, F16"),
    "mixed in one stack": (cast(FFN, torch.bfloat16), FFN, "bfloat16", "blocks.0.ffn.net.0.proj.weight", "float32"),
    "NaN": (set_value(FFN, float("nan")), FFN, WEIGHTS, "1 values that are NaN or infinite"),
    "infinity": (set_value("proj_out.weight", float("-inf")), "proj_out.weight", "1 values that are NaN or infinite"),
    "other model": (lambda work: save_file({"a": torch.ones(2)}, work / "single" / WEIGHTS), "single", "neither"),
}

FILES = {
    "truncated": (edit_bytes(f"single/{WEIGHTS}", lambda b: b[:-5]), WEIGHTS, "truncated"),
    "longer": (edit_bytes(f"single/{WEIGHTS}", lambda b: b + b"12345"), WEIGHTS, "expected", "found"),
    "truncated in the header": (edit_bytes(f"single/{WEIGHTS}", lambda b: b[:100]), WEIGHTS, "truncated"),
    "empty": (edit_bytes(f"single/{WEIGHTS}", lambda b: b""), WEIGHTS, "truncated"),
    "text": (edit_bytes(f"single/{WEIGHTS}", lambda b: b"<!DOCTYPE html><html>"), WEIGHTS, "not a safetensors file"),
    "huge header": (edit_bytes(f"single/{WEIGHTS}", lambda b: b"\xff" * 7 + b[7:]), WEIGHTS, "not a safetensors file"),
    "no JSON": (edit_bytes(f"single/{WEIGHTS}", lambda b: header(b"{]")), WEIGHTS, "not JSON"),
    "nested JSON": (edit_bytes(f"single/{WEIGHTS}", lambda b: header(b"[" * 10**6)), WEIGHTS, "not JSON"),
    "list": (edit_bytes(f"single/{WEIGHTS}", lambda b: header(b"[]")), WEIGHTS, "not a JSON object"),
    "no entry": (edit_bytes(f"single/{WEIGHTS}", lambda b: header(b'{"a": 3}')), WEIGHTS, "tensor a"),
    "twice": (edit_bytes(f"single/{WEIGHTS}", lambda b: header(b'{"a": 3, "a": 4}')), WEIGHTS, "a name occurs twice"),
    "size": (
        edit_bytes(
            f"single/{WEIGHTS}", lambda b: header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + b"1234"
        ),
        WEIGHTS,
        "tensor a",
        "8 bytes",
    ),
    "gap": (
        edit_bytes(
            f"single/{WEIGHTS}",
            lambda b: header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + b"12345678",
        ),
        WEIGHTS,
        "tensor a",
        "data_offsets",
    ),
    "pickle by content": (
        edit_bytes(f"single/{WEIGHTS}", lambda b: pickle.dumps({"a": list(range(100))})),
        WEIGHTS,
        "pickle",
    ),
    "torch.save by content": (lambda work: torch.save({"a": torch.ones(3)}, work / "single" / WEIGHTS), "pickle"),
    "folder of pickles": (
        lambda work: (work / "single" / WEIGHTS).rename(work / "single" / "model.pth"),
        "model.pth",
        "pickle",
    ),
    "empty folder": (lambda work: (work / "single" / WEIGHTS).unlink(), "single", "no safetensors file"),
    "no folder": (lambda work: shutil.rmtree(work / "single"), "single", "does not exist"),
    "two files": (
        lambda work: (
            [shutil.copy(work / "single" / WEIGHTS, work / f"single/{name}.safetensors") for name in "ab"]
            and (work / "single" / WEIGHTS).unlink()
        ),
        "a.safetensors, b.safetensors",
    ),
    "two experts": (
        lambda work: [(work / "single" / name).mkdir() for name in ("transformer", "transformer_2")],
        "transformer_2",
        "expected one",
    ),
    "model checkpoint": (lambda work: shutil.copy(work / "model/model.json", work / "single"), "to-torch"),
}

CONFIGS = {
    "not JSON": (edit_bytes("single/config.json", lambda b: b"{"), "config.json", "not JSON"),
    "not text": (edit_bytes("single/config.json", lambda b: b"\xff\xfe\x00"), "config.json", "not JSON"),
    "list": (edit_bytes("single/config.json", lambda b: b"[]"), "config.json", "object"),
    "no class": (edit_json("single/config.json", lambda c: c.pop("_class_name")), "_class_name", "None"),
    "other class": (
        edit_json("single/config.json", lambda c: c.update(_class_name="WanVACETransformer3DModel")),
        "_class_name",
        "WanVACETransformer3DModel",
    ),
    "image conditioning": (edit_json("single/config.json", lambda c: c.update(image_dim=1280)), "image_dim", "1280"),
    "original image-to-video": (
        lambda work: (work / "single" / "config.json").write_text('{"_class_name": "WanModel", "model_type": "i2v"}'),
        "model_type",
        "'t2v'",
        "'i2v'",
    ),
    "no norm": (edit_json("single/config.json", lambda c: c.update(qk_norm=None)), "qk_norm", "rms_norm_across_heads"),
    "unknown field": (edit_json("single/config.json", lambda c: c.update(ffn_dims=1)), "'ffn_dims'", "'ffn_dim'"),
    "layers": (edit_json("single/config.json", lambda c: c.update(num_layers=3)), "num_layers", "found 3"),
    "NaN": (
        edit_json("single/config.json", lambda c: c.update(eps=float("nan"))),
        "config.json: field 'eps' should be float, finite, found nan",
    ),
    "name of another type": (
        edit_json("single/config.json", lambda c: c.update(eps="small")),
        "config.json: field 'eps' should be float, finite, found 'small'",
    ),
    "NaN beside rehyat.json": (
        lambda work: (
            edit_json("single/config.json", lambda c: c.update(eps=float("nan")))(work),
            (work / "single/rehyat.json").write_text('{"codec": "space_to_depth", "text_length": 8}'),
        ),
        "config.json: field 'eps' should be float, finite, found nan",
    ),
    "text that does not fit into memory": (
        lambda work: (work / "single/rehyat.json").write_text('{"text_length": 1000000000000}'),
        "rehyat.json: field 'text_length' should be int of at most",
    ),
    "ffn_dim": (edit_json("single/config.json", lambda c: c.update(ffn_dim=113)), "ffn_dim should be 112", "found 113"),
    "text_dim": (edit_json("single/config.json", lambda c: c.update(text_dim="48")), "text_dim should be 48", "'48'"),
    "freq_dim": (edit_json("single/config.json", lambda c: c.update(freq_dim=128)), "freq_dim should be 256"),
    "in_channels": (edit_json("single/config.json", lambda c: c.update(in_channels=36)), "in_channels should be 16"),
    "out_channels": (edit_json("single/config.json", lambda c: c.update(out_channels=8)), "out_channels should be 16"),
    "patch_size": (
        edit_json("single/config.json", lambda c: c.update(patch_size=[2, 2, 1])),
        "patch_size",
        "[1, 2, 2]",
    ),
    "heads": (edit_json("single/config.json", lambda c: c.update(num_attention_heads=3)), "num_attention_heads", "64"),
    "no heads": (edit_json("single/config.json", lambda c: c.update(num_attention_heads=0)), "num_attention_heads"),
    "head_dim": (
        edit_json("single/config.json", lambda c: c.update(attention_head_dim=64)),
        "attention_head_dim",
        "64",
    ),
    "eps": (edit_json("single/config.json", lambda c: c.update(eps="small")), "eps", "'small'"),
    "no config": (lambda work: (work / "single" / "config.json").unlink(), "config.json", "head_dim 128"),
    "side-car unknown": (lambda w: (w / "single/rehyat.json").write_text('{"hybrid_block": [0]}'), "'hybrid_blocks'"),
    "side-car codec": (lambda w: (w / "single/rehyat.json").write_text('{"codec": 3}'), "rehyat.json", "codec"),
    "side-car blocks": (
        lambda w: (w / "single/rehyat.json").write_text('{"hybrid_blocks": [5]}'),
        "rehyat.json",
        "hybrid_blocks",
        "(5,)",
    ),
    "side-car against config": (
        lambda w: [
            (w / "single/config.json").write_text('{"_class_name": "WanModel", "num_heads": 2, "text_len": 512}'),
            (w / "single/rehyat.json").write_text('{"text_length": 8}'),
        ],
        "rehyat.json: text_length is 8",
        "512",
    ),
    "side-car form": (
        lambda w: (w / "single/rehyat.json").write_text('{"hybrid": {"chunk_frame": 3}}'),
        "rehyat.json",
        "'hybrid.chunk_frame'",
        "'hybrid.chunk_frames'",
    ),
}

SHARDS = {
    "missing shard": (lambda work: (work / "sharded" / SHARD).unlink(), SHARD, "does not exist"),
    "total size": (
        edit_json(f"sharded/{INDEX}", lambda index: index["metadata"].update(total_size=5)),
        INDEX,
        "total_size is 5",
    ),
    "wrong shard": (
        edit_json(
            f"sharded/{INDEX}",
            lambda index: index["weight_map"].update({FFN: index["weight_map"]["scale_shift_table"]}),
        ),
        INDEX,
        FFN,
        "weight_map",
    ),
    "tensor in no shard": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].update(ghost=SHARD)),
        INDEX,
        "ghost",
        SHARD,
    ),
    "tensor not in the index": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].pop(FFN)),
        INDEX,
        FFN,
    ),
    "escaping": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].update({FFN: f"../single/{WEIGHTS}"})),
        INDEX,
        f"../single/{WEIGHTS}",
        "same folder",
    ),
    "absolute": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].update({FFN: f"/{WEIGHTS}"})),
        INDEX,
        "same folder",
    ),
    "windows": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].update({FFN: f"..\\single\\{WEIGHTS}"})),
        INDEX,
        "same folder",
    ),
    "pickled shard": (
        edit_json(f"sharded/{INDEX}", lambda index: index["weight_map"].update({FFN: "pytorch_model.bin"})),
        INDEX,
        "pytorch_model.bin",
    ),
    "no map": (edit_json(f"sharded/{INDEX}", lambda index: index.pop("weight_map")), INDEX, "weight_map"),
    "not JSON": (edit_bytes(f"sharded/{INDEX}", lambda b: b"{"), INDEX, "not JSON"),
    "no index": (lambda work: (work / "sharded" / INDEX).unlink(), "index"),
}


def cases(table: dict[str, tuple]) -> list:
    return [pytest.param(damage, expected, id=name) for name, (damage, *expected) in table.items()]


@pytest.mark.parametrize(("damage", "expected"), cases(TENSORS | FILES | CONFIGS))
def test_bad_checkpoint_is_refused(work, capsys, damage, expected):
    damage(work)
    assert_refused(capsys, work, work / "single", *expected)


@pytest.mark.parametrize(("damage", "expected"), cases(SHARDS))
def test_bad_shards_are_refused(work, capsys, damage, expected):
    damage(work)
    assert_refused(capsys, work, work / "sharded", *expected)


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model.pt", "model.ckpt"])
def test_pickle_is_refused_by_its_name_without_being_opened(work, capsys, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (work / "sprung",)

    (work / name).write_bytes(pickle.dumps(Trap()))
    assert_refused(capsys, work, work / name, name, "pickle")


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_command_that_replaces_a_pickle_writes_its_tensors(tmp_path, monkeypatch, is_zip):
    source, values = tmp_path / "model's weights.pth", torch.arange(6.0).reshape(2, 3)
    torch.save({"a": values.T, "b": values}, source, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError) as caught:
        find_tensors(source)
    _, _, code, *paths = shlex.split(str(caught.value)[str(caught.value).index("python -c") :])
    monkeypatch.setattr(sys, "argv", ["-c", *paths])
    exec(code, {})
    written = load_file(source.with_suffix(".safetensors"))
    assert torch.equal(written["a"], values.T) and torch.equal(written["b"], values)


def test_one_shard_alone_is_refused(work, capsys):
    assert_refused(capsys, work, work / "sharded" / SHARD, SHARD, "one shard")


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_source_of_the_wrong_kind_is_refused(work, capsys, layout):
    assert_refused(capsys, work, work / "single", "single", "not a model checkpoint", layout=layout)


# --------------------------------------------------------------------------------------- damaged model checkpoints

CHUNK = f"model/params/{FFN_PATH}/0.0.0"

MODELS = {
    "no model.json": (lambda work: (work / "model/model.json").unlink(), "model.json"),
    "not JSON": (edit_bytes("model/model.json", lambda b: b[:50]), "model.json", "not JSON"),
    "version": (
        edit_json("model/model.json", lambda m: m.update(format_version=3)),
        "format_version should be one of (1, 2)",
        "3",
    ),
    "architecture": (edit_json("model/model.json", lambda m: m.update(architecture="unet")), "architecture", "'unet'"),
    "unknown field": (edit_json("model/model.json", lambda m: m.update(codecs="x")), "'codecs'", "'codec'"),
    "no codec": (edit_json("model/model.json", lambda m: m.pop("codec")), "'codec' is missing"),
    "codec": (edit_json("model/model.json", lambda m: m.update(codec=None)), "codec", "None"),
    "no config": (edit_json("model/model.json", lambda m: m.update(config=3)), "config", "3"),
    "config field": (edit_json("model/model.json", lambda m: m["config"].update(heads=2)), "'heads'", "'num_heads'"),
    "config type": (
        edit_json("model/model.json", lambda m: m["config"].update(num_layers="2")),
        "'num_layers' should be int",
        "'2'",
    ),
    "config value": (
        edit_json("model/model.json", lambda m: m["config"].update(attention=[{"blocks": [0], "chunk_frames": 0}])),
        "chunk_frames",
        "0",
    ),
    "more layers than fit into memory": (
        edit_json("model/model.json", lambda m: m["config"].update(num_layers=10**11)),
        "model.json: config: field 'num_layers' should be int of at most 1,048,576, found 100000000000",
    ),
    "more layers than a model": (
        edit_json("model/model.json", lambda m: m["config"].update(num_layers=10**6)),
        "model.json: config: field 'num_layers' should be at most 4,096, found 1000000",
    ),
    "text that does not fit into memory": (
        edit_json("model/model.json", lambda m: m["config"].update(text_length=10**12)),
        "model.json: config: field 'text_length' should be int of at most",
    ),
    "another Orbax format": (
        lambda work: (work / "model/params/manifest.ocdbt").write_bytes(b""),
        "manifest.ocdbt: expected arrays in Zarr",
    ),
    "other shapes": (
        edit_json("model/model.json", lambda m: m["config"].update(text_dim=47)),
        "text_embedding.linear_1.kernel",
        "(47, 64)",
        "(48, 64)",
    ),
    "fewer parameters": (
        edit_json("model/model.json", lambda m: m["config"].update(attention=[{"blocks": [0]}])),
        "feature_maps.key.layer_0.kernel is missing",
    ),
    "no params": (lambda work: shutil.rmtree(work / "model/params"), "params", "does not exist"),
    "no tree": (lambda work: (work / "model/params/_METADATA").unlink(), "params", "not a complete Orbax checkpoint"),
    "damaged tree": (
        edit_bytes("model/params/_METADATA", lambda b: b[:99]),
        "params",
        "not a complete Orbax checkpoint",
    ),
    "other tree": (edit_bytes("model/params/_METADATA", lambda b: b"[]"), "params", "not a complete Orbax checkpoint"),
    "no array": (lambda work: shutil.rmtree(work / "model/params" / FFN_PATH), FFN_PATH),
    "no array description": (lambda work: (work / "model/params" / FFN_PATH / ".zarray").unlink(), FFN_PATH),
    "no values": (lambda work: (work / CHUNK).unlink(), FFN_PATH),
    "truncated values": (edit_bytes(CHUNK, lambda b: b[:-4]), FFN_PATH),
    "NaN": (edit_bytes(CHUNK, lambda b: np.float32("nan").tobytes() + b[4:]), "blocks.0.ffn.net.0.proj.weight", "NaN"),
}


@pytest.mark.parametrize(("damage", "expected"), cases(MODELS))
def test_bad_model_checkpoint_is_refused(work, capsys, damage, expected):
    damage(work)
    assert_refused(capsys, work, work / "model", *expected, layout="diffusers")


# ------------------------------------------------------------------------------------------------------ destinations

TO = {
    "from-torch": lambda work: ["from-torch", str(work / "single"), str(work / "there")],
    "to-torch": lambda work: ["to-torch", str(work / "model"), str(work / "there"), "--layout", "original"],
}


OTHERS = {"from-torch": "to-torch", "to-torch": "from-torch"}


@pytest.mark.parametrize("command", TO)
def test_an_earlier_conversion_is_only_replaced_with_force(work, capsys, command):
    # Of either kind: a model checkpoint, or a PyTorch folder.
    for earlier in (command, OTHERS[command]):
        shutil.rmtree(work / "there", ignore_errors=True)
        assert main(TO[earlier](work)) == 0
        before = sorted(path.name for path in (work / "there").iterdir())
        assert "already exists" in refusal(capsys, *TO[command](work))
        assert sorted(path.name for path in (work / "there").iterdir()) == before
        assert main([*TO[command](work), "--force"]) == 0
        assert (before == sorted(path.name for path in (work / "there").iterdir())) == (earlier == command)
    assert sorted(path.name for path in work.iterdir()) == ["model", "sharded", "single", "there"]
    load_params(work / "there")


def test_the_export_of_a_student_by_an_earlier_release_is_replaced(work):
    shutil.copytree(VERSION_1 / "student_diffusers", work / "there")
    (work / "there" / "rehyat_torch.py").touch()
    assert main([*TO["to-torch"](work), "--force"]) == 0


def a_download(there):
    """Weights that look like an export, but that only their owner has."""
    shutil.copytree(there.parent / "single", there)


def a_project(there):
    (there / "src").mkdir(parents=True)


def notes_in_a_model(there):
    shutil.copytree(there.parent / "model", there)
    (there / "notes.txt").write_text("kept")


def a_file(there):
    there.write_text("kept")


@pytest.mark.parametrize("command", TO)
@pytest.mark.parametrize(
    ("make", "named"),
    [(a_download, "config.json"), (a_project, "src"), (notes_in_a_model, "notes.txt"), (a_file, "is a file")],
)
def test_what_no_conversion_wrote_is_never_replaced(work, capsys, command, make, named):
    make(work / "there")
    before = {path: path.is_file() and path.read_bytes() for path in (work / "there").rglob("*")}
    message = refusal(capsys, *TO[command](work), "--force")
    assert named in message and "choose another destination" in message
    assert {path: path.is_file() and path.read_bytes() for path in (work / "there").rglob("*")} == before


def test_a_source_whose_files_are_links_into_the_destination_is_kept(work, capsys):
    assert main(["to-torch", str(work / "model"), str(work / "there"), "--layout", "diffusers"]) == 0
    (work / "linked").mkdir()
    for file in (work / "there").iterdir():
        (work / "linked" / file.name).symlink_to(file)
    assert "would replace the source" in refusal(capsys, "from-torch", work / "linked", work / "there", "--force")
    one = work / "linked" / WEIGHTS
    assert "would replace the source" in refusal(capsys, "from-torch", one, work / "there", "--force")
    assert (work / "there" / WEIGHTS).is_file()


@pytest.mark.parametrize("command", TO)
def test_failed_replacement_keeps_what_was_there(work, capsys, command):
    assert main(TO[command](work)) == 0
    before = {path: path.is_file() and path.read_bytes() for path in (work / "there").rglob("*")}
    TENSORS["NaN"][0](work)
    MODELS["NaN"][0](work)
    assert "NaN" in refusal(capsys, *TO[command](work), "--force")
    assert {path: path.is_file() and path.read_bytes() for path in (work / "there").rglob("*")} == before
    assert sorted(path.name for path in work.iterdir()) == ["model", "sharded", "single", "there"]


def test_a_link_at_the_destination_is_replaced_and_its_target_kept(work, capsys):
    (work / "there").symlink_to(work / "sharded")
    assert "already exists" in refusal(capsys, *TO["from-torch"](work))
    assert main([*TO["from-torch"](work), "--force"]) == 0
    assert (work / "there" / "model.json").is_file()
    assert (work / "sharded" / INDEX).is_file()


def test_missing_parents_of_the_destination_are_made(work):
    assert main(["from-torch", str(work / "single"), str(work / "new" / "place" / "model")]) == 0
    assert (work / "new" / "place" / "model" / "model.json").is_file()


def test_file_in_the_destination_s_path_is_refused(work, capsys):
    (work / "file").write_text("kept")
    message = refusal(capsys, "from-torch", work / "single", work / "file" / "model")
    assert "cannot be written (Not a directory)" in message
    assert (work / "file").read_text() == "kept"


def test_unwritable_destination_is_refused(work, capsys):
    message = refusal(capsys, "from-torch", work / "single", work / ("x" * 250))
    assert "cannot be written (File name too long)" in message


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 80 kB, which the converted models exceed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs root, for a disk of its own")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("command", TO)
def test_a_full_disk_is_reported_and_left_as_it_was(work, capsys, full_disk, command):
    arguments = [full_disk / "there" if text == str(work / "there") else text for text in TO[command](work)]
    message = refusal(capsys, *arguments)
    assert f"{full_disk / 'there'}: cannot be written (No space left on device" in message
    assert "free some space" in message and list(full_disk.iterdir()) == []


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_destination(work, capsys, monkeypatch):
    def unreadable(file, mode="r", **options):
        if mode == "rb" and "buffering" in options:
            raise OSError(errno.EIO, "Input/output error")
        return open(file, mode, **options)

    monkeypatch.setattr(safetensors_file, "open", unreadable, raising=False)
    message = refusal(capsys, "from-torch", work / "single", work / "there")
    assert f"{WEIGHTS}: cannot be read (Input/output error)" in message


def test_a_destination_that_is_not_utf_8_is_refused(work, capsys):
    message = refusal(capsys, "from-torch", work / "single", work / "\udcff")
    assert r"/\udcff: expected a path in UTF-8" in message


def test_a_source_of_links_that_lead_to_one_another_is_refused(work, capsys):
    (work / "loop").symlink_to(work / "loop")
    assert "loop" in refusal(capsys, "from-torch", work / "loop", work / "there", "--force")


@pytest.mark.parametrize("destination", ["single", "."])
def test_source_is_never_replaced_by_its_conversion(work, capsys, destination):
    assert "would replace the source" in refusal(capsys, "from-torch", work / "single", work / destination, "--force")
    assert (work / "single" / WEIGHTS).exists()


def test_exit_codes_and_messages_of_the_program(work):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rehyat_jax.convert", *map(str, arguments)]
        return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)

    done = run("from-torch", work / "single", work / "there")
    assert done.returncode == 0 and "error" not in done.stderr  # a slow machine shows progress there
    assert done.stdout.startswith(f"{work / 'there'}: 42 parameters")
    refused = run("from-torch", work / "single", work / "there")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {work / 'there'}: already exists")
    assert len(refused.stderr.splitlines()) == 1
