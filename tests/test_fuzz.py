"""Readers of users' files, given damaged ones: an InputError that names the file, or a sound result; never more."""

import contextlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from fuzzing import EXAMPLES, JSON, SCALARS, damaged_bytes, damaged_json_text, fuzzed, only_input_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_data import example, write_data_set
from test_sample_cli import save_random_model

from rehyat_jax.data.manifest import MANIFEST, SHARD_SUFFIX, read_manifest
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.data.records import pack, unpack
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.video import SUFFIXES, UnreadableVideo, find_ffmpeg, frame_size
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.plan import parse_arguments as plan_arguments
from rehyat_jax.preparation.captions import read_captions
from rehyat_jax.preparation.tables import Damaged, Table
from rehyat_jax.preparation.tar_shards import TarShards
from rehyat_jax.preparation.units import Hosts
from rehyat_jax.preparation.video_sources import Rejected
from rehyat_jax.preparation.videos import prepare_videos
from rehyat_jax.sample import parse_arguments as sample_arguments
from rehyat_jax.train import parse_arguments as train_arguments
from rehyat_jax.training.config import check_config, default_config, load_config, save_config
from rehyat_jax.weights.model_checkpoint import MODEL_FILE, read_model_description
from rehyat_jax.weights.safetensors_file import create_file, read_header, read_tensor, write_tensor
from rehyat_jax.weights.spec import Inferred
from rehyat_jax.weights.torch_config import SIDE_CAR, read_torch_config, write_torch_config
from rehyat_jax.weights.torch_folder import create_files, find_tensors
from rehyat_jax.weights.wan.spec import WAN as SPEC

WAN = WAN_PRESETS["tiny"].replace(hybrid_blocks=(1,))
TENSORS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16), "empty": np.zeros((0, 5), np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def filled(places) -> None:
    for name, place in places.items():
        write_tensor(place, TENSORS[name])


SPECS = {name: (array.dtype, array.shape) for name, array in TENSORS.items()}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
}


@fuzzed
@given(header=damaged_json_text(HEADER), length=st.none() | st.integers(0, 2**64 - 1), data=damaged_bytes(bytes(32)))
def test_safetensors(folder, header, length, data):
    file = folder / "damaged.safetensors"
    length = len(header) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + header + data)
    with only_input_errors(str(file)):
        tensors = read_header(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)
        for tensor in tensors.values():
            assert read_tensor(tensor).shape == tensor.shape


@fuzzed
@given(data=st.data())
def test_whole_safetensors_files(folder, data):
    file = folder / "whole.safetensors"
    if not file.exists():
        filled(create_file(file, SPECS))
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    with only_input_errors(str(damaged)):
        for tensor in read_header(damaged).values():
            read_tensor(tensor)


@pytest.fixture(scope="module")
def shards(folder) -> tuple[Path, dict]:
    (folder / "shards").mkdir()
    filled(create_files(folder / "shards", SPECS, max_shard_bytes=24))
    (index,) = (folder / "shards").glob("*.index.json")
    return index, json.loads(index.read_text())


@fuzzed
@given(data=st.data())
def test_index_of_shards(shards, data):
    index, content = shards
    index.write_bytes(data.draw(damaged_json_text(content)))
    with only_input_errors(str(index.parent)):
        folder, tensors = find_tensors(index.parent)
        assert folder == index.parent and {tensor.file.parent for tensor in tensors.values()} <= {folder}


INFERRED = {
    "width": Inferred(WAN.width, "patch_embedding.weight"),
    "num_layers": Inferred(WAN.num_layers, "blocks.1.*"),
    "ffn_dim": Inferred(WAN.ffn_dim, "ffn"),
}


@fuzzed
@given(data=st.data(), layout=st.sampled_from(["diffusers", "original"]))
def test_config_of_a_pytorch_checkpoint(folder, data, layout):
    write_torch_config(SPEC, folder, WAN, {"codec": "space_to_depth", "text_encoder": "word_vectors"}, layout)
    for name in ("config.json", SIDE_CAR):
        content = json.loads((folder / name).read_text())
        (folder / name).write_bytes(data.draw(damaged_json_text(content)))
    with only_input_errors("config.json", SIDE_CAR):
        config, metadata = read_torch_config(SPEC, folder, INFERRED, layout)
        assert config.width == WAN.width and all(isinstance(value, str) for value in metadata.values())


