"""Preparing training examples from videos, encoded files and a teacher, stopped and gone on with; training on them."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from prepared_data import LARGE, SMALL, example, flip_a_bit, write_data_set
from safetensors.numpy import save_file
from tiny_runs import digits_config, killed_after, pretrained

from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.demo.digits import DigitVideos
from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.video import UnreadableVideo, frame_size, read_clip
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.noise import initial_noise
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.preparation import units
from rehyat_jax.preparation.captions import captioned_videos
from rehyat_jax.preparation.trajectories import kept_steps
from rehyat_jax.prepare import main
from rehyat_jax.train import train
from rehyat_jax.weights import load_params, load_wan

# ------------------------------------------------------------------------------------------------------------- captions


@pytest.fixture
def four_videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.MOV", "sub/c.webm", "sub/d.mp4"):
        (folder / name).write_bytes(name.encode())
    (folder / "notes.md").write_text("not a video")
    return folder


def captions_of(folder):
    return {video.name: video.caption for video in captioned_videos(folder)}


EXPECTED = {
    "a.mp4": "a séven, big",
    "b.MOV": 'says "hi"',
    "sub/c.webm": "two words",
    "sub/d.mp4": None,
    "gone.mp4": "x",
}


def test_captions_of_all_three_forms_say_the_same(four_videos):
    csv, jsonl = four_videos / "captions.csv", four_videos / "captions.jsonl"
    # As a spreadsheet saves it: byte order mark, CRLF, quotes, further columns.
    csv.write_bytes(
        '\ufeffid,file,caption\r\n1,a.mp4,"a séven, big"\r\n2,b.MOV,"says ""hi"""\r\n3,sub/c.webm,"two\r\nwords"\r\n'
        "4,gone.mp4,x\r\n".encode()
    )
    assert captions_of(four_videos) == EXPECTED
    csv.unlink()
    rows = [{"file": name, "caption": caption} for name, caption in EXPECTED.items() if caption]
    jsonl.write_text("\n\n".join(map(json.dumps, rows)))
    assert captions_of(four_videos) == EXPECTED
    assert {video.name: video.size for video in captioned_videos(four_videos)}["gone.mp4"] is None
    jsonl.unlink()
    for name, caption in EXPECTED.items():
        if caption:
            (four_videos / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    assert captions_of(four_videos) == {name: caption for name, caption in EXPECTED.items() if name != "gone.mp4"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"a.mp4,a seven\n", r"captions\.csv:1: expected a header with the columns file and caption"),
        ("captions.csv", b"", r"captions\.csv:1: expected a header"),
        ("captions.csv", b"file,caption\na.mp4\n", r"captions\.csv:2: expected a file's name and a caption"),
        ("captions.csv", b"file,caption\na.mp4,x\na.mp4,y\n", r"captions\.csv:3: expected one caption for 'a\.mp4'"),
        ("captions.csv", b'file,caption\na.mp4,"x\n', r"captions\.csv: expected captions in UTF-8, found"),
        ("captions.csv", b"file,caption\na.mp4,\xff\n", r"captions\.csv: expected captions in UTF-8, found"),
        ("captions.csv", b"file,caption\n../a.mp4,x\n", r"captions\.csv:2: expected a file within"),
        ("captions.csv", b"file,caption\n/a.mp4,x\n", r"captions\.csv:2: expected a file within"),
        ("captions.jsonl", b'{"file": "a.mp4"}\n', r"captions\.jsonl:1: expected a file's name and a caption"),
        ("captions.jsonl", b'{"file": "a.mp4", "caption": "x"}\n{\n', r"captions\.jsonl:2: expected a JSON object"),
        ("captions.jsonl", b"[1]\n", r"captions\.jsonl:1: expected an object"),
        ("captions.jsonl", b"[" * 100_000, r"captions\.jsonl:1: expected a JSON object"),
    ],
)
def test_a_wrong_list_of_captions_names_its_line(four_videos, name, content, message):
    (four_videos / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        captioned_videos(four_videos)


def test_a_folder_without_videos_or_with_two_lists_is_refused(four_videos, tmp_path):
    with pytest.raises(InputError, match="expected a folder"):
        captioned_videos(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected videos"):
        captioned_videos(tmp_path / "empty")
    (four_videos / "captions.csv").write_text("file,caption\n")
    (four_videos / "captions.jsonl").write_text("")
    with pytest.raises(InputError, match=r"found captions\.csv and captions\.jsonl"):
        captioned_videos(four_videos)


# --------------------------------------------------------------------------------------------------------------- videos


def grey(video, channels=3):
    """[T, H, W] -> [T, H, W, 3]."""
    return np.broadcast_to(video[..., None], (*video.shape, channels))


def test_clips_are_resampled_in_time_and_cut_to_the_middle(tmp_path):
    # 2 seconds at 32 frames a second; the time as brightness, a white bar on either side.
    video = np.broadcast_to((np.arange(64) / 100)[:, None, None], (64, 48, 96)).copy()
    video[:, :, :20] = video[:, :, -20:] = 1
    write_video(tmp_path / "a.mp4", grey(video), fps=32)
    assert frame_size(tmp_path / "a.mp4") == (48, 96)
    clip = read_clip(tmp_path / "a.mp4", fps=16, frames=21, height=24, width=24)
    assert clip.shape == (21, 24, 24, 3) and clip.dtype == np.uint8
    # Every other frame; H.264 is off by a few levels of 255, more beside the edge.
    np.testing.assert_allclose(clip[:, :, 4:-4].mean((1, 2, 3)) / 255, np.arange(0, 42, 2) / 100, atol=0.02)
    assert clip[:, :, 4:-4].max() < 128
    # Fewer where the video ends before.
    assert len(read_clip(tmp_path / "a.mp4", fps=16, frames=100, height=24, width=24)) == 32
    assert len(read_clip(tmp_path / "a.mp4", fps=64, frames=200, height=24, width=24)) == 128


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"#EXTM3U\n#EXTINF:1,\na.mp4\n", b"ffconcat version 1.0\nfile a.mp4"]
)
def test_what_is_not_a_video_is_unreadable(tmp_path, content):
    write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3)))
    (tmp_path / "b.mp4").write_bytes(content)
    for read in (frame_size, lambda path: read_clip(path, fps=16, frames=2, height=8, width=8)):
        with pytest.raises(UnreadableVideo, match=r"b\.mp4: ffmpeg"):
            read(tmp_path / "b.mp4")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten moving digits, four videos of other sizes, and what can be wrong."""
    folder, digits = tmp_path_factory.mktemp("videos"), DigitVideos()
    captions = {}
    for number in range(10):
        video, captions[f"{number}.mp4"] = digits.draw(number)
        write_video(folder / f"{number}.mp4", grey(video))
    for number in range(4):
        write_video(folder / f"wide{number}.mp4", np.full((25, 24, 48, 3), number / 10))
        captions[f"wide{number}.mp4"] = "wide"
    write_video(folder / "short.mp4", np.zeros((5, 24, 24, 3)))
    write_video(folder / "small.mp4", np.zeros((21, 8, 32, 3)))
    write_video(folder / "untold.mp4", np.zeros((21, 24, 24, 3)))
    write_video(folder / "long_caption.mp4", np.zeros((21, 24, 24, 3)))
    (folder / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:500])
    captions |= {"short.mp4": "a", "small.mp4": "a", "cut.mp4": "a", "gone.mp4": "a", "long_caption.mp4": "a " * 9}
    rows = [json.dumps({"file": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


OPTIONS = ["--size", "21x24x24", "9x12x24", "--unit", "6", "--workers", "2"]


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    assert main([str(videos), str(folder), *OPTIONS]) == 0
    return folder


def contents(folder):
    """Every file's bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_videos_become_examples_of_the_size_they_fit(videos, prepared):
    source = PreparedExamples(prepared)
    assert [(bucket.latents_shape, len(bucket)) for bucket in source.buckets] == [
        ((9, 3, 6, 16), 4),
        ((21, 6, 6, 16), 10),
    ]
    assert (source.codec, source.text_encoder) == ("space_to_depth", "word_vectors")
    np.testing.assert_array_equal(source.null_text, WordVectors()([""])[0])
    digits = source.buckets[1]
    names = [digits.description(index)["name"] for index in range(10)]
    assert names == [f"{number}.mp4" for number in range(10)]
    for number in range(10):
        video, caption = DigitVideos().draw(number)
        np.testing.assert_array_equal(digits[number]["text"], WordVectors()([caption])[0])
        decoded = SpaceToDepth().decode(digits[number]["latents"][None])[0]
        # H.264 at its best quality.
        assert np.abs(decoded - grey(video)).mean() < 0.02
    for number in range(4):
        decoded = SpaceToDepth().decode(source.buckets[0][number]["latents"][None])[0]
        np.testing.assert_allclose(decoded, number / 10, atol=0.02)


