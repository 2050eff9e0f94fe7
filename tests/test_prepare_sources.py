"""Preparing what people have: tar shards, Hugging Face's data sets and FastVideo's latents, also damaged ones."""

import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from safetensors.numpy import save_file

from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.preparation import tables, tar_shards, units
from rehyat_jax.prepare import main

SMALL = ["--size", "4x8x8", "--unit", "2", "--workers", "2"]


@pytest.fixture(scope="module")
def mp4s(tmp_path_factory) -> list[bytes]:
    """Six short grey videos, each of another brightness."""
    folder = tmp_path_factory.mktemp("mp4s")
    for number in range(6):
        write_video(folder / f"{number}.mp4", np.full((4, 8, 8, 3), number / 10))
    return [(folder / f"{number}.mp4").read_bytes() for number in range(6)]


CAPTIONS = [f"a seven {number}" for number in range(6)]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rejects(folder: Path) -> dict[str, tuple[str, str]]:
    found = json.loads((folder / "summary.json").read_text())["rejects"]
    return {reject["name"]: (reject["reason"], reject["detail"]) for reject in found}


def descriptions(folder: Path) -> list[tuple[str, str]]:
    """(name, caption) of all examples of one shape."""
    (bucket,) = PreparedExamples(folder).buckets
    found = [bucket.description(index) for index in range(len(bucket))]
    return [(example["name"], example["caption"]) for example in found]


def check_grey(folder: Path) -> None:
    """The examples are the six videos with their captions' embeddings."""
    (bucket,) = PreparedExamples(folder).buckets
    assert len(bucket) == 6
    for number in range(6):
        # The codec's latents are (pixels - 0.13) / 0.25; H.264 is off by a few levels of 255.
        np.testing.assert_allclose(bucket[number]["latents"] * 0.25 + 0.13, number / 10, atol=0.02)
        np.testing.assert_array_equal(bucket[number]["text"], WordVectors()([CAPTIONS[number]])[0])


# ----------------------------------------------------------------------------------------------------------- tar shards


def write_shards(folder: Path, mp4s: list[bytes]) -> Path:
    """Two shards by webdataset: captions as text in the first, as JSON in the second."""
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:06d}.tar")) as writer:
            for number in range(3 * shard, 3 * shard + 3):
                caption = {"json": {"caption": CAPTIONS[number]}} if shard else {"txt": CAPTIONS[number]}
                writer.write({"__key__": f"sub/{number}", "mp4": mp4s[number], **caption})
    return folder


def append(shard: Path, **files: bytes) -> None:
    with tarfile.open(shard, "a") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tar_shards_become_examples(mp4s, tmp_path):
    source = write_shards(tmp_path / "shards", mp4s)
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    check_grey(tmp_path / "data")
    assert descriptions(tmp_path / "data")[4] == ("000001.tar/sub/4.mp4", "a seven 4")
    assert main([str(source / "000001.tar"), str(tmp_path / "one"), *SMALL]) == 0
    assert len(PreparedExamples(tmp_path / "one")) == 3


def test_faulty_samples_of_shards_are_named_and_the_others_kept(mp4s, tmp_path):
    source = write_shards(tmp_path / "shards", mp4s)
    append(
        source / "000000.tar",
        cut__mp4=mp4s[0][:300],
        cut__txt=b"a",
        plain__mp4=mp4s[0],
        list__mp4=mp4s[0],
        list__json=b'{"caption": ["a"]}',
        deep__mp4=mp4s[0],
        deep__json=b"[" * 100_000,
        bytes__mp4=mp4s[0],
        bytes__txt=b"\xff",
        long__mp4=mp4s[0],
        long__txt=b"x" * (2**22 + 1),
        pickle__mp4=mp4s[0],
        pickle__pyd=b"cos\nsystem\n(S'false'\ntR.",
        alone__txt=b"without a video",
    )
    os.truncate(source / "000001.tar", (source / "000001.tar").read_bytes().index(mp4s[5]) + 100)
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    found = {name.rpartition("/")[2]: fault for name, fault in rejects(tmp_path / "data").items()}
    assert found.pop("cut.mp4")[0] == "unreadable" and found.pop("000001.tar")[0] == "damaged shard"
    assert {found.pop(f"{name}.mp4")[0] for name in ("plain", "pickle")} == {"no caption"}
    assert {found.pop(f"{name}.mp4")[0] for name in ("list", "deep", "bytes", "long")} == {"caption refused"}
    assert not found
    names = [name for name, _ in descriptions(tmp_path / "data")]
    assert names == [f"{shard:06d}.tar/sub/{number}.mp4" for number, shard in enumerate([0, 0, 0, 1, 1])]