MODEL = {
    "format_version": 1,
    "architecture": "wan",
    "config": WAN.to_dict(),
    "codec": "wan_vae",
    "text_encoder": "umt5",
}


@fuzzed
@given(content=damaged_json_text(MODEL))
def test_description_of_a_model_checkpoint(folder, content):
    (folder / MODEL_FILE).write_bytes(content)
    with only_input_errors(MODEL_FILE):
        config, _ = read_model_description(folder)
        assert config.width == config.num_heads * config.head_dim


RECORD = pack(example(3), {"name": "3.mp4", "caption": "number 3"})
SHAPES = {name: array.shape for name, array in example(0).items()}


@fuzzed
@given(record=damaged_bytes(RECORD))
def test_record_of_an_example(record):
    with only_input_errors():
        found = unpack(record, SHAPES)
        assert {name: array.shape for name, array in found.items()} == SHAPES


@pytest.fixture(scope="module")
def prepared(folder) -> tuple[Path, dict[str, bytes]]:
    write_data_set(folder / "prepared", [example(number) for number in range(6)], unit=3)
    files = (path for path in (folder / "prepared").iterdir() if path.is_file())
    return folder / "prepared", {path.name: path.read_bytes() for path in files}


@fuzzed
@given(data=st.data())
def test_manifest_of_a_data_set(prepared, data):
    path, files = prepared
    (path / MANIFEST).write_bytes(data.draw(damaged_json_text(json.loads(files[MANIFEST]))))
    with only_input_errors(str(path)):
        manifest = read_manifest(path)
        assert {shard.file for bucket in manifest.buckets for shard in bucket.shards} <= files.keys()


@fuzzed
@given(data=st.data())
def test_shards_of_a_data_set(prepared, data):
    path, files = prepared
    for name, content in files.items():
        (path / name).write_bytes(content)
    shard = data.draw(st.sampled_from([name for name in files if name.endswith(SHARD_SUFFIX)]))
    (path / shard).write_bytes(data.draw(damaged_bytes(files[shard])))
    with only_input_errors(str(path)):
        for bucket in PreparedExamples(path).buckets:
            for index in range(len(bucket)):
                bucket.description(index)


CAPTIONS = {
    "captions.csv": b'file,caption\na.mp4,"one, two"\nb/c.mp4,"three\nfour"\n',
    "captions.jsonl": b'{"file": "a.mp4", "caption": "one"}\n{"file": "b/c.mp4", "caption": "two"}\n',
}


@fuzzed
@given(name=st.sampled_from(sorted(CAPTIONS)), data=st.data())
def test_captions(folder, name, data):
    (folder / name).write_bytes(data.draw(damaged_bytes(CAPTIONS[name]) | st.binary(max_size=60)))
    with only_input_errors(name):
        captions = read_captions(folder / name)
        assert all(isinstance(text, str) for pair in captions.items() for text in pair)


@pytest.fixture(scope="module")
def tables(folder) -> dict[str, bytes]:
    """The same rows as Parquet and as Arrow's stream."""
    latents = np.arange(96.0).reshape(6, 2, 2, 2, 2).tolist()
    rows = pa.table({"video": [b"0123", b"45", None] * 2, "caption": list("abcdef"), "latents": latents})
    pq.write_table(rows, folder / "seed.parquet", row_group_size=4)
    with pa.OSFile(str(folder / "seed.arrow"), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows, 4)
    return {name: (folder / f"seed{name}").read_bytes() for name in (".parquet", ".arrow")}


@fuzzed
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@given(data=st.data())
def test_tables(folder, tables, suffix, data):
    file = folder / f"table{suffix}"
    file.unlink(missing_ok=True)  # it may be mapped into memory
    file.write_bytes(data.draw(damaged_bytes(tables[suffix])))
    with only_input_errors(file.name):
        table = Table(file, "caption")
        for number in set(range(len(table.inputs))) - table.faults.keys():
            with contextlib.suppress(Damaged):
                row = table.row(number, table.schema.names)
                assert all(len(str(value)) < 10_000 for value in row.values())


