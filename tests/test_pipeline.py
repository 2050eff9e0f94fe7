"""A tiny pipeline of random weights from prompts to videos, against diffusers' `WanPipeline`; folders and errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from flax import nnx
from oracles import random_wan, random_wan_vae
from safetensors.torch import load_file, save_file
from test_sample_cli import save_random_model
from test_umt5 import original_name, random_umt5, train_tokenizer
from transformers import T5Tokenizer, T5TokenizerFast
from videos import read_mp4

import rehyat_jax
from rehyat_jax import Pipeline, SamplingOptions, prepare
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import read_settings
from rehyat_jax.generation import hub
from rehyat_jax.generation import pipeline as pipelines
from rehyat_jax.generation.hub import open_models
from rehyat_jax.generation.needs import decoder_bytes, text_encoder_bytes, transformer_bytes
from rehyat_jax.models.umt5.config import UMT5_PRESETS
from rehyat_jax.parallel import memory
from rehyat_jax.parallel.memory import free_dropped_models
from rehyat_jax.preparation.video_encoder import VaeEncoder
from rehyat_jax.sample import main, parse_arguments
from rehyat_jax.weights.conversion import convert_from_torch
from rehyat_jax.weights.models import VAES
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint, write_torch_checkpoint

STEPS, SHIFT, GUIDANCE = 5, 3.0, 4.0
FRAMES, HEIGHT, WIDTH = 5, 32, 48
SIZE = dict(frames=FRAMES, height=HEIGHT, width=WIDTH)
PROMPTS = ["a cat runs across the green field", "waves"]
NEGATIVE = "dogs"

PIXEL_TOLERANCE = 1e-3
"""Pixels are in [0, 1]. A level of uint8, in which ours are stored, is 4e-3: rounding is compared separately."""


class OnWansGrid:
    """Makes a scheduler of diffusers use the grid of Wan's own code, which `wan_grid` is tested to be."""

    def set_timesteps(self, steps, device=None, **options):
        super().set_timesteps(steps, device=device, **options)
        grid = wan_grid(steps, SHIFT)
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32)
        self.timesteps = torch.tensor(grid.timesteps, dtype=self.timesteps.dtype)


class UniPC(OnWansGrid, UniPCMultistepScheduler):
    pass


class Euler(OnWansGrid, FlowMatchEulerDiscreteScheduler):
    pass


UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def save_random_pipeline(path: Path) -> WanPipeline:
    """Writes the folder of a tiny pipeline to path/folder, as diffusers does."""
    train_tokenizer(path / "spiece.model")
    T5Tokenizer.from_pretrained(path, extra_ids=0).save_pretrained(path / "their_tokenizer")
    tokenizer = T5TokenizerFast.from_pretrained(path / "their_tokenizer", extra_ids=0)
    models = dict(text_encoder=random_umt5(), vae=random_wan_vae(), transformer=random_wan())
    pipeline = WanPipeline(tokenizer, scheduler=UniPCMultistepScheduler(**UNIPC), **models)
    pipeline.save_pretrained(path / "folder")
    return pipeline


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[WanPipeline, Path]:
    """diffusers' pipeline, and its folder. Tests do not change it."""
    path = tmp_path_factory.mktemp("pipeline")
    return save_random_pipeline(path), path / "folder"


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    """A copy of the folder that a test may change."""
    return shutil.copytree(theirs[1], tmp_path / "pipeline")


def options(**changes) -> SamplingOptions:
    small = dict(steps=STEPS, guidance_scale=GUIDANCE, negative_prompt=NEGATIVE, dtype="float32", batch=2)
    return SamplingOptions(**SIZE | small | changes)


def their_videos(pipeline: WanPipeline, noise: np.ndarray) -> np.ndarray:
    """[B, frames, height, width, 3] in [0, 1]."""
    latents = torch.from_numpy(noise.copy()).permute(0, 4, 1, 2, 3)
    size = dict(height=HEIGHT, width=WIDTH, num_frames=FRAMES)
    run = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=latents, output_type="np")
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(PROMPTS, [NEGATIVE] * len(PROMPTS), **size, **run).frames