def test_a_shard_with_a_name_twice_gives_the_samples_before_it(mp4s, tmp_path):
    source = write_shards(tmp_path / "shards", mp4s)
    append(source / "000000.tar", a__mp4=mp4s[0], a__MP4=mp4s[0])
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    ((name, (reason, detail)),) = rejects(tmp_path / "data").items()
    assert (name, reason) == ("000000.tar", "damaged shard") and "duplicate file name" in detail
    check_grey(tmp_path / "data")


def test_details_of_rejected_samples_are_the_same_in_every_run(mp4s, tmp_path):
    source = write_shards(tmp_path / "shards", mp4s)
    append(source / "000000.tar", cut__mp4=mp4s[0][:300], cut__txt=b"a")
    for name in ("a", "b"):
        assert main([str(source), str(tmp_path / name), *SMALL]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_that_are_stopped_and_shared_give_the_same_bytes(mp4s, tmp_path, monkeypatch):
    source = write_shards(tmp_path / "shards", mp4s)
    assert main([str(source), str(tmp_path / "whole"), *SMALL]) == 0
    add, count = units.UnitWriter.add, 0

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count in (1, 4):
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(units.UnitWriter, "add", interrupted)
        for _ in range(2):
            assert main([str(source), str(tmp_path / "data"), *SMALL]) == INTERRUPTED
    for host in ("1", "0"):
        assert main([str(source), str(tmp_path / "data"), *SMALL, "--num-hosts", "2", "--host", host]) == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    append(source / "000001.tar", more__mp4=mp4s[0], more__txt=b"a")
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 2


def test_a_header_of_any_length_is_not_read_into_memory(mp4s, tmp_path):
    source = write_shards(tmp_path / "shards", mp4s)
    header = tarfile.TarInfo("x" * 200).tobuf(tarfile.GNU_FORMAT)
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**40
    with (source / "000002.tar").open("wb") as shard:
        shard.write(member.tobuf(tarfile.GNU_FORMAT) + header)
        shard.truncate(2**40)
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    ((name, (reason, detail)),) = rejects(tmp_path / "data").items()
    assert (name, reason) == ("000002.tar", "damaged shard") and "headers of at most" in detail


def test_a_disk_that_fails_rejects_no_sample(mp4s, tmp_path, monkeypatch, capsys):
    source = write_shards(tmp_path / "shards", mp4s)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "000000.tar")

    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "copied", fail)
        assert main([str(source), str(tmp_path / "data"), *SMALL]) == 2
    assert "cannot be read on this machine now" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    check_grey(tmp_path / "data")


def test_compressed_shards_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar.gz").write_bytes(b"")
    assert main([str(tmp_path / "shards"), str(tmp_path / "data")]) == 2
    assert "0.tar.gz: expected a tar shard without compression" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ Hugging Face's tables


def as_bytes(mp4s):
    return datasets.Dataset.from_dict({"video": mp4s, "caption": CAPTIONS, "id": list(range(6))})


def as_videos(mp4s):
    struct = [{"bytes": mp4, "path": "not/here.mp4"} for mp4 in mp4s]
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"video": struct, "caption": CAPTIONS}, features=features)


@pytest.mark.parametrize("make", [as_bytes, as_videos])
@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_data_sets_with_videos_become_examples(mp4s, tmp_path, make, form):
    source, data_set = tmp_path / "source", make(mp4s)
    if form == "parquet":
        (source / "data").mkdir(parents=True)
        for part in range(2):
            data_set.select(range(3 * part, 3 * part + 3)).to_parquet(
                source / f"data/train-{part}.parquet", batch_size=2
            )
    else:
        data_set.save_to_disk(source, num_shards=2)
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    check_grey(tmp_path / "data")
    names = [name for name, _ in descriptions(tmp_path / "data")]
    assert names[2] == (
        "data/train-0.parquet group 1 row 0" if form == "parquet" else "data-00000-of-00002.arrow row 2"
    )


