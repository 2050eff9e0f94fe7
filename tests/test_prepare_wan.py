"""Preparing videos with Wan's VAE and umT5: against diffusers, on several devices, stopped and resumed."""

import contextlib
import gc
import json
import shutil
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import random_wan_vae
from safetensors.numpy import save_file
from test_prepare import contents
from test_prepare_sources import fastvideo_row, write_fastvideo
from test_umt5 import WIDTH, random_umt5, train_tokenizer
from tiny_runs import tiny_config, tiny_model

import rehyat_jax
from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.video import read_clip
from rehyat_jax.generation.umt5 import UMT5TextEncoder
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.parallel import memory
from rehyat_jax.parallel.memory import free_dropped_models
from rehyat_jax.preparation import caption_embeddings, contact_sheet, units, video_encoder
from rehyat_jax.prepare import main
from rehyat_jax.train import train
from rehyat_jax.weights import save_model

# Both sum some 30 layers of float32 in other orders; tests/test_wan_vae.py has the same tolerance.
LATENT_TOLERANCE = 1e-4

LONG = ("the cat runs " * 300).strip()
CAPTIONS = {
    "0.mp4": "a cat runs",
    "1.mp4": "dogs watch",
    "2.mp4": "a cat runs",
    "3.mp4": LONG,
    "4.mp4": "dogs watch",
    "short0.mp4": "a cat runs",
    "short1.mp4": "ocean waves",
    "tiny.mp4": "a field",
}
DISTINCT = {"", *CAPTIONS.values()}

# Unit 0 is 0 to 4, with batches of two devices that are not full; unit 1 is the others.
OPTIONS = ["--codec", "wan_vae", "--text-encoder", "umt5", "--size", "5x16x32", "1x16x32", "--unit", "5"]