def their_pixels(vae: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    """[B, frames, height, width, 3] in [0, 1] from normalised latents."""
    mean, std = (torch.tensor(values).float() for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        video = vae.decode((torch.from_numpy(latents.copy()) * std + mean).permute(0, 4, 1, 2, 3)).sample
    return (video.clip(-1, 1).permute(0, 2, 3, 4, 1).numpy() + 1) / 2


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_videos_are_those_of_diffusers_pipeline(theirs, sampler, monkeypatch):
    pipeline, folder = theirs
    scheduler = UniPC(**UNIPC) if sampler == "unipc" else Euler(shift=SHIFT)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    ours = Pipeline.from_pretrained(folder, options(sampler=sampler))
    noise = ours.noise(range(2))
    expected = their_videos(pipeline, noise)
    *text, negative_text = ours.embed([*PROMPTS, NEGATIVE])
    latents = ours.sample_latents(np.stack(text), np.stack([negative_text] * 2), noise)
    found = np.asarray(ours.codec().decode(latents))
    assert found.shape == expected.shape == (2, FRAMES, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.1, "the videos have contrast"
    assert np.abs(found - expected).max() < PIXEL_TOLERANCE
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    # The frames that are written are these, rounded to the nearest of 255 levels.
    assert np.abs(np.concatenate(list(ours.frames(latents)), axis=1) / 255 - found).max() < 0.5 / 255 + 1e-6
    # The scheduler's own shift is the default.
    assert ours.options.flow_shift == SHIFT


def test_large_frames_are_decoded_in_the_tiles_of_diffusers(theirs, monkeypatch):
    ours = Pipeline.from_pretrained(theirs[1], options(vae_tile=32, batch=1))
    latents = ours.noise([0])
    whole = their_pixels(theirs[0].vae, latents)
    with monkeypatch.context() as patch:
        # As `enable_tiling` sets them; the fixture is shared.
        names = ("tile_sample_min_height", "tile_sample_min_width")
        strides = ("tile_sample_stride_height", "tile_sample_stride_width")
        for name, value in {"use_tiling": True, **dict.fromkeys(names, 32), **dict.fromkeys(strides, 24)}.items():
            patch.setattr(theirs[0].vae, name, value)
        expected = their_pixels(theirs[0].vae, latents)
    assert np.abs(expected - whole).max() > 0.01, "tiles make a difference"
    found = np.concatenate(list(ours.frames(latents)), axis=1)
    assert np.abs(found / 255 - expected).max() < 0.5 / 255 + PIXEL_TOLERANCE
    assert ours.settings["vae_tile"] == 32


def test_a_mesh_gives_the_same_videos(theirs):
    alone = Pipeline.from_pretrained(theirs[1], options())(PROMPTS)
    assert alone.shape == (2, FRAMES, HEIGHT, WIDTH, 3) and alone.dtype == np.uint8
    ours = Pipeline.from_pretrained(theirs[1], options(mesh=(("data", 4), ("tensor", 2))))
    # Sums in another order, before rounding to 255 levels.
    assert np.abs(alone.astype(int) - ours(PROMPTS)).max() <= 1
    # The text encoder is sharded over all devices that its sizes allow, whatever the mesh of the transformer.
    assert ours._text_mesh().shape == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    with jax.set_mesh(ours._text_mesh()):
        encoder = ours._load_text_encoder(progress=False)
    largest = max(jax.tree.leaves(encoder._encoder.params), key=lambda leaf: leaf.size)
    assert largest.dtype == jax.numpy.bfloat16 and largest.addressable_shards[0].data.size == largest.size // 8


def test_parts_take_turns_in_memory(theirs, monkeypatch):
    def sizes() -> set[tuple[int, ...]]:
        return {array.shape for array in jax.live_arrays()}

    ours = Pipeline.from_pretrained(theirs[1], options())
    embedding, feed_forward, convolution = (96, 48), (2, 64, 112), (3, 3, 3, 32, 32)
    seen = {}
    watch = lambda name: seen.setdefault(name, sizes())
    load, hold = ours._load_text_encoder, ours._hold
    monkeypatch.setattr("rehyat_jax.parallel.memory.WORTH_A_SEARCH", 0)
    monkeypatch.setattr(ours, "_load_text_encoder", lambda progress: (load(progress), watch("text encoder"))[0])
    monkeypatch.setattr(ours, "_hold", lambda part, *more: (hold(part, *more), watch(part))[0])
    free_dropped_models(0)  # those of other tests
    assert not {embedding, feed_forward, convolution} & sizes()
    ours(PROMPTS)
    assert {embedding, feed_forward, convolution} & seen["text encoder"] == {embedding}
    assert {embedding, feed_forward, convolution} & seen["transformer"] == {feed_forward}
    assert {embedding, feed_forward, convolution} & seen["VAE"] == {convolution}
    ours.free("VAE")
    assert not {embedding, feed_forward, convolution} & sizes()


# ------------------------------------------------------------------------------------------------------------- folders


def as_original(folder: Path, place: Path) -> Path:
    """The files of a diffusers pipeline in the layout of Wan's original repositories, as safetensors."""
    place.mkdir()
    for file in (folder / "transformer").iterdir():
        shutil.copy(file, place)
    vae = open_torch_checkpoint(folder / "vae", specs=VAES)
    (place / "written").mkdir()
    write_torch_checkpoint(place / "written", vae, "original")
    (place / "written" / "diffusion_pytorch_model.safetensors").rename(place / "Wan2.1_VAE.safetensors")
    (place / "written").rmdir()
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text.pop("encoder.embed_tokens.weight", None)
    save_file({original_name(name): t for name, t in text.items()}, place / "models_t5_umt5-xxl-enc-bf16.safetensors")
    shutil.copytree(folder / "tokenizer", place / "google" / "umt5-xxl")
    return place


def test_original_folder_and_student_have_the_same_weights(theirs, tmp_path):
    _, folder = theirs

    def weights(pipeline):
        encoder = pipeline._load_text_encoder(progress=False)
        transformer = nnx.to_pure_dict(nnx.state(pipeline.transformer()))
        return transformer, pipeline.codec().vae.params, encoder._encoder.params

    def assert_same(pipeline):
        jax.tree.map(np.testing.assert_array_equal, weights(pipeline), expected)

    expected = weights(Pipeline.from_pretrained(folder, options()))
    original = Pipeline.from_pretrained(as_original(folder, tmp_path / "original"), options())
    assert_same(original)
    assert original.options.flow_shift == 5
    prepared = VaeEncoder("wan_vae", tmp_path / "original", "float32").codec().vae.params
    jax.tree.map(np.testing.assert_array_equal, prepared, expected[1])
    # A converted checkpoint, as a student is one, names its pipeline; another one can be given.
    convert_from_torch(folder / "transformer", tmp_path / "named", models=str(folder))
    convert_from_torch(folder / "transformer", tmp_path / "nameless")
    for student, models in ((tmp_path / "named", None), (tmp_path / "nameless", folder), (folder, None)):
        ours = Pipeline.from_pretrained(models, options(), student=student)
        assert_same(ours)
        assert ours.settings["transformer"] == str(student) and ours.settings["models"] == str(folder)
    with pytest.raises(InputError, match="codec 'wan_vae': has weights, and no folder"):
        Pipeline.from_pretrained(student=tmp_path / "nameless")


def test_a_pickle_in_an_original_folder_is_refused_with_the_command_that_converts_it(theirs, tmp_path):
    original = as_original(theirs[1], tmp_path / "original")
    (original / "Wan2.1_VAE.safetensors").rename(original / "Wan2.1_VAE.pth")
    with pytest.raises(InputError, match=r"Wan2.1_VAE.pth: is a PyTorch pickle .*python -c .*Wan2.1_VAE.safetensors"):
        Pipeline.from_pretrained(original, options())


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(part):
    return lambda folder: shutil.rmtree(folder / part)


def indexed(**changes):
    return lambda folder: change_json(folder / "model_index.json", **changes)


def wrong_encoder(folder):
    change_json(folder / "transformer" / "config.json", text_dim=64)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "condition_embedder.text_embedder.linear_1.weight"
    tensors[name] = torch.zeros(tensors[name].shape[0], 64)
    save_file(tensors, file)


def eight_bits(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)


def gguf(folder):
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "wan2.1-t2v-Q4_0.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("vae"), r"expected Wan2.1's VAE in vae/ or Wan\*_VAE.safetensors, found neither; get the complete"),
        (without("text_encoder"), r"expected the umT5 text encoder in text_encoder/ or models_t5_\*.safetensors"),
        (without("tokenizer"), r"expected the text encoder's tokenizer"),
        (without("transformer"), r"no transformer/; give another folder"),
        (indexed(_class_name="WanImageToVideoPipeline"), "should be 'WanPipeline', found 'WanImageToVideoPipeline'"),
        (indexed(_class_name=["WanPipeline"]), r"should be 'WanPipeline', found \['WanPipeline'\]"),
        (indexed(transformer_2=["diffusers", "WanTransformer3DModel"]), "has a transformer_2, expected one"),
        (indexed(expand_timesteps=True), "expand_timesteps should be false, found True"),
        (indexed(vae=["diffusers", "AutoencoderKL"]), "vae should be a AutoencoderKLWan, found AutoencoderKL"),
        (indexed(text_encoder=[None, None]), "text_encoder should be a UMT5EncoderModel, found None"),
        (wrong_encoder, "expected text_dim 48 .* its text encoder 'umt5' from .*text_encoder makes, found 64"),
        (eight_bits, r"vae/diffusion_pytorch_model.safetensors: tensor .* has dtype F8_E4M3 \(fp8"),
        (gguf, r"transformer: expected safetensors, found only GGUF files \(wan2.1-t2v-Q4_0.gguf\)"),
        (
            lambda folder: change_json(folder / "scheduler" / "scheduler_config.json", flow_shift="3"),
            "scheduler_config.json: flow_shift should be a number from 0.001 to 1000, found '3'",
        ),
    ],
)
def test_missing_and_foreign_parts_are_explained_before_any_is_loaded(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(folder, options())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(frames=80), "expected 4n . 1 frames.* nearest are 81 frames of 32x48"),
        (dict(frames=7), "nearest are 9 frames"),
        (dict(frames=6), "nearest are 5 frames"),
        (dict(height=470), "multiples of 16; nearest are 5 frames of 464x48"),
        (dict(stream=True), "blocks 0, 1: expected hybrid attention in every block, found softmax"),
        (dict(longest=5), "--longest 5: expected with --stream"),
        (dict(mesh=(("data", 3),)), "does not make 8 devices"),
    ],
)
def test_options_that_do_not_fit_the_pipeline_are_explained(theirs, wrong, message):
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(theirs[1], options(**wrong))


