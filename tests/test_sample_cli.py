"""The sampling command on a small model checkpoint of random weights, as a user would run it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from videos import read_mp4

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.files import mp4
from rehyat_jax.files.mp4 import NoEncoder, open_video, read_settings
from rehyat_jax.generation import pipeline as pipelines
from rehyat_jax.generation import video_files
from rehyat_jax.generation.latents_file import read_latents
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.parallel import memory
from rehyat_jax.sample import main
from rehyat_jax.weights import save_model

CONFIG = WanConfig(num_heads=1, head_dim=12, ffn_dim=16, num_layers=1, text_dim=64, text_length=8, freq_dim=16)


def save_random_model(path, *, config=CONFIG, codec="space_to_depth", text_encoder="word_vectors", scale=0.3, **more):
    _, shapes = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)

    def random(node):
        if isinstance(node, dict):
            return {name: random(child) for name, child in node.items()}
        return scale * rng.normal(size=node.shape).astype(np.float32)

    save_model(path, config, random(nnx.to_pure_dict(shapes)), codec=codec, text_encoder=text_encoder, **more)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def arguments(checkpoint, out, **options):
    """A command line for a small video; three steps, because UniPC of fewer samples as Euler does."""
    small = {"prompt": "a seven moves sideways", "steps": 3, "frames": 2, "height": 8, "width": 16}
    options = {"checkpoint": checkpoint, "out": out, **small, **options}
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def pixels(path):
    """float64 [frames, height, width, 3], 0 to 255."""
    return read_mp4(path)[0].astype(float)


def test_writes_a_video_of_the_asked_size(checkpoint, tmp_path):
    out = tmp_path / "new" / "seven.mp4"
    assert main(arguments(checkpoint, out)) == 0
    # 8 pixels high is enlarged 30 times, to 240.
    video, fps = read_mp4(out)
    assert video.shape == (2, 240, 480, 3) and fps == 16


def test_size_defaults_to_the_codecs(checkpoint, tmp_path):
    line = ["--checkpoint", str(checkpoint), "--prompt", "a two", "--steps", "1", "--out", str(tmp_path / "two.mp4")]
    assert main(line) == 0
    assert pixels(tmp_path / "two.mp4").shape == (21, 240, 240, 3)


def test_the_seed_decides_the_video_and_a_batch_has_different_ones(checkpoint, tmp_path):
    for name, options in {"a": {"batch": 2}, "b": {}, "c": {"seed": 1}}.items():
        assert main(arguments(checkpoint, tmp_path / f"{name}.mp4", **options)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_0.mp4", "a_1.mp4", "b.mp4", "c.mp4"]
    first, second, same, other = (pixels(tmp_path / f"{name}.mp4") for name in ("a_0", "a_1", "b", "c"))
    # One grey level for a rounding before the encoder; different noise moves the average pixel far more.
    assert np.abs(first - same).max() <= 1
    assert np.abs(first - second).mean() > 10
    assert np.abs(first - other).mean() > 10


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler"},
        {"guidance_scale": 1},
        {"flow_shift": 1},
        {"steps": 4},
        {"negative_prompt": "a two"},
        {"prompt": "a two"},
        {"dtype": "bfloat16"},
    ],
    ids=lambda options: "".join(options),
)
def test_every_option_reaches_the_sampler(checkpoint, tmp_path, options):
    assert main(arguments(checkpoint, tmp_path / "default.mp4")) == 0
    assert main(arguments(checkpoint, tmp_path / "changed.mp4", **options)) == 0
    assert np.any(pixels(tmp_path / "default.mp4") != pixels(tmp_path / "changed.mp4"))


def test_a_video_cut_over_devices_is_the_same(checkpoint, tmp_path):
    assert main(arguments(checkpoint, tmp_path / "one.mp4")) == 0
    assert main([*arguments(checkpoint, tmp_path / "eight.mp4"), "--mesh", "data=2", "context=4"]) == 0
    # A grey level for another order of summation before the encoder.
    assert np.abs(pixels(tmp_path / "one.mp4") - pixels(tmp_path / "eight.mp4")).max() <= 1


def test_a_streamed_video_is_the_same(student, tmp_path, capsys):
    model = student
    assert main(arguments(model, tmp_path / "whole.mp4", frames=11)) == 0
    assert main([*arguments(model, tmp_path / "parts.mp4", frames=11), "--stream"]) == 0
    # A grey level for another order of summation before the encoder.
    assert np.abs(pixels(tmp_path / "whole.mp4") - pixels(tmp_path / "parts.mp4")).max() <= 1
    capsys.readouterr()
    assert main([*arguments(model, tmp_path / "sharded.mp4"), "--stream", "--mesh", "data=2", "context=4"]) == 2
    assert "--mesh context=4 --stream: expected context=1" in capsys.readouterr().err


STUDENT = CONFIG.replace(
    hybrid_blocks="all",
    hybrid=HybridConfig(chunk_frames=2, overlap_frames=1, feature_map=FeatureMapConfig(features=16)),
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("student") / "model", config=STUDENT)


@pytest.fixture(scope="module")
def by_chunk(tmp_path_factory):
    """A student that knows a noise level for every chunk."""
    return save_random_model(tmp_path_factory.mktemp("student") / "by_chunk", config=STUDENT, noise_by_chunk=True)


def test_a_video_is_continued_from_its_last_frames(student, tmp_path, capsys):
    old, new = tmp_path / "old.mp4", tmp_path / "new.mp4"
    assert main([*arguments(student, old, frames=11), "--stream"]) == 0
    command = ["--stream", "--keep-latents", "--continue"]
    assert main([*arguments(student, new, frames=3, seed=1), *command, str(old)]) == 0
    assert "new.mp4: 14 frames of 8x16, enlarged 30 times" in capsys.readouterr().out
    # The old frames, encoded once more.
    assert np.abs(pixels(new)[:11] - pixels(old)).mean() < 3
    settings = read_settings(new)
    # Four chunks of two frames are a part of the stream; the model sees one.
    assert (settings["continues"], settings["given_frames"], settings["frames"]) == (str(old), 8, 11)
    # The continuation depends on the frames before it: 1e-6 would be rounding.
    assert main([*arguments(student, tmp_path / "other.mp4", frames=11, seed=5), "--stream"]) == 0
    assert main([*arguments(student, tmp_path / "c.mp4", frames=3, seed=1), *command, str(tmp_path / "other.mp4")]) == 0
    latents, others = (read_latents(tmp_path / f"{name}.safetensors")[0] for name in ("new", "c"))
    assert latents.shape == (11, 2, 4, 16) and np.abs(latents[8:] - others[8:]).max() > 0.01


def test_a_video_that_cannot_be_continued_is_explained(student, tmp_path, capsys):
    for name, shape, fps in (("size", (3, 8, 20), 16), ("rate", (3, 8, 16), 24)):
        with open_video(tmp_path / f"{name}.mp4", fps=fps) as write:
            write(np.zeros((*shape, 3), np.uint8))
    (tmp_path / "text.mp4").write_text("text")
    for name, message in {
        "size": "size.mp4: expected a video of 8x16, found 8x20; give --size 8x20, or a video of that size",
        "rate": "rate.mp4: expected 16 frames per second, as the model makes them, found 24; convert it",
        "text": "text.mp4: is not a readable video",
        "missing": "missing.mp4: cannot be read (No such file",
    }.items():
        command = [*arguments(student, tmp_path / "new.mp4"), "--stream", "--continue", str(tmp_path / f"{name}.mp4")]
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new.mp4").exists()
    with pytest.raises(SystemExit):
        main([*arguments(student, tmp_path / "new.mp4"), "--continue", "a.mp4"])
    assert "argument --continue: expected with --prompt and --stream" in capsys.readouterr().err


def test_a_video_sampled_by_chunk_is_another_one_and_is_continued(by_chunk, tmp_path, capsys):
    chunks, longer = tmp_path / "chunks.mp4", tmp_path / "longer.mp4"
    kept = ["--longest", "4", "--keep-latents"]
    assert main([*arguments(by_chunk, chunks, frames=5), "--order", "chunks", *kept]) == 0
    settings, error = read_settings(chunks), capsys.readouterr().err
    assert (settings["order"], settings["longest"]) == ("chunks", 4) and "stream" not in settings
    assert "3/3" in error and "chunk" in error and "first chunk after" in error
    assert main([*arguments(by_chunk, tmp_path / "video.mp4", frames=5), "--stream", *kept]) == 0
    found, other = (read_latents(tmp_path / f"{name}.safetensors")[0] for name in ("chunks", "video"))
    # In either order, the first chunk has nothing before it. Rounding is 1e-6.
    np.testing.assert_allclose(found[:2], other[:2], atol=1e-5)
    assert np.abs(found[2:] - other[2:]).max((1, 2, 3)).min() > 0.01
    assert main([*arguments(by_chunk, longer, frames=3), "--order", "chunks", "--continue", str(chunks)]) == 0
    # The old frames, encoded once more. The model sees complete chunks.
    assert np.abs(pixels(longer)[:5] - pixels(chunks)).mean() < 3
    assert (len(pixels(longer)), read_settings(longer)["given_frames"]) == (8, 4)


def test_a_model_that_does_not_sample_by_chunk_is_explained(checkpoint, student, by_chunk, tmp_path, capsys):
    on_mesh = ["--mesh", "data=2", "context=4"]
    for model, more, message in (
        (checkpoint, [], "model: --order chunks: expected causal hybrid attention in every block, so that a chunk"),
        (student, [], "expected a model that was trained with a noise level for every chunk, found one that knows one"),
        (by_chunk, on_mesh, "--mesh context=4 --order chunks: expected context=1, because the parts of a video follow"),
        (by_chunk, ["--longest", "1"], "--longest 1: expected at least the 2 frames of a chunk"),
    ):
        assert main([*arguments(model, tmp_path / "seven.mp4"), "--order", "chunks", *more]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_needs_the_complete_video_cannot_stream(checkpoint, tmp_path, capsys):
    assert main([*arguments(checkpoint, tmp_path / "parts.mp4"), "--stream"]) == 2
    assert "blocks 0: expected hybrid attention in every block, found softmax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "context=3"}, "does not make 8 devices"),
        ({"mesh": "tensor=8"}, "tensor must divide the model's 1 heads"),
        ({"out": "seven.gif"}, "ends in .mp4, found 'seven.gif'"),
        ({"height": 10}, "multiples of 4"),
        ({"height": 12}, "multiple of the model's patch size 2, found 3; choose a multiple of 8"),
        ({"prompt": "one two three four five six seven eight nine"}, "at most 8 words, found 9"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"prompt": "a \udcff"}, r"prompt 'a \udcff': expected text in UTF-8"),
        ({"negative_prompt": "\ud800"}, r"prompt '\ud800': expected text in UTF-8"),
        ({"prompt": "\x1b[2J" + 9 * " a"}, r"error: prompt '\x1b[2J a"),
        ({"frames": 10_000, "height": 9_992, "width": 9_992}, "needs at least 2.4e+04 GB of memory of cpu, found"),
        ({"frames": 1_000, "batch": 10_000}, "--batch 10000 --frames 1000 --height 8 --width 16: needs at least"),
        ({"out": "seven\0.mp4"}, "embedded null"),
        ({"out": f"{'s' * 300}.mp4"}, "cannot be written (File name too long)"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_wrong_input_is_explained_and_exits_with_2(checkpoint, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(**{"checkpoint": checkpoint, "out": tmp_path / "seven.mp4", **options})) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "argument --steps: expected int from 1 to 10000, found '0'"),
        ({"guidance_scale": "nan"}, "argument --guidance-scale: expected float from 0 to 1000, found 'nan'"),
        ({"seed": -1}, "argument --seed: expected int from 0 to 4294967295, found '-1'"),
        ({"mesh": "time=2"}, "expected AXIS=DEVICES with an axis of data, fsdp, context, tensor, found 'time=2'"),
        ({"batch": "two"}, "argument --batch: expected int from 1 to 10000, found 'two'"),
        ({"vae_tile": 100}, "argument --vae-tile: expected int from 32 to 8192, a multiple of 32, found '100'"),
        ({"sampler": "ddim"}, "argument --sampler: invalid choice: 'ddim'"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_numbers_out_of_range_are_refused(checkpoint, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(checkpoint, tmp_path / "seven.mp4", **options))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_place_is_found_before_sampling(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(checkpoint, tmp_path / "file" / "seven.mp4")) == 2
    captured = capsys.readouterr()
    assert "cannot be written (File exists)" in captured.err and "sampling" not in captured.err


def in_proc(place):
    # root may write there by its permissions, but there are no files to make
    return Path("/proc/seven.mp4")


def a_folder(place):
    place.mkdir()
    return place


def a_pipe(place):
    os.mkfifo(place)
    return place


def below_a_file(place):
    place.write_text("")
    return place / "seven.mp4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_folder, "expected a regular file, found a directory"),
        (a_pipe, "expected a regular file, found a named pipe"),
        (in_proc, "cannot be written (No such file"),
        (below_a_file, "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_sampling(checkpoint, tmp_path, capsys, make, message):
    out = make(tmp_path / "place.mp4")
    assert main(arguments(checkpoint, out)) == 2
    error = capsys.readouterr().err
    assert message in error and str(out) in error and "sampling" not in error
    assert [path.name for path in tmp_path.iterdir()] == [name for name in ["place.mp4"] if make is not in_proc]


def test_a_missing_encoder_is_said_before_sampling(checkpoint, tmp_path, capsys, monkeypatch):
    def no_encoder():
        raise NoEncoder("no encoder here")

    monkeypatch.setattr(video_files, "check_encoder", no_encoder)
    assert main(arguments(checkpoint, tmp_path / "seven.mp4")) == 0
    warning, _, progress = capsys.readouterr().err.partition("\n")
    assert warning.startswith("warning: no encoder here; the frames will be written") and "sampling: 100%" in progress


def test_an_earlier_video_of_that_name_is_replaced(checkpoint, tmp_path):
    (tmp_path / "seven.mp4").write_text("earlier")
    assert main(arguments(checkpoint, tmp_path / "seven.mp4")) == 0
    assert pixels(tmp_path / "seven.mp4").shape == (2, 240, 480, 3)


def test_a_disk_that_fills_up_is_reported(checkpoint, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mp4, "enlarged", full)
    assert main(arguments(checkpoint, tmp_path / "seven.mp4")) == 2
    assert "seven.mp4: cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def needed(monkeypatch):
    """The bytes that each check of memory finds to be needed: the least, and then those of the compiled step."""
    found, check_memory = [], memory.check_device_memory

    def check(needed, *more, **options):
        found.append(needed)
        check_memory(needed, *more, **options)

    for module in (pipelines, memory):
        monkeypatch.setattr(module, "check_device_memory", check)
    return found


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16", "guidance_scale": 1}], ids=str)
def test_a_step_is_refused_if_and_only_if_it_does_not_fit(checkpoint, tmp_path, capsys, monkeypatch, needed, settings):
    asked = arguments(checkpoint, tmp_path / "seven.mp4", frames=8, height=64, width=64, steps=1, **settings)
    assert main(asked) == 0
    least, step = needed
    assert 0 < least < step
    monkeypatch.setattr(memory, "host_bytes", lambda: step)
    assert main(asked) == 0
    monkeypatch.setattr(memory, "host_bytes", lambda: step - 1)
    capsys.readouterr()
    assert main(asked) == 2
    assert "a step with 1 videos, each of latents 8x16x16x16: needs at least" in capsys.readouterr().err


def test_free_memory_is_within_the_machines_and_the_process_s_limits(monkeypatch):
    free = memory.host_bytes()
    assert 0 < free < 2**50
    with Path("/proc/self/status").open() as status:
        used = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (used + 10**6, -1))
    assert memory.host_bytes() < 2 * 10**6
    monkeypatch.setattr(memory, "_lines", lambda file: [])
    assert memory.host_bytes() is None


@pytest.mark.parametrize(("part", "name"), [("codec", "wan_vae"), ("text_encoder", "umt5")])
def test_a_codec_or_encoder_that_is_not_available_is_explained(tmp_path, capsys, part, name):
    model = save_random_model(tmp_path / "model", **{part: name})
    assert main(arguments(model, tmp_path / "seven.mp4")) == 2
    assert f"{name}': has weights" in capsys.readouterr().err
    assert not (tmp_path / "seven.mp4").exists()


def test_a_diverged_model_is_explained(tmp_path, capsys):
    model = save_random_model(tmp_path / "model", scale=1e30)
    assert main(arguments(model, tmp_path / "seven.mp4")) == 2
    assert "found NaN or infinity; the model's training may have diverged" in capsys.readouterr().err
    assert not (tmp_path / "seven.mp4").exists()


def test_the_command_shows_progress_and_prints_errors_without_a_traceback(checkpoint, tmp_path):
    command = [sys.executable, "-m", "rehyat_jax.sample"]
    good = subprocess.run(command + arguments(checkpoint, tmp_path / "seven.mp4"), capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "sampling: 100%" in good.stderr and "3/3" in good.stderr
    assert good.stdout == f"wrote {tmp_path / 'seven.mp4'}: 2 frames of 8x16, enlarged 30 times\n"
    bad = subprocess.run(command + arguments(tmp_path, tmp_path / "seven.mp4"), capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