def small_shard(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for suffix, content in {".mp4": b"a video", ".txt": b"a seven", ".json": b'{"caption": "a"}'}.items():
            member = tarfile.TarInfo(name + suffix)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


SHARD = small_shard("key") + small_shard("n" * 200)


@fuzzed
@given(data=st.data())
def test_shards(folder, data):
    (folder / "a.tar").write_bytes(data.draw(damaged_bytes(SHARD)))
    with only_input_errors("a.tar"):
        found = TarShards(folder, [folder / "a.tar"], "caption")
        for number in set(range(len(found.videos))) - found.faults.keys():
            with contextlib.suppress(Rejected), found.file(number) as path:
                assert path.stat().st_size == found.videos[number].size


@pytest.fixture(scope="module")
def seeds(folder) -> list[bytes]:
    """A video of four frames in each container that `prepare` reads."""
    (folder / "seeds").mkdir()
    good = folder / "seeds/good.mp4"
    write_video(good, np.linspace(0, 1, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3))
    for name in ("b.mov", "c.mkv", "d.avi"):
        command = [find_ffmpeg(), "-loglevel", "error", "-i", good, "-c", "copy", folder / "seeds" / name]
        subprocess.run(command, check=True)
    return [path.read_bytes() for path in sorted((folder / "seeds").iterdir())]


VIDEOS = 10
"""Number of videos of an example of the next test. It makes a tenth of the examples, as each video costs seconds."""


@settings(fuzzed, max_examples=max(1, EXAMPLES // (10 * VIDEOS)), deadline=None)
@given(data=st.data())
def test_videos(seeds, data):
    """Damaged videos, prepared together, become examples or are left out by name; the machine is never to blame."""
    with tempfile.TemporaryDirectory() as folder:
        source, destination = Path(folder) / "videos", Path(folder) / "data"
        source.mkdir()
        for number in range(VIDEOS):
            suffix = data.draw(st.sampled_from(SUFFIXES))
            (source / f"{number}{suffix}").write_bytes(data.draw(damaged_video(seeds)))
            (source / f"{number}.txt").write_text("a seven")
        with only_input_errors("none of 10 inputs gave an example"):
            prepare_videos(
                source,
                destination,
                codec="space_to_depth",
                text_encoder="word_vectors",
                models=None,
                sizes=[(2, 8, 8)],
                compute_dtype="float32",
                dtype="float32",
                unit=VIDEOS,
                workers=2,
                hosts=Hosts(),
            )
            found = PreparedExamples(destination)
            for bucket in found.buckets:
                for index in range(len(bucket)):
                    bucket.description(index)
        summary = json.loads((destination / "summary.json").read_text())
        assert summary["examples"] + len(summary["rejects"]) == VIDEOS
        assert all(reject["reason"] in ("unreadable", "too short", "too small") for reject in summary["rejects"])


@st.composite
def damaged_video(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A video with a few bytes changed, or two of its numbers made very large, or its end cut away."""
    content = draw(st.sampled_from(seeds))
    match draw(st.sampled_from(["bytes", "numbers", "end"])):
        case "bytes":
            return draw(damaged_bytes(content))
        case "numbers":
            changed = bytearray(content)
            for at in draw(st.lists(st.integers(0, len(content) - 4), min_size=1, max_size=2)):
                number = draw(st.sampled_from([0, 1, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1]))
                changed[at : at + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
            return bytes(changed)
        case _:
            return content[: draw(st.integers(0, len(content)))]


def test_no_video_makes_ffmpeg_open_another_file_or_the_network(seeds, tmp_path):
    good = tmp_path / "elsewhere.mp4"
    good.write_bytes(seeds[0])
    with HTTPServer(("127.0.0.1", 0), NothingThere) as server:
        NothingThere.asked.clear()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for place in (good, f"file:{good}", f"http://127.0.0.1:{server.server_port}/a.mp4"):
                for number, playlist in enumerate(playlists(place)):
                    file = tmp_path / f"{number}.mp4"
                    file.write_bytes(playlist)
                    with pytest.raises(UnreadableVideo):
                        frame_size(file)
        finally:
            server.shutdown()
            thread.join()
    assert not NothingThere.asked


def playlists(place: str | Path) -> list[bytes]:
    """Files of formats that name other files."""
    texts = [
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{place}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{place}'\n",
        f"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011' profiles='urn:mpeg:dash:profile:isoff-on-demand:2011'"
        f" type='static' mediaPresentationDuration='PT1S'><Period><AdaptationSet mimeType='video/mp4'>"
        f"<Representation id='1' bandwidth='1'><BaseURL>{place}</BaseURL>"
        f"</Representation></AdaptationSet></Period></MPD>",
        f"[playlist]\nFile1={place}\nNumberOfEntries=1\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{place}\n",
        f"<?xml version='1.0'?><imf><File>{place}</File></imf>",
    ]
    return [text.encode() for text in texts]


class NothingThere(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)


@fuzzed
@given(data=st.data())
def test_configuration_of_a_run(folder, data):
    save_config(default_config(), folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(data.draw(damaged_json_text(content)))
    with only_input_errors("config"):
        load_config(folder)


FIELDS = [name for name, _ in default_config().items()]
FIELDS += ["optimizer.name", "hybrid.blocks", "data.path", "mesh.fsdp"]
OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from(FIELDS) | st.text(max_size=8),
        JSON.map(str)
        | SCALARS.map(str)
        | st.sampled_from(["", "()", "(1,", "[0]", "all", "__import__('os')", "1e999"]),
    ).map(lambda pair: f"--config.{pair[0]}={pair[1]}")
    | st.text(max_size=12),
    max_size=3,
)


@fuzzed
@given(arguments=OVERRIDES)
def test_command_line_of_train(arguments):
    with only_input_errors():
        config, *_ = train_arguments(
            ["train", "--config=configs/demo_distill.py", "--workdir=w", *map(without_help, arguments)]
        )
        check_config(config)


@fuzzed
@given(
    topology=st.sampled_from(["v5e:2x2", "v5e", "v9:1x1", "v5e:x", "v5e:0x0", "v5p:-1x2"]) | st.text(max_size=8),
    size=st.tuples(st.sampled_from(["frames", "height", "width"]), SCALARS.map(str)),
)
def test_command_line_of_plan(topology, size):
    with only_input_errors():
        plan_arguments(["plan", "--config=configs/demo_teacher.py", f"--topology={topology}", f"--{size[0]}={size[1]}"])


SIDES = ["frames", "size", "height", "width"]
SAMPLING = ["seed", "steps", "guidance-scale", "flow-shift", "batch", "mesh", "dtype", *SIDES]
SIZES = st.sampled_from(["0", "-8", "8", "16", "9992", "10000", "4294967296", "1e999", "nan", "context=0", "data=²"])


@fuzzed
@given(options=st.dictionaries(st.sampled_from(SAMPLING), SIZES | SCALARS.map(str), max_size=4))
def test_command_line_of_sample(sampled, options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with only_input_errors(), contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        given = sample_arguments([f"--checkpoint={sampled}", "--prompt=a two", "--out=two.mp4", *arguments])
        pipeline = Pipeline.from_pretrained(None, SamplingOptions.from_arguments(given), student=sampled)
        assert min(pipeline.latent_shape) > 0


@pytest.fixture(scope="module")
def sampled(folder) -> Path:
    return save_random_model(folder / "sampled")


def without_help(argument: str) -> str:
    return argument.replace("help", "")


def teardown_module():
    # Configuration files register their flags where they are defined, per command line; none may be left behind.
    assert "config.steps" not in flags.FLAGS


def test_commands_end_as_documented_whatever_they_are_given():
    script = Path(__file__).parent / "fuzz_commands.py"
    result = subprocess.run([sys.executable, script, "--cases", "20"], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