# ----------------------------------------------------------------------------------------------------------------- hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(theirs, tmp_path, monkeypatch) -> Path:
    """The Hub's cache on a machine without network, with one repository in it."""
    repository = tmp_path / "hub" / "models--someone--Tiny-Wan"
    shutil.copytree(theirs[1], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_its_cached_folder_with_its_commit(cache):
    for name in ("someone/Tiny-Wan", "someone/Tiny-Wan@main", f"someone/Tiny-Wan@{COMMIT}"):
        models = open_models(name)
        assert models.name == name and models.revision == COMMIT
        assert models.folder == cache / "models--someone--Tiny-Wan" / "snapshots" / COMMIT
    settings = Pipeline.from_pretrained("someone/Tiny-Wan", options()).settings
    assert (settings["models"], settings["revision"]) == ("someone/Tiny-Wan", COMMIT)


def test_pickles_are_not_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **o: asked.update(o, name=name) or tmp_path)
    open_models("someone/Tiny-Wan@v1")
    assert asked == {"name": "someone/Tiny-Wan", "revision": "v1", "allow_patterns": list(hub.FILES)}
    assert not [pattern for pattern in hub.FILES if pattern.endswith((".bin", ".pth", ".pt", "*"))]


@pytest.mark.parametrize("name", ["someone/Other", "someone/Tiny-Wan@v2", "some--one/Tiny..Wan"])
def test_without_a_network_the_error_says_what_to_do(cache, name):
    with pytest.raises(InputError, match=r"could not be fetched .*`hf download .* --local-dir FOLDER`.* give its path"):
        open_models(name)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at-all", "a/b/c", "owner/name@", ""])