def test_columns_and_splits_are_chosen_by_name(mp4s, tmp_path, capsys):
    table = as_bytes(mp4s).rename_columns({"video": "clip", "caption": "text"})
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "source")
    command = lambda source, *options: main([str(source), str(tmp_path / "data"), *SMALL, *options])
    assert command(tmp_path / "source") == 2
    assert "has the splits ['train', 'test']" in capsys.readouterr().err
    assert command(tmp_path / "source/train") == 2
    assert "--caption NAME" in capsys.readouterr().err
    assert command(tmp_path / "source/train", "--caption", "text") == 2
    assert "expected a column 'video', found" in capsys.readouterr().err
    assert command(tmp_path / "source/train", "--caption", "text", "--video", "id") == 2
    assert "expected the bytes of videos, found int64" in capsys.readouterr().err
    assert command(tmp_path / "source/train", "--caption", "text", "--video", "clip") == 0
    check_grey(tmp_path / "data")


def test_faulty_rows_and_files_are_named_and_the_others_kept(mp4s, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rows = {"video": [mp4s[0], b"", None, mp4s[0][:300], *mp4s[:2]], "caption": [*"abcd", None, "x" * 2**21]}
    pq.write_table(pa.table(rows), source / "0.parquet", compression="none", write_page_checksum=True)
    shutil.copy(source / "0.parquet", source / "1.parquet")
    flipped = bytearray((source / "1.parquet").read_bytes())
    flipped[flipped.index(mp4s[0]) + 100] ^= 1
    (source / "1.parquet").write_bytes(flipped)
    (source / "2.parquet").write_bytes(b"PAR1" * 100)
    pq.write_table(pa.table({"video": ["text"], "caption": ["a"]}), source / "3.parquet")
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    reasons = {name: reason for name, (reason, _) in rejects(tmp_path / "data").items()}
    assert reasons == {
        "2.parquet": "damaged file",
        "3.parquet": "damaged file",
        "0.parquet row 1": "unreadable",
        "0.parquet row 2": "no such video",
        "0.parquet row 3": "unreadable",
        "0.parquet row 4": "no caption",
        "0.parquet row 5": "caption refused",
        **{f"1.parquet row {row}": "damaged file" for row in range(4)},
        "1.parquet row 4": "no caption",
        "1.parquet row 5": "caption refused",
    }
    assert descriptions(tmp_path / "data") == [("0.parquet row 0", "a")]


@pytest.mark.parametrize("when", ["listed", "read"])
def test_a_disk_that_fails_rejects_no_row(mp4s, tmp_path, monkeypatch, capsys, when):
    source = tmp_path / "source"
    source.mkdir()
    as_bytes(mp4s).to_parquet(source / "0.parquet")
    read = tables._read

    def fail(file, index, columns):
        if when == "listed" or columns == ("video",):
            with monkeypatch.context() as inner:
                inner.setattr(Path, "open", lambda path, mode: FailingFile(path, mode))
                return read(file, index, columns)
        return read(file, index, columns)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_read", fail)
        assert main([str(source), str(tmp_path / "data"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert (
        "Input/output error" in error and "0.parquet" in error if when == "listed" else "on this machine now" in error
    )
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 0
    check_grey(tmp_path / "data")


class FailingFile(io.FileIO):
    """A file on a disk that fails."""

    def read(self, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readinto = read


def test_an_arrow_file_with_wrong_offsets_is_damaged_and_reads_no_other_memory(tmp_path):
    source = tmp_path / "source"
    datasets.Dataset.from_dict({"video": [b"0123", b"4567"], "caption": ["a", "b"]}).save_to_disk(source)
    (file,) = source.glob("*.arrow")
    content = file.read_bytes()
    offsets = np.array([0, 4, 8], np.int32).tobytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, np.array([0, 4, 2**30], np.int32).tobytes()))
    assert main([str(source), str(tmp_path / "data"), *SMALL]) == 2
    assert {reason for reason, _ in rejects(tmp_path / "data").values()} == {"damaged file"}


def test_names_of_files_in_a_data_set_stay_in_its_folder(mp4s, tmp_path, capsys):
    as_bytes(mp4s).save_to_disk(tmp_path / "source")
    (tmp_path / "source/state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    assert main([str(tmp_path / "source"), str(tmp_path / "data"), *SMALL]) == 2
    assert "state.json: expected the names of data files in the folder" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- FastVideo's latents

SHAPE, LENGTH, WIDTH = (16, 2, 4, 6), 8, 64
CONFIG = WanVaeConfig()


def fastvideo_row(number: int, **replaced) -> dict:
    """A row of FastVideo's pyarrow_schema_t2v: latents [C, T, H, W] and the embedding of 3 tokens."""
    rng = np.random.default_rng(number)
    latents, text = rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(3, WIDTH)).astype(np.float32)
    row = {"id": str(number), "file_name": str(number), "caption": f"a seven {number}", "media_type": "video"}
    row |= {"width": 48, "height": 32, "num_frames": 2, "duration_sec": 1.0, "fps": 16.0}
    for name, tensor in {"vae_latent": latents, "text_embedding": text}.items():
        row |= {f"{name}_bytes": tensor.tobytes(), f"{name}_shape": list(tensor.shape), f"{name}_dtype": "float32"}
    return row | replaced


def latents_of(number: int) -> np.ndarray:
    """The latents that a row is expected to give, [T, H, W, C]."""
    stored = np.moveaxis(np.random.default_rng(number).normal(size=SHAPE).astype(np.float32), 0, -1)
    return (stored - np.float32(CONFIG.latents_mean)) / np.float32(CONFIG.latents_std)


def write_fastvideo(folder: Path, rows: list[dict], null_text: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_chunk_0.parquet", row_group_size=2)
    if null_text:
        save_file({"text": np.zeros((LENGTH, WIDTH), np.float32)}, folder / "null_text.safetensors")
    return folder


WAN = ["--codec", "wan_vae", "--text-encoder", "umt5", "--unit", "2"]


def latents_command(source: Path, destination: Path, *options: str) -> list[str]:
    return ["latents", str(source), str(destination), *WAN, *options]


def test_fastvideos_latents_are_normalised_and_their_text_is_kept(tmp_path):
    source = write_fastvideo(tmp_path / "source", [fastvideo_row(number) for number in range(5)])
    assert main(latents_command(source, tmp_path / "data", "--normalised", "no")) == 0
    data = PreparedExamples(tmp_path / "data")
    (bucket,) = data.buckets
    assert (data.codec, data.text_encoder, bucket.latents_shape) == ("wan_vae", "umt5", (2, 4, 6, 16))
    for number in range(5):
        rng = np.random.default_rng(number)
        rng.normal(size=SHAPE)
        np.testing.assert_array_equal(bucket[number]["latents"], latents_of(number))
        text = rng.normal(size=(3, WIDTH)).astype(np.float32)
        np.testing.assert_array_equal(bucket[number]["text"], np.pad(text, ((0, LENGTH - 3), (0, 0))))
        assert bucket.description(number)["caption"] == f"a seven {number}"
    assert main(latents_command(source, tmp_path / "as_they_are", "--normalised", "yes")) == 0
    (bucket,) = PreparedExamples(tmp_path / "as_they_are").buckets
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(bucket[0]["latents"], np.moveaxis(rng.normal(size=SHAPE).astype(np.float32), 0, -1))


def test_masked_tokens_of_fastvideos_earlier_schema_are_zero(tmp_path):
    mask = np.array([True, True, False])
    masked = {"text_attention_mask_bytes": mask.tobytes(), "text_attention_mask_dtype": "bool"}
    row = fastvideo_row(0, **masked, text_attention_mask_shape=[3])
    source = write_fastvideo(tmp_path / "source", [row])
    assert main(latents_command(source, tmp_path / "data", "--normalised", "no")) == 0
    text = PreparedExamples(tmp_path / "data").buckets[0][0]["text"]
    assert text[:2].all() and not text[2:].any()


def test_nothing_is_guessed_about_a_table_of_latents(tmp_path, capsys):
    source = write_fastvideo(tmp_path / "source", [fastvideo_row(0)], null_text=False)

    def refused(*options: str) -> str:
        assert main(latents_command(source, tmp_path / "data", *options)) == 2
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err

    assert "--normalised no" in refused()
    assert "--layout THWC: FastVideo's latents are CTHW" in refused("--normalised", "no", "--layout", "THWC")
    assert "null_text.safetensors: expected the embedding of no caption" in refused("--normalised", "no")
    assert "text encoder 'umt5'" in refused("--normalised", "no", "--embed-captions")
    (source / "data_chunk_0.parquet").unlink()
    pq.write_table(pa.Table.from_pylist([{"latents": [[[[0.5]]]], "caption": "a"}]), source / "0.parquet")
    assert "--layout CTHW or THWC" in refused("--normalised", "no")
    assert "expected a column 'z'" in refused("--normalised", "no", "--layout", "CTHW", "--latents", "z")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"clip_feature_bytes": b""}, "pyarrow_schema_i2v"),
        ({"trajectory_latents_bytes": b""}, "pyarrow_schema_ode_trajectory"),
        ({"vae_latent_dtype": None}, "vae_latent_dtype"),
    ],
)
def test_other_schemas_of_fastvideo_are_refused_by_name(tmp_path, capsys, columns, words):
    row = {name: value for name, value in fastvideo_row(0, **columns).items() if value is not None}
    source = write_fastvideo(tmp_path / "source", [row])
    assert main(latents_command(source, tmp_path / "data", "--normalised", "no")) == 2
    error = capsys.readouterr().err
    assert "pyarrow_schema_t2v" in error and words in error