def test_what_was_left_out_and_why_is_in_the_summary(prepared):
    summary = json.loads((prepared / "summary.json").read_text())
    assert (summary["inputs"], summary["examples"]) == (20, 14)
    reasons = {reject["name"]: reject["reason"] for reject in summary["rejects"]}
    assert reasons == {
        "short.mp4": "too short",
        "small.mp4": "too small",
        "untold.mp4": "no caption",
        "cut.mp4": "unreadable",
        "gone.mp4": "no such video",
        "long_caption.mp4": "caption refused",
    }
    assert set(summary["rejected"].values()) == {1}
    details = {reject["name"]: reject["detail"] for reject in summary["rejects"]}
    assert "5 frames at 16 a second, expected at least 9" in details["short.mp4"]
    assert "8x32" in details["small.mp4"] and "moov" in details["cut.mp4"]
    told = (prepared / "summary.txt").read_text()
    assert "14 examples of 20 videos" in told and "cut.mp4: unreadable" in told and "21x6x6x16: 10 examples" in told
    assert (prepared / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_complete_data_set_is_left_alone_and_another_job_is_refused(videos, prepared, capsys):
    before = contents(prepared)
    assert main([str(videos), str(prepared), *OPTIONS]) == 0
    assert contents(prepared) == before
    assert main([str(videos), str(prepared), *OPTIONS, "--store", "bfloat16"]) == 2
    error = capsys.readouterr().err
    assert "was begun with other inputs or options" in error and "bfloat16" in error
    assert main([str(videos), str(videos), *OPTIONS]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_a_stopped_preparation_goes_on_to_the_same_bytes(videos, prepared, tmp_path, monkeypatch):
    add, count = units.UnitWriter.add, 0

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count in (1, 8, 9):
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(units.UnitWriter, "add", interrupted)
    folder = tmp_path / "data"
    for _ in range(3):
        assert main([str(videos), str(folder), *OPTIONS]) == INTERRUPTED
        assert not (folder / "dataset.json").exists() and not list(folder.glob(".*partial"))
    assert main([str(videos), str(folder), *OPTIONS]) == 0
    assert contents(folder) == contents(prepared)


def test_a_killed_preparation_goes_on_to_the_same_bytes(videos, prepared, tmp_path):
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "rehyat_jax.prepare", str(videos), str(folder), *OPTIONS]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(".prepare/units/000000.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "dataset.json").exists() and (folder / ".prepare/units/000000.json").exists()
    # What a kill in the middle of a shard leaves, and a shard that was lost.
    (folder / ".000002-21x6x6x16.array_record.0123abcd.partial").write_bytes(b"half")
    next(folder.glob("000000-*")).unlink()
    assert main([str(videos), str(folder), *OPTIONS]) == 0
    assert contents(folder) == contents(prepared)


def test_a_video_is_not_rejected_for_what_the_machine_does(videos, prepared, tmp_path, monkeypatch, capsys):
    folder, killed = tmp_path / "data", tmp_path / "ffmpeg"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(killed))
        assert main([str(videos), str(folder), *OPTIONS]) == 2
    assert "cannot be read on this machine now" in capsys.readouterr().err
    assert main([str(videos), str(folder), *OPTIONS]) == 0
    assert contents(folder) == contents(prepared)


def test_what_is_about_the_whole_is_made_again_where_it_is_damaged(videos, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    for damage in (
        lambda folder: (folder / "dataset.json").write_text("{"),
        lambda folder: (folder / "null_text.safetensors").unlink(),
        lambda folder: (folder / "summary.txt").unlink(),
    ):
        damage(tmp_path / "data")
        assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 0
        assert contents(tmp_path / "data") == contents(prepared)


def test_hosts_share_the_work_and_the_last_one_completes_it(videos, prepared, tmp_path, capsys):
    folder = tmp_path / "data"
    for host in (1, 0, 2):
        assert not (folder / "dataset.json").exists()
        options = [*OPTIONS, "--workers", str(host + 1), "--num-hosts", "3", "--host", str(host)]
        assert main([str(videos), str(folder), *options]) == 0
    assert "3 of 4 units are left to other hosts" in capsys.readouterr().out
    assert contents(folder) == contents(prepared)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(videos, tmp_path, capsys):
    folder = tmp_path / "data"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([str(videos), str(folder), *OPTIONS]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large); raise the limit on the size of files" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".prepare"]


def test_no_usable_video_at_all_is_an_error_with_the_reasons(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"x")
        (tmp_path / "videos" / name).with_suffix(".txt").write_text("a")
    assert main([str(tmp_path / "videos"), str(tmp_path / "data")]) == 2
    assert "none of 2 inputs gave an example (2 unreadable)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "21x24"], "FRAMESxHEIGHTxWIDTH"),
        (["--size", "21x23x24"], "multiples of 4"),
        (["--codec", "wan"], "unknown codec 'wan'"),
        (["--text-encoder", "umt5"], "give --models"),
        (["--num-hosts", "2", "--host", "2"], "--host: expected 0 to 1, found 2"),
    ],
)
def test_wrong_options_are_named(videos, tmp_path, capsys, arguments, words):
    try:
        code = main([str(videos), str(tmp_path / "data"), *arguments])
    except SystemExit as exit:  # argparse's own
        code = exit.code
    assert code == 2 and words in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- latent files