def test_a_path_that_does_not_exist_is_explained(name):
    with pytest.raises(InputError, match="does not exist; give a folder of models, or a Hub name such as owner/name"):
        open_models(name)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "transformer",
            r"--batch 4 --frames 41 --height 512 --width 512: needs .* free; each of these alone would fit: --dtype "
            r"bfloat16, a mesh of 8 devices, --batch 2, --frames 21, --size 256x256",
        ),
        (
            "VAE",
            r"--width 512: the VAE: needs .* would fit: --vae-dtype bfloat16, --vae-tile 256, a mesh of 8 devices, "
            r"--batch 2, --size 256x256",
        ),
        ("text encoder", r"--width 512: the text encoder: needs .* would fit: a mesh of 8 devices$"),
    ],
)
def test_too_much_is_refused_before_loading_with_what_would_fit(theirs, monkeypatch, part, message):
    monkeypatch.setattr(pipelines, "load_module", None)
    large, needs = options(frames=41, height=512, width=512, batch=4), Pipeline._needs
    ours = Pipeline.from_pretrained(theirs[1], large)
    needed = ours._needs(ours.options, ours.latent_shape, 1)
    assert set(needed) == {"transformer", "text encoder", "VAE"}
    # As on an accelerator of which every device has a little less memory than the part needs.
    free = needed[part] - 1
    monkeypatch.setattr(Pipeline, "_needs", lambda *given: {part: needs(*given)[part]})
    monkeypatch.setattr(pipelines, "fits_device", lambda needed, devices=1: needed <= free)
    monkeypatch.setattr(memory, "device_bytes", lambda device: free)
    with pytest.raises(InputError, match=message):
        Pipeline.from_pretrained(theirs[1], large)