@pytest.fixture(scope="module")
def oracle():
    return random_wan_vae(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


@pytest.fixture(scope="module")
def models(oracle, tmp_path_factory):
    """A folder like that of a diffusers pipeline. Tests do not change it."""
    folder = tmp_path_factory.mktemp("models")
    oracle.save_pretrained(folder / "vae")
    random_umt5().save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    train_tokenizer(folder / "tokenizer" / "spiece.model")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in CAPTIONS:
        frames, height = 1 if "short" in name else 5, 8 if name == "tiny.mp4" else 16
        write_video(folder / name, rng.uniform(size=(frames, height, 32, 3)))
    rows = [json.dumps({"file": name, "caption": caption}) for name, caption in CAPTIONS.items()]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Commands see one of the eight virtual devices, and decode nothing: only `prepared` has a contact sheet."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(units, "write_contact_sheet", lambda *arguments: "")


@contextlib.contextmanager
def prompts_encoded():
    """Yields a list of the prompts' masks that umT5 encodes."""
    masks, call = [], UMT5TextEncoder.__call__

    def counted(self, ids, mask):
        masks.extend(mask)
        return call(self, ids, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UMT5TextEncoder, "__call__", counted)
        yield masks


class FirstRun(NamedTuple):
    """A data set, the prompts that were encoded, and when the VAE was loaded: prompts until then, umT5s in memory."""

    folder: Path
    prompts: int
    loaded: list[tuple[int, int]]


@pytest.fixture(scope="module")
def first_run(videos, models, tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("prepared") / "data", []
    held = rehyat_jax.load_text_encoder(models).params["token_embedding"]
    alive = lambda: sum(x.shape == held.shape and x.dtype == held.dtype for x in jax.live_arrays())
    assert alive() >= 1, "live arrays are not seen"
    gc.collect()  # models of other tests
    before, load = alive(), video_encoder.load_wan_codec
    with pytest.MonkeyPatch.context() as patch, prompts_encoded() as masks:

        def free_and_look(nbytes):
            free_dropped_models(nbytes)
            loaded.append((len(masks), alive() - before))

        def load_and_look(*arguments, **options):
            with mock.patch("rehyat_jax.weights.load.free_dropped_models", free_and_look):
                return load(*arguments, **options)

        patch.setattr("rehyat_jax.parallel.memory.WORTH_A_SEARCH", 0)
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        patch.setattr(video_encoder, "load_wan_codec", load_and_look)
        assert main([str(videos), str(folder), "--models", str(models), *OPTIONS]) == 0
    return FirstRun(folder, len(masks), loaded)


@pytest.fixture(scope="module")
def prepared(first_run):
    return first_run.folder


def results(folder):
    """The bytes of every file, except the contact sheet and the text that names it."""
    return {
        path: content for path, content in contents(folder).items() if path.stem not in ("contact_sheet", "summary")
    }


def examples(folder):
    """(description, example) of every example."""
    return [
        (bucket.description(index), bucket[index])
        for bucket in PreparedExamples(folder).buckets
        for index in range(len(bucket))
    ]


def test_latents_are_those_of_diffusers(oracle, videos, prepared):
    config, found = WanVaeConfig(), examples(prepared)
    assert [about["name"] for about, _ in found] == [
        *("short0.mp4", "short1.mp4"),
        *(f"{number}.mp4" for number in range(5)),
    ]
    for about, example in found:
        frames = 1 if "short" in about["name"] else 5
        clip = read_clip(videos / about["name"], fps=16, frames=frames, height=16, width=32)
        pixels = torch.tensor(clip[None]).permute(0, 4, 1, 2, 3) / 255 * 2 - 1
        with torch.no_grad():
            mean = oracle.encode(pixels).latent_dist.mode()[0].permute(1, 2, 3, 0).numpy()
        expected = (mean - np.array(config.latents_mean)) / np.array(config.latents_std)
        assert example["latents"].shape == expected.shape == ((frames + 3) // 4, 2, 4, 16)
        assert np.abs(example["latents"] - expected).max() < LATENT_TOLERANCE, about["name"]


@pytest.mark.filterwarnings("ignore:prompt 'the cat runs")
def test_text_is_that_of_the_encoder(models, prepared):
    encode = rehyat_jax.load_text_encoder(models).for_prompts()
    for about, example in examples(prepared):
        assert about["caption"] == CAPTIONS[about["name"]]
        np.testing.assert_array_equal(example["text"], encode([about["caption"]])[0])
    np.testing.assert_array_equal(PreparedExamples(prepared).null_text, encode([""])[0])


def test_captions_of_a_table_of_latents_are_embedded_and_latents_normalised(models, prepared, tmp_path):
    source = write_fastvideo(tmp_path / "source", [fastvideo_row(0, caption="a cat runs")], null_text=False)
    command = ["latents", str(source), str(tmp_path / "data"), "--codec", "wan_vae", "--text-encoder", "umt5"]
    options = ["--models", str(models), "--normalised", "no", "--embed-captions"]
    assert main([*command, *options]) == 0
    ((about, example),) = examples(tmp_path / "data")
    expected = {found["caption"]: video["text"] for found, video in examples(prepared)}
    np.testing.assert_array_equal(example["text"], expected[about["caption"]])
    null_text = PreparedExamples(tmp_path / "data").null_text
    np.testing.assert_array_equal(null_text, PreparedExamples(prepared).null_text)
    config = json.loads((models / "vae/config.json").read_text())
    stored = np.moveaxis(np.frombuffer(fastvideo_row(0)["vae_latent_bytes"], np.float32).reshape(16, 2, 4, 6), 0, -1)
    normalised = (stored - np.float32(config["latents_mean"])) / np.float32(config["latents_std"])
    np.testing.assert_array_equal(example["latents"], normalised)


def test_summary_names_captions_that_were_cut_and_rejected_videos(prepared):
    summary = json.loads((prepared / "summary.json").read_text())
    (note,) = summary["notes"]
    assert (note["name"], note["note"]) == ("3.mp4", "caption cut") and "only the first 512" in note["detail"]
    assert [(reject["name"], reject["reason"]) for reject in summary["rejects"]] == [("tiny.mp4", "too small")]
    told = (prepared / "summary.txt").read_text()
    assert "caption cut: 1, named in summary.json" in told and "a few of them: contact_sheet.png" in told
    assert (prepared / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not (prepared / units.TEXT).exists()


def test_captions_are_encoded_once_and_their_encoder_is_freed_before_the_vae_is_loaded(first_run):
    assert first_run.prompts == len(DISTINCT)
    assert first_run.loaded == [(len(DISTINCT), 0)]


def test_two_devices_give_the_bytes_of_one(videos, models, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    with prompts_encoded() as masks:
        assert main([str(videos), str(tmp_path / "data"), "--models", str(models), *OPTIONS]) == 0
    # No caption, and the others: each group is padded to two.
    assert len(masks) == 2 + (len(DISTINCT) - 1 + 1) // 2 * 2
    assert results(tmp_path / "data") == results(prepared)


def test_a_stopped_preparation_resumes_to_the_same_bytes(videos, models, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(caption_embeddings, "GROUP", 2)
    store, add, written = caption_embeddings.CaptionEmbeddings._store, units.UnitWriter.add, []

    def stopped_store(self, *arguments):
        store(self, *arguments)
        raise KeyboardInterrupt

    def stopped_add(self, *arguments):
        written.append(arguments)
        if len(written) == 6:  # in the second unit
            raise KeyboardInterrupt
        add(self, *arguments)

    command = [str(videos), str(tmp_path / "data"), "--models", str(models), *OPTIONS]
    with prompts_encoded() as masks:
        with monkeypatch.context() as patch:
            patch.setattr(caption_embeddings.CaptionEmbeddings, "_store", stopped_store)
            assert main(command) == INTERRUPTED
        assert len(masks) == 3  # no caption, and the first group
        # What a disk may do to a file meanwhile.
        (tmp_path / "data" / units.TEXT / f"{'0' * 64}.safetensors").write_bytes(b"half")
        monkeypatch.setattr(units.UnitWriter, "add", stopped_add)
        assert main(command) == INTERRUPTED
        assert not (tmp_path / "data/dataset.json").exists()
        assert main(command) == 0
    assert len(masks) == len(DISTINCT), "a stored embedding was computed again"
    assert results(tmp_path / "data") == results(prepared)


def without(folder, part):
    shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: without(folder, "vae"), "has no safetensors file, no index of shards and no vae/"),
        (lambda folder: without(folder, "text_encoder"), "has no safetensors file"),
        (lambda folder: without(folder, "tokenizer"), "expected the text encoder's tokenizer"),
        (lambda folder: (folder / "vae/config.json").write_text("{"), "config.json"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_incomplete_models_are_refused_before_anything_is_written(videos, models, tmp_path, capsys, change, words):
    shutil.copytree(models, tmp_path / "models")
    change(tmp_path / "models")
    assert main([str(videos), str(tmp_path / "data"), "--models", str(tmp_path / "models"), *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert words in error and str(tmp_path / "models") in error
    assert not (tmp_path / "data").exists()


def test_no_models_or_a_wrong_size_are_refused(videos, models, tmp_path, capsys):
    assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 2
    assert "give --models" in capsys.readouterr().err
    command = [str(videos), str(tmp_path / "data"), "--models", str(models), *OPTIONS, "--size", "8x20x40"]
    assert main(command) == 2
    assert "nearest are 9 frames of 16x48" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("changed", ["vae", "text_encoder", "tokenizer", "dtype"])
def test_other_models_do_not_continue_a_data_set(videos, models, prepared, tmp_path, capsys, changed):
    shutil.copytree(models, tmp_path / "models")
    options = [*OPTIONS, "--dtype", "bfloat16"] if changed == "dtype" else OPTIONS
    if changed != "dtype":
        largest = max((tmp_path / "models" / changed).iterdir(), key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[-1] ^= 1
        largest.write_bytes(content)
    before = contents(prepared)
    code = main([str(videos), str(prepared), "--models", str(tmp_path / "models"), *options])
    error = capsys.readouterr().err
    assert code == 2 and contents(prepared) == before
    assert "was begun with other inputs or options" in error or (
        changed == "tokenizer" and "is not a tokenizer" in error
    )


@pytest.fixture
def free_memory(monkeypatch):
    """Sets the memory that devices seem to have."""

    def limit(bytes_free):
        for module in (memory, video_encoder, caption_embeddings):
            monkeypatch.setattr(module, "device_bytes", lambda device: bytes_free)

    monkeypatch.setattr(video_encoder, "load_wan_codec", None)  # no weights are read
    return limit


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (
            2_100_000_000,
            "--size 81x480x832: codec wan_vae: needs at least 8.08 GB of memory of cpu, found 2.1 GB free; "
            "choose smaller videos (--size 81x240x416 would fit)",
        ),
        (1000, "found 1e-06 GB free; use devices with more memory"),
    ],
)
def test_videos_that_do_not_fit_are_refused_with_a_size_that_does(
    videos, models, tmp_path, capsys, monkeypatch, free_memory, free, words
):
    sizes = dict(argument_size_in_bytes=0, output_size_in_bytes=0, temp_size_in_bytes=20_000 * 480 * 832)
    program = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))
    monkeypatch.setattr(video_encoder.VaeEncoder, "_program", lambda self, size: program)
    free_memory(free)
    options = [*OPTIONS, "--size", "81x480x832"]
    assert main([str(videos), str(tmp_path / "data"), "--models", str(models), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_text_encoder_that_does_not_fit_is_refused(videos, models, tmp_path, capsys, monkeypatch, free_memory):
    monkeypatch.setattr(video_encoder.VaeEncoder, "check", lambda self, sizes: None)
    free_memory(1000)
    assert main([str(videos), str(tmp_path / "data"), "--models", str(models), *OPTIONS]) == 2
    assert "text encoder umt5: needs at least" in capsys.readouterr().err


def test_bfloat16_changes_latents_a_little(videos, models, prepared):
    encoder = video_encoder.VaeEncoder("wan_vae", models, "bfloat16")
    about, example = examples(prepared)[-1]
    clip = read_clip(videos / about["name"], fps=16, frames=5, height=16, width=32)
    error = np.abs(np.asarray(encoder(clip[None]))[0] - example["latents"])
    # One rounding of bfloat16 is 2^-8 of a value; some 30 layers make it several times that, here 1e-2 on average.
    assert 1e-4 < error.mean() < 3e-2


def test_training_reads_the_result(prepared, tmp_path):
    config = WAN_PRESETS["tiny"].replace(
        num_layers=1, ffn_dim=32, num_heads=1, head_dim=24, text_dim=WIDTH, text_length=512
    )
    _, params = tiny_model(config)
    save_model(tmp_path / "model", config, params, codec="wan_vae", text_encoder="umt5")
    changes = {"init_from": str(tmp_path / "model"), "data.source": "prepared", "data.path": str(prepared)}
    run = tiny_config("finetune", steps=1, batch_size=2, **changes, **{"optimizer.warmup_steps": 0})
    train(run, tmp_path / "run", jax.devices()[:1])
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])
    assert jnp.dtype(run.dtype) == jnp.float32


def test_the_contact_sheet_of_latents_from_elsewhere_needs_the_codecs_weights(models, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "write_contact_sheet", contact_sheet.write_contact_sheet)
    source = tmp_path / "source"
    source.mkdir()
    text = np.zeros((4, WIDTH), np.float32)
    save_file({"latents": np.ones((2, 2, 4, 16), np.float32), "text": text}, source / "a.safetensors")
    save_file({"text": text}, source / "null_text.safetensors")
    command = ["latents", str(source), "--codec", "wan_vae", "--text-encoder", "umt5"]
    assert main([*command, str(tmp_path / "without")]) == 0
    assert "no contact sheet: codec 'wan_vae': has weights" in (tmp_path / "without" / "summary.txt").read_text()
    assert main([*command, str(tmp_path / "with"), "--models", str(models)]) == 0
    assert (tmp_path / "with" / "contact_sheet.png").is_file()