def test_examples_encoded_elsewhere_are_taken_over(tmp_path, capsys):
    source, folder = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    for number in range(5):
        encoded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in example(number).items()}
        save_file(encoded, source / f"{number}.safetensors", {"caption": f"number {number}"})
    wrong = {
        "cut": b"",
        "rank": {"latents": np.zeros((1, 2, 4, 4, 16)), "text": np.zeros((8, 64))},
        "text": {"latents": np.zeros(SMALL), "text": np.zeros((7, 64))},
        "missing": {"latents": np.zeros(SMALL)},
        "nan": {"latents": np.full(SMALL, np.nan), "text": np.zeros((8, 64))},
    }
    for name, tensors in wrong.items():
        file = source / f"{name}.safetensors"
        file.write_bytes(tensors) if name == "cut" else save_file(tensors, file)
    command = ["latents", str(source), str(folder), "--codec", "wan_vae", "--text-encoder", "umt5"]
    assert main(command) == 2
    assert "null_text.safetensors: expected a safetensors file" in capsys.readouterr().err
    save_file({"text": np.full((8, 64), 0.5, np.float32)}, source / "null_text.safetensors")
    assert main(command) == 0

    data = PreparedExamples(folder)
    assert (data.codec, data.text_encoder) == ("wan_vae", "umt5") and len(data.buckets[0]) == 5
    np.testing.assert_array_equal(data.null_text, 0.5)
    for number in range(5):
        np.testing.assert_array_equal(data.buckets[0][number]["latents"], example(number)["latents"])
        np.testing.assert_array_equal(data.buckets[0][number]["text"], example(number)["text"])
    rejects = {
        reject["name"].removesuffix(".safetensors"): reject["detail"]
        for reject in json.loads((folder / "summary.json").read_text())["rejects"]
    }
    assert rejects.keys() == wrong.keys()
    assert "complete safetensors file" in rejects["cut"] and "expected 4 axes" in rejects["rank"]
    assert "expected shape (8, 64)" in rejects["text"] and "['text']" in rejects["missing"]
    assert "finite" in rejects["nan"]