def test_estimates_of_published_sizes_are_those_of_their_files():
    # 5.68e9 parameters in bfloat16.
    assert text_encoder_bytes(UMT5_PRESETS["umt5-xxl"]) == 2 * 5_680_910_336
    shape = (21, 60, 104, 16)
    wan = rehyat_jax.WAN_PRESETS["t2v-1.3B"]
    weights = transformer_bytes(wan, (1, 2, 2, 16), videos=1, evaluated=1, dtype="bfloat16")
    assert 2 * 1_418_996_800 < weights < 2.2 * 1_418_996_800
    # Two videos of 32,760 tokens, each with its input and a hidden layer of 8,960, in bfloat16.
    sampled = transformer_bytes(wan, shape, videos=1, evaluated=2, dtype="bfloat16")
    assert sampled - weights == pytest.approx(2 * 2 * 32_760 * (1536 + 8960), rel=0.1)
    # 126,892,531 parameters, 3.8 GB that convolutions remember, and 1.2 GB around the largest one, all in float32.
    decoded = decoder_bytes(rehyat_jax.WAN_VAE_PRESETS["wan2.1"], shape, videos=1, dtype=np.dtype(np.float32))
    assert decoded == pytest.approx(0.5e9 + 3.8e9 + 1.2e9, rel=0.1)


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A checkpoint whose codec and text encoder have no weights, for tests of the command alone."""
    return save_random_model(tmp_path_factory.mktemp("demo") / "model")


def line(folder: Path | None, **changes) -> list[str]:
    small = dict(models=folder, steps=2, size=f"{HEIGHT}x{WIDTH}", frames=FRAMES, dtype="float32")
    given = {name: value for name, value in (small | changes).items() if value is not None}
    text = []
    for name, value in given.items():
        text += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, [value]))]
    return text


def test_a_prompt_becomes_a_video_with_its_settings(theirs, tmp_path, capsys):
    out = tmp_path / "new" / "cat.mp4"
    more = dict(seed=3, negative_prompt="dogs", contact_sheet=True, keep_latents=True)
    assert main(line(theirs[1], prompt=PROMPTS[0], out=out, **more)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {out}: {FRAMES} frames of {HEIGHT}x{WIDTH}, enlarged 7 times\n"
    assert "sampling: 100%" in captured.err
    video, fps = read_mp4(out)
    assert video.shape == (FRAMES, 7 * HEIGHT, 7 * WIDTH, 3) and fps == 16
    settings = read_settings(out)
    expected = dict(prompt=PROMPTS[0], negative_prompt="dogs", seed=3, noise=0, steps=2, guidance_scale=5.0)
    expected |= dict(flow_shift=SHIFT, sampler="unipc", **SIZE, dtype="float32", models=str(theirs[1]), fps=16)
    assert expected.items() <= settings.items()
    assert settings["program"].startswith("rehyat_jax ")
    assert sorted(path.name for path in out.parent.iterdir()) == ["cat.mp4", "cat.png", "cat.safetensors"]
    # --show prints them, and the latents give the same video later.
    assert main(["--show", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == settings
    again = dict(latents=out.with_suffix(".safetensors"), out=tmp_path / "again.mp4", steps=None, contact_sheet=True)
    assert main(line(theirs[1], **again)) == 0
    assert (tmp_path / "again.png").read_bytes() == out.with_suffix(".png").read_bytes()
    # x264 may encode the same frames in other ways.
    assert np.abs(read_mp4(tmp_path / "again.mp4")[0] - video.astype(float)).mean() < 2
    assert read_settings(tmp_path / "again.mp4") == settings


def test_a_stopped_prompt_file_is_resumed_at_the_next_video(demo, tmp_path, capsys, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("a cat\n\nwaves\n a  dog \n")
    command = line(None, checkpoint=demo, prompts=prompts, out=out, steps=1, size="8x16")
    frames = Pipeline.frames

    def stopped(self, latents, **more):
        if (out / "00000.mp4").exists():
            yield next(frames(self, latents, **more))
            raise KeyboardInterrupt
        yield from frames(self, latents, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "frames", stopped)
        assert main(command) == 130
    assert sorted(path.name for path in out.iterdir()) == ["00000.mp4"]
    first = (out / "00000.mp4").stat().st_mtime_ns
    # Two hosts share the rest.
    for host in (0, 1):
        assert main([*command, "--num-hosts", "2", "--host", str(host)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"0000{number}.mp4" for number in range(3)]
    assert [read_settings(out / f"0000{n}.mp4")["prompt"] for n in range(3)] == ["a cat", "waves", "a dog"]
    assert (out / "00000.mp4").stat().st_mtime_ns == first
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == "3 of 3 videos are finished already\n"
    assert main([*command, "--seed", "1"]) == 2
    assert "00000.mp4: was made with seed '0', expected '1'; remove it" in capsys.readouterr().err
    prompts.write_text("a dog\n")
    assert main(command) == 2
    assert "was made with prompt 'a cat', expected 'a dog'" in capsys.readouterr().err


def test_seeds_give_a_video_each(demo, tmp_path):
    small = dict(checkpoint=demo, size="8x16", steps=1)
    command = line(None, **small, prompt="waves", out=tmp_path / "a.mp4", batch=2)
    assert main([*command, "--seeds", "1", "2", "3"]) == 0
    settings = [read_settings(tmp_path / f"a_{number}.mp4") for number in range(3)]
    assert [(own["seed"], own["noise"]) for own in settings] == [(1, 0), (2, 0), (3, 0)]
    assert main(line(None, **small, prompt="waves", out=tmp_path / "b.mp4", seed=3)) == 0
    difference = read_mp4(tmp_path / "a_2.mp4")[0].astype(int) - read_mp4(tmp_path / "b.mp4")[0]
    # A grey level for another order of summation before the encoder, which spreads it.
    assert np.abs(difference).max() <= 2


def test_empty_and_long_prompts_are_told(theirs, demo, tmp_path, capsys, monkeypatch):
    small = dict(checkpoint=demo, size="8x16", steps=1)
    assert main(line(None, **small, prompt=" ", out=tmp_path / "a.mp4")) == 0
    assert "warning: --prompt is empty; the video will follow no text" in capsys.readouterr().err
    # Of the other parts, only their place in the command is needed here.
    monkeypatch.setattr(Pipeline, "sample_latents", lambda self, text, negative, noise, **more: noise)
    monkeypatch.setattr(Pipeline, "frames", lambda self, latents, **more: iter([np.zeros((1, 5, 16, 16, 3), np.uint8)]))
    assert main(line(theirs[1], prompt="the cat runs " * 300, out=tmp_path / "b.mp4", steps=1)) == 0
    error = capsys.readouterr().err
    assert "warning: prompt 'the cat runs" in error and "only the first 512 are used; shorten it" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompt="a", out="a.gif"), "--out a.gif: expected a file name that ends in .mp4"),
        (dict(prompts="prompts.txt", out="a.mp4"), "--out a.mp4: expected a folder with --prompts"),
        (dict(prompts="missing.txt", out="a"), "missing.txt: expected a text file with one prompt a line"),
        (dict(prompts="empty.txt", out="a"), "empty.txt: expected one prompt a line, found none"),
        (dict(prompt="a", out="a.mp4", height=32), "--size: expected without --height and --width"),
        (dict(latents="prompts.txt", out="a.mp4"), "prompts.txt: expected latents [T, H, W, C] float32"),
        (dict(prompt="a", out="a.mp4", models="nowhere/at"), "nowhere/at: is no folder here, and could not be fetched"),
        (dict(prompt="a", out="/proc/a/b.mp4"), "/proc/a/b.mp4: cannot be written"),
        (dict(prompts="prompts.txt", out="/proc/a"), "/proc/a/00000.mp4: cannot be written"),
    ],
    ids=lambda value: "".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_wrong_input_is_explained_and_nothing_is_loaded(cache, theirs, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "load_module", None)
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main(line(theirs[1], **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--out", "a.mp4"], "one of the arguments --models --checkpoint is required"),
        (["--models", "m", "--out", "a.mp4"], "one of the arguments --prompt --prompts --latents --show is required"),
        (["--models", "m", "--prompt", "a"], "the following arguments are required: --out"),
        (["--models", "m", "--prompts", "p", "--out", "o", "--host", "1"], "--host: expected 0 to 0, found 1"),
        (["--models", "m", "--prompt", "a", "--prompts", "p"], "not allowed with argument --prompt"),
        (["--models", "m", "--prompt", "a", "--size", "480"], "expected 480p, 720p or HEIGHTxWIDTH"),
    ],
)
def test_incomplete_command_lines_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_named_sizes():
    for name, size in {"480p": (480, 832), "720p": (720, 1280), "64x96": (64, 96)}.items():
        given = SamplingOptions.from_arguments(parse_arguments(["--show", "a", "--size", name]))
        assert (given.height, given.width) == size
    assert dataclasses.replace(given, height=None, width=None) == SamplingOptions()


def test_trajectories_of_a_teacher_have_the_embeddings_of_its_pipeline(theirs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = ["--steps", "1", "--keep", "1", "--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--batch", "2"]
    command = ["teacher-trajectories", str(theirs[1] / "transformer"), str(tmp_path / "data"), *small]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--dtype", "float32"]
    assert prepare.main(command) == 2
    assert "codec 'wan_vae': has weights, and no folder of them was given; give --models" in capsys.readouterr().err
    assert prepare.main([*command, "--models", str(theirs[1])]) == 0
    assert "a few of them: contact_sheet.png" in capsys.readouterr().out
    examples = PreparedExamples(tmp_path / "data")
    assert (examples.codec, examples.text_encoder) == ("wan_vae", "umt5")
    expected = Pipeline.from_pretrained(theirs[1], options()).embed([*PROMPTS, ""])
    (bucket,) = examples.buckets
    for number in range(2):
        np.testing.assert_array_equal(bucket[number]["text"], expected[number])
        assert bucket[number]["latents"].shape == (2, 4, 6, 16)