def test_rows_that_do_not_fit_are_named_and_the_others_kept(tmp_path):
    zeros = lambda *shape, dtype=np.float32: np.zeros(shape, dtype).tobytes()
    wrong = {
        "channels": {"vae_latent_bytes": zeros(48, 2, 4, 6), "vae_latent_shape": [48, 2, 4, 6]},
        "odd": {"vae_latent_bytes": zeros(16, 2, 3, 6), "vae_latent_shape": [16, 2, 3, 6]},
        "axes": {"vae_latent_shape": [16, 2, 24]},
        "none": {"vae_latent_bytes": None},
        "short": {"vae_latent_bytes": zeros(10)},
        "dtype": {"vae_latent_dtype": "bfloat16"},
        "object": {"vae_latent_dtype": "object"},
        "huge": {"vae_latent_shape": [2**62, 2**62, 4, 6]},
        "negative": {"vae_latent_shape": [-16, -2, 4, 6]},
        "nan": {"vae_latent_bytes": np.full(SHAPE, np.nan, np.float32).tobytes()},
        "width": {"text_embedding_bytes": zeros(3, 32), "text_embedding_shape": [3, 32]},
        "length": {"text_embedding_bytes": zeros(9, WIDTH), "text_embedding_shape": [9, WIDTH]},
    }
    half = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(ml_dtypes.bfloat16)
    good = fastvideo_row(0, vae_latent_bytes=half.tobytes(), vae_latent_dtype="bfloat16", caption=None)
    rows = [good, *(fastvideo_row(1, **replaced) for replaced in wrong.values())]
    source = write_fastvideo(tmp_path / "source", rows)
    assert main(latents_command(source, tmp_path / "data", "--normalised", "yes")) == 0
    details = [detail for reason, detail in rejects(tmp_path / "data").values() if reason == "not an example"]
    found = dict(zip(wrong, details, strict=True))
    assert all("expected latents that wan_vae gives" in found[name] for name in ("channels", "odd"))
    assert all("vae_latent_shape" in found[name] for name in ("axes", "negative"))
    assert all("vae_latent_bytes" in found[name] for name in ("none", "short", "dtype", "huge"))
    assert "vae_latent_dtype" in found["object"] and "finite" in found["nan"]
    assert all("--embed-captions" in found[name] for name in ("width", "length"))
    (bucket,) = PreparedExamples(tmp_path / "data").buckets
    assert len(bucket) == 1
    np.testing.assert_array_equal(bucket[0]["latents"], np.moveaxis(half, 0, -1).astype(np.float32))