# --------------------------------------------------------------------------------------------------------- trajectories

SAMPLING = [
    "--steps",
    "6",
    "--keep",
    "2",
    "--frames",
    "4",
    "--height",
    "8",
    "--width",
    "8",
    "--batch",
    "2",
    "--unit",
    "3",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trajectories(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    (folder / "prompts.txt").write_text("a seven moves sideways\n\n  a two   moves up and down\n")
    command = ["teacher-trajectories", teacher, str(folder / "data"), "--prompts", str(folder / "prompts.txt")]
    command += [*SAMPLING, "--noises", "2"]
    assert main(command) == 0
    return folder / "data", command


def test_trajectories_hold_what_the_teacher_saw(teacher, trajectories):
    source = PreparedExamples(trajectories[0])
    (bucket,) = source.buckets
    assert source.kind == "trajectories" and len(bucket) == 4 * 2 and bucket.latents_shape == (4, 2, 2, 16)
    prompts = ["a seven moves sideways", "a two moves up and down"]
    seen = {}

    def see(step, at, latents):
        seen[step] = np.asarray(latents), float(at.timestep)

    text = WordVectors()(prompts * 2)
    options = dict(steps=6, guidance_scale=5.0, flow_shift=5.0, sampler="unipc", on_step=see)
    generate_latents(load_wan(teacher), text, np.zeros_like(text), initial_noise(0, 4, (4, 2, 2, 16)), **options)
    found = set()
    for index in range(8):
        example, about = bucket[index], bucket.description(index)
        latents, timestep = seen[about["step"]]
        # Another batch size sums in another order; four steps of it, with guidance.
        np.testing.assert_allclose(example["latents"], latents[about["trajectory"]], atol=1e-3)
        assert example["timestep"] == timestep and about["caption"] == prompts[about["trajectory"] % 2]
        np.testing.assert_array_equal(example["text"], text[about["trajectory"]])
        found.add((about["trajectory"], about["step"]))
    assert found == {(number, step) for number in range(4) for step in kept_steps(0, number, 6, 2)}


def test_kept_steps_are_spread_over_the_trajectory():
    for number in range(50):
        steps = kept_steps(3, number, 50, 8)
        assert len(set(steps)) == 8 and min(steps) >= 0 and max(steps) < 50
    assert len({step for number in range(200) for step in kept_steps(3, number, 50, 8)}) == 50
    assert kept_steps(0, 0, 6, 6) == [*range(6)]


def test_stopped_trajectories_go_on_to_the_same_bytes(trajectories, tmp_path, monkeypatch):
    folder, command = trajectories
    # As another host may see it.
    shutil.copytree(command[1], tmp_path / "teacher")
    command = [command[0], str(tmp_path / "teacher"), str(tmp_path / "data"), *command[3:]]
    report = units._report

    def interrupted(folder, number):
        if number == 1 and (folder / units.UNITS / "000000.json").exists():
            raise KeyboardInterrupt
        return report(folder, number)

    with monkeypatch.context() as patch:
        patch.setattr(units, "_report", interrupted)
        assert main(command) == INTERRUPTED
    assert main(command) == 0
    assert contents(tmp_path / "data") == contents(folder)


def test_trajectories_of_two_teachers_are_not_mixed(teacher, trajectories, tmp_path, capsys):
    _, command = trajectories
    shutil.copytree(teacher, tmp_path / "teacher")
    largest = max((tmp_path / "teacher").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    assert main([command[0], str(tmp_path / "teacher"), *command[2:]]) == 2
    assert "options was" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def cheap_compilation(tmp_path_factory):
    """Programs are not optimised, and compiled once for all runs."""
    changes = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def on_one_device(config, workdir):
    return train(config, workdir, jax.devices()[:1])


def logged(workdir, name):
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").open()]


def test_stage_1_learns_from_trajectories(teacher, trajectories, tmp_path, cheap_compilation):
    changes = {"init_from": teacher, "data.source": "prepared", "data.path": str(trajectories[0])}
    config = digits_config(tmp_path, "distill", steps=25, **changes, **{"optimizer.learning_rate": 1e-2})
    config.caption_dropout = 0.0
    on_one_device(config, tmp_path / "run")
    errors = logged(tmp_path / "run", "relative_error")
    assert np.mean(errors[-4:]) < 0.9 * np.mean(errors[:4])

    config.stage = "finetune"
    with pytest.raises(InputError, match=r'from which stages "distill", "velocity", .* can learn'):
        on_one_device(config, tmp_path / "finetune")


def test_a_run_over_two_shapes_and_a_corrupt_record_goes_on_bit_for_bit(tmp_path, cheap_compilation):
    examples = [example(n, LARGE if n % 3 == 2 else SMALL) for n in range(9)]
    for one in examples:
        one["latents"] = one["latents"] / 10
    data = write_data_set(tmp_path / "data", examples, codec="space_to_depth")
    flip_a_bit(data / "000000-2x4x4x16.array_record", "1.mp4")
    changes = {"data.source": "prepared", "data.path": str(data), "accumulation_steps": 2}
    config = digits_config(tmp_path, "distill", **changes)
    with pytest.raises(InputError, match=r"000000-2x4x4x16\.array_record: record 1"):
        on_one_device(config, tmp_path / "whole")

    config.data.corrupt = "skip"  # A run that stopped may go on so.
    whole = on_one_device(config, tmp_path / "whole")
    killed_after(3, tmp_path / "whole", tmp_path / "stopped")
    resumed = on_one_device(config, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, load_params(resumed)[1], load_params(whole)[1])
    # Six updates of two batches of two: 16 draws of the 6 small examples, of which every sixth is the corrupt one.
    skipped = logged(tmp_path / "stopped", "skipped_records")
    assert skipped == sorted(skipped) == logged(tmp_path / "whole", "skipped_records") and skipped[-1] in (2, 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (SMALL, "of codec 'wan_vae', but the model is of 'space_to_depth'"),
        ((2, 5, 4, 16), "have 5 latent rows, but the model's patches have 2"),
        ((2, 4, 4, 8), "have latent channels 8, but the model expects 16"),
    ],
)
def test_data_that_the_model_cannot_take_are_named(tmp_path, shape, message):
    data = write_data_set(tmp_path / "data", [example(n, shape) for n in range(4)])
    config = digits_config(tmp_path, "finetune", **{"data.source": "prepared", "data.path": str(data)})
    with pytest.raises(InputError, match=message):
        on_one_device(config, tmp_path / "run")