@pytest.mark.parametrize("place", ["source", "destination"])
def test_a_disk_that_fails_rejects_no_latents(tmp_path, monkeypatch, capsys, place):
    source = write_fastvideo(tmp_path / "source", [fastvideo_row(number) for number in range(3)])
    command = latents_command(source, tmp_path / "data", "--normalised", "no")
    number = errno.EIO if place == "source" else errno.ENOSPC

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((tables.Table, "row") if place == "source" else (units.UnitWriter, "add")), fail)
        assert main(command) == 2
    error = capsys.readouterr().err
    assert ("on this machine now" if place == "source" else "free some space there") in error
    assert main(command) == 0
    assert len(PreparedExamples(tmp_path / "data")) == 3


def test_latents_that_are_stopped_and_shared_give_the_same_bytes(tmp_path, monkeypatch):
    source = write_fastvideo(tmp_path / "source", [fastvideo_row(number) for number in range(5)])
    command = lambda name, *options: main(latents_command(source, tmp_path / name, "--normalised", "no", *options))
    assert command("whole") == 0
    add = units.UnitWriter.add

    def interrupted(self, *arguments):
        if arguments[1]["caption"] == "a seven 3":
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(units.UnitWriter, "add", interrupted)
        assert command("data") == INTERRUPTED
    for host in ("1", "0"):
        assert command("data", "--num-hosts", "2", "--host", host) == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert command("data", "--embed-captions") == 2


# ------------------------------------------------------------------------------------------------- a column of latents


@pytest.mark.parametrize("layout", ["CTHW", "THWC"])
@pytest.mark.parametrize("feature", ["lists", "Array4D"])
def test_a_column_of_latents_is_read_and_its_captions_are_embedded(tmp_path, layout, feature):
    latents = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 16)).astype(np.float32)
    stored = np.moveaxis(latents, -1, 1) if layout == "CTHW" else latents
    kind = datasets.Array4D(stored.shape[1:], "float32")
    if feature == "lists":
        kind = datasets.List(datasets.List(datasets.List(datasets.List(datasets.Value("float32")))))
    features = datasets.Features({"z": kind, "caption": datasets.Value("string")})
    rows = {"z": stored.tolist(), "caption": CAPTIONS[:3]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "source")
    command = ["latents", str(tmp_path / "source"), str(tmp_path / "data"), "--codec", "space_to_depth"]
    options = ["--text-encoder", "word_vectors", "--latents", "z", "--layout", layout, "--normalised", "yes"]
    assert main([*command, *options]) == 0
    (bucket,) = PreparedExamples(tmp_path / "data").buckets
    for number in range(3):
        np.testing.assert_array_equal(bucket[number]["latents"], latents[number])
        np.testing.assert_array_equal(bucket[number]["text"], WordVectors()([CAPTIONS[number]])[0])
    assert (tmp_path / "data/contact_sheet.png").exists()


def test_lists_that_are_no_latents_are_named(tmp_path):
    good = np.zeros((2, 4, 4, 16), np.float32).tolist()
    ragged = [*good[:1], good[1][:3]]
    rows = [{"latents": value, "caption": "a"} for value in (good, ragged, None, [], [[[[None]]]])]
    (tmp_path / "source").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, {"latents": good, "caption": None}]), tmp_path / "source/0.parquet")
    command = ["latents", str(tmp_path / "source"), str(tmp_path / "data"), "--codec", "space_to_depth"]
    options = ["--text-encoder", "word_vectors", "--layout", "THWC", "--normalised", "yes"]
    assert main([*command, *options]) == 0
    reasons = {name: reason for name, (reason, _) in rejects(tmp_path / "data").items()}
    assert reasons == {
        **{f"0.parquet row {row}": "not an example" for row in range(1, 5)},
        "0.parquet row 5": "no caption",
    }
