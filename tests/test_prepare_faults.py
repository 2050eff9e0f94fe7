"""Preparation on machines that fail, beside other processes, and from files that are hostile or in other encodings."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from prepared_data import SMALL, example, write_data_set
from safetensors.numpy import save_file

from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.errors import InputError
from rehyat_jax.files import video
from rehyat_jax.files.mp4 import write_video
from rehyat_jax.files.temporary import new_token, temporary_path
from rehyat_jax.generation.text_encoders import read_prompts
from rehyat_jax.preparation import units
from rehyat_jax.preparation.captions import captioned_videos, read_captions
from rehyat_jax.preparation.trajectories import fingerprints
from rehyat_jax.prepare import main

PROGRAM = imageio_ffmpeg.get_ffmpeg_exe()
OPTIONS = ["--size", "4x8x8", "--unit", "1", "--workers", "1"]


@pytest.fixture(autouse=True)
def ends_in_time():
    """A test that waits for ever fails."""
    signal.alarm(120)
    yield
    signal.alarm(0)


def write_videos(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        write_video(folder / name, np.full((4, 8, 8, 3), 0.5))
        (folder / name).with_suffix(".txt").write_text("a seven")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_videos(tmp_path_factory.mktemp("faults") / "videos", "0.mp4", "1.mp4", "2.mp4")


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Replaces ffmpeg by a shell's program, in which $FFMPEG is the real one."""

    def replace(program: str) -> None:
        script = tmp_path / "ffmpeg"
        script.write_text(f"#!/bin/sh\nFFMPEG={PROGRAM}\n{program}\n")
        script.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))

    return replace


def rejects(folder: Path) -> dict[str, tuple[str, str]]:
    """(reason, detail) of every input that gave no example, by its name."""
    found = json.loads((folder / "summary.json").read_text())["rejects"]
    return {reject["name"]: (reject["reason"], reject["detail"]) for reject in found}


# ------------------------------------------------------------------------------------------------ faults of the machine


@pytest.mark.parametrize(
    "program",
    [
        "exit 255",  # ffmpeg after SIGTERM
        "kill -KILL $$",
        "kill -SEGV $$",
        "echo 'Error while opening decoder: Resource temporarily unavailable' >&2; exit 245",
        "echo 'get_buffer() failed: Invalid data found when processing input' >&2; exit 183",
        "exit 0",
        "exit 127",
        'ulimit -v 200000; exec $FFMPEG "$@"',
        # Only at the first time, when another program had the memory.
        'if mkdir "$0.once" 2>/dev/null; then kill -KILL $$; fi; exec $FFMPEG "$@"',
    ],
)
def test_a_fault_of_the_machine_rejects_no_video(videos, tmp_path, ffmpeg, capsys, program):
    video._good_video()  # by the real ffmpeg
    folder = tmp_path / "data"
    ffmpeg(program)
    assert main([str(videos), str(folder), *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert "0.mp4" in error and "cannot be read on this machine now" in error and "same command again" in error
    ffmpeg('exec $FFMPEG "$@"')
    assert main([str(videos), str(folder), *OPTIONS]) == 0
    assert rejects(folder) == {} and len(PreparedExamples(folder)) == 3


def test_videos_that_can_be_read_are_done_before_the_others_are_named(videos, tmp_path, ffmpeg, capsys):
    ffmpeg('case "$*" in *1.mp4*) kill -KILL $$;; esac; exec $FFMPEG "$@"')
    assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 2
    assert "1 of 3 units are not done" in capsys.readouterr().err
    assert sorted(path.stem for path in (tmp_path / "data/.prepare/units").iterdir()) == ["000000", "000002"]


def test_a_machine_that_reads_nothing_is_given_up_soon(tmp_path, ffmpeg, monkeypatch):
    monkeypatch.setattr(units, "MOST_FAILURES", 2)
    names = [f"{number}.mp4" for number in range(5)]
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
        (folder / name).with_suffix(".txt").write_text("a")
    ffmpeg('echo >> "$0.runs"; kill -KILL $$')
    assert main([str(folder), str(tmp_path / "data"), *OPTIONS]) == 2
    # Two failed, and up to two were being decoded ahead.
    assert 2 <= len((tmp_path / "ffmpeg.runs").read_text()) <= 4


def test_under_a_limit_on_memory_no_video_is_called_unreadable(tmp_path, capsys, monkeypatch):
    # A limit that does not stop this process, and is too little all the same.
    monkeypatch.setattr(video, "AMPLE_BYTES", 2**47)
    folder = write_videos(tmp_path / "videos", "good.mp4", "cut.mp4")
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:500])
    command = [str(folder), str(tmp_path / "data"), *OPTIONS]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**46, limits[1]))
    try:
        assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "ulimit -v" in capsys.readouterr().err
    assert main(command) == 0
    assert rejects(tmp_path / "data")["cut.mp4"][0] == "unreadable"


def test_a_video_on_which_ffmpeg_crashes_is_unreadable(videos, tmp_path, ffmpeg):
    ffmpeg('case "$*" in *1.mp4*) kill -SEGV $$;; esac; exec $FFMPEG "$@"')
    assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 0
    ((name, (reason, detail)),) = rejects(tmp_path / "data").items()
    assert (name, reason) == ("1.mp4", "unreadable") and "crashed by signal 11" in detail


def test_a_disk_that_fails_rejects_neither_captions_nor_latents(videos, tmp_path, monkeypatch, capsys):
    latents = write_latents(tmp_path / "latents", {"0": {}, "1": {}})
    commands = [str(videos), str(tmp_path / "a"), *OPTIONS], latents_command(latents, tmp_path / "b")
    open_file = Path.open

    def fail(path, *arguments, **options):
        if path.name in ("1.txt", "1.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_file(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        for command, name in zip(commands, ("1.txt", "1.safetensors"), strict=True):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert name in error and "Input/output error" in error
    for command, count in zip(commands, (3, 2), strict=True):
        assert main(command) == 0
        assert len(PreparedExamples(tmp_path / ("b" if "latents" in command else "a"))) == count


def test_a_video_that_takes_too_much_processor_time_is_left_out(videos, tmp_path, ffmpeg, monkeypatch):
    monkeypatch.setattr(video, "_PROCESSOR_SECONDS", 1)
    monkeypatch.setattr(video, "_LIMITED", 'ulimit -t 1; exec "$0" "$@"')
    ffmpeg('case "$*" in *1.mp4*) while :; do :; done;; esac; exec $FFMPEG "$@"')
    assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 0
    ((name, (reason, detail)),) = rejects(tmp_path / "data").items()
    assert (name, reason) == ("1.mp4", "unreadable") and "more than 1 s of processor time" in detail


def test_a_video_for_which_ffmpeg_waits_too_long_is_read_again_later(tmp_path, ffmpeg, monkeypatch, capsys):
    folder = write_videos(tmp_path / "videos", "0.mp4")
    monkeypatch.setattr(video, "_SECONDS", 0.2)
    ffmpeg("exec sleep 1000")
    assert main([str(folder), str(tmp_path / "data"), *OPTIONS]) == 2
    assert "did not come to an end within 0.2 s" in capsys.readouterr().err


def test_too_little_memory_for_the_readers_threads_ends_before_the_work(videos, tmp_path):
    # ArrayRecord's reader waits for ever where it cannot start its threads.
    program = 'ulimit -v 1000000; exec "$0" "$@"'
    command = ["sh", "-c", program, sys.executable, "-m", "rehyat_jax.prepare", videos, tmp_path / "data", *OPTIONS]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode == 2 and "threads" in found.stderr and "ulimit -v" in found.stderr
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------------ beside others


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_hosts_at_once_of_which_one_is_killed_and_started_again(tmp_path):
    videos = write_videos(tmp_path / "videos", *(f"{number}.mp4" for number in range(8)))
    shared = tmp_path / "shared"

    def start(host: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "rehyat_jax.prepare", videos, shared, *OPTIONS]
        return subprocess.Popen([*command, "--num-hosts", "2", "--host", str(host)], stderr=subprocess.PIPE, text=True)

    hosts = [start(0), start(1)]
    while not (shared / ".prepare/units/000000.json").exists() and hosts[0].poll() is None:
        time.sleep(0.01)
    hosts[0].kill()
    hosts[0].communicate()
    again = start(0)
    errors = [host.communicate()[1] for host in (hosts[1], again)]
    assert hosts[1].returncode == again.returncode == 0, errors
    assert main([str(videos), str(tmp_path / "alone"), *OPTIONS]) == 0
    assert contents(shared) == contents(tmp_path / "alone")


def test_only_leftovers_of_dead_processes_are_removed_while_others_may_work(tmp_path):
    folder = write_data_set(tmp_path / "data", [example(number) for number in range(4)])
    shard = folder / "000000-2x4x4x16.array_record"
    dead = new_token().replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    living, left = (temporary_path(shard, token, "partial") for token in (new_token(), dead))
    for path in (living, left):
        path.write_bytes(b"half")
    shutil.rmtree(folder / ".prepare/units")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_complete", lambda *_: None)
        write_data_set(folder, [example(number) for number in range(4)])
    assert living.exists() and not left.exists()
    write_data_set(folder, [example(number) for number in range(4)])
    assert not living.exists()  # the data set is complete, so nobody needs it


@pytest.mark.parametrize(
    "content", ["", "{}", '{"shards": 3, "rejects": []}', '{"shards": [{"file": 3}], "rejects": []}']
)
def test_a_unit_with_a_damaged_report_is_prepared_again(tmp_path, content):
    folder = write_data_set(tmp_path / "data", [example(number) for number in range(4)], unit=2)
    report = folder / ".prepare/units/000001.json"
    before = report.read_bytes()
    report.write_text(content)
    write_data_set(folder, [example(number) for number in range(4)], unit=2)
    assert report.read_bytes() == before


def test_two_commands_that_begin_at_once_are_not_mixed(videos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    add = units.UnitWriter.add

    def add_while_another_begins(self, *arguments):
        plan = json.loads((folder / units.PLAN).read_text())
        (folder / units.PLAN).write_text(json.dumps({**plan, "codec": "wan_vae"}))
        add(self, *arguments)

    monkeypatch.setattr(units.UnitWriter, "add", add_while_another_begins)
    assert main([str(videos), str(folder), *OPTIONS]) == 2
    assert "codec was wan_vae, is space_to_depth" in capsys.readouterr().err
    assert not (folder / units.UNITS).exists() and not list(folder.glob("*.array_record"))


# --------------------------------------------------------------------------------------------------- names and captions


def test_names_and_captions_that_are_no_text_leave_the_others_alone(tmp_path, capsys):
    folder = write_videos(tmp_path / "videos", "good.mp4", "\x1b[31mred\n.mp4", "half.mp4", "formula.mp4")
    os.rename(folder / "half.mp4", os.fsencode(folder) + b"/\xff\xfe.mp4")
    shutil.copy(folder / "good.mp4", folder / "caption.mp4")
    for file in folder.glob("*.txt"):
        file.unlink()
    (folder / "\x1b[31mred\n.mp4").write_bytes(b"x")
    captions = {
        "good.mp4": "a seven",
        "\x1b[31mred\n.mp4": "red",
        "\udcff\udcfe.mp4": "a seven",
        "caption.mp4": "a \ud800",
        "\ud800.mp4": "of a file that is not there",
        "formula.mp4": "$x_$ 七 \x1b[31m",
    }
    rows = [json.dumps({"file": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    assert main([str(folder), str(tmp_path / "data"), *OPTIONS]) == 0
    output = capsys.readouterr()
    assert "\x1b" not in output.out and "Warning" not in output.err
    reasons = {name: reason for name, (reason, _) in rejects(tmp_path / "data").items()}
    assert reasons == {
        "\x1b[31mred\n.mp4": "unreadable",
        "\udcff\udcfe.mp4": "name refused",
        "caption.mp4": "caption refused",
        "\ud800.mp4": "no such video",
    }
    told = (tmp_path / "data/summary.txt").read_text(encoding="utf-8")
    assert "\x1b" not in told and r"\udcff\udcfe.mp4: name refused" in told
    assert len(PreparedExamples(tmp_path / "data")) == 2


# -------------------------------------------------------------------------------------------------------- latent files


def write_latents(folder: Path, files: dict[str, dict]) -> Path:
    """Latent files of an example with some of its tensors replaced, and the null text."""
    folder.mkdir()
    for name, tensors in files.items():
        save_file({**example(1), **tensors}, folder / f"{name}.safetensors")
    save_file({"text": np.zeros((8, 64), np.float32)}, folder / "null_text.safetensors")
    return folder


def latents_command(source: Path, destination: Path, codec: str = "wan_vae") -> list[str]:
    return ["latents", str(source), str(destination), "--codec", codec, "--text-encoder", "umt5"]


def test_latents_of_other_dtypes_are_named(tmp_path):
    wrong = {dtype: {"latents": np.zeros(SMALL, dtype)} for dtype in ("int32", "uint8", "bool", "complex64")}
    wrong["text"] = {"text": np.zeros((8, 64), np.int64)}
    wrong["large"] = {"latents": np.full(SMALL, 1e300)}
    source = write_latents(tmp_path / "source", {"good": {}, "double": {"latents": np.zeros(SMALL)}, **wrong})
    eight_bits = (source / "uint8.safetensors").read_bytes().replace(b'"U8"', b'"F8_E4M3"')
    length = int.from_bytes(eight_bits[:8], "little") + len("F8_E4M3") - len("U8")
    (source / "f8.safetensors").write_bytes(length.to_bytes(8, "little") + eight_bits[8:])
    (source / "folder.safetensors").mkdir()
    os.mkfifo(source / "pipe.safetensors")
    (source / "nowhere.safetensors").symlink_to(tmp_path / "nothing")
    shutil.copy(source / "good.safetensors", os.fsencode(source) + b"/\xff.safetensors")
    assert main(latents_command(source, tmp_path / "data")) == 0
    details = {name.removesuffix(".safetensors"): detail for name, (_, detail) in rejects(tmp_path / "data").items()}
    for name, dtype in {"int32": "I32", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "f8": "F8_E4M3"}.items():
        assert f"tensor latents: expected one of F32, BF16, F16, F64, found {dtype}" in details.pop(name)
    assert "tensor text" in details.pop("text") and "finite" in details.pop("large")
    assert all("expected a regular file" in details.pop(name) for name in ("folder", "pipe", "nowhere"))
    assert "UTF-8" in details.pop("\udcff") and not details
    assert len(PreparedExamples(tmp_path / "data")) == 2


def test_latents_that_the_named_codec_cannot_decode_give_a_data_set_without_pictures(tmp_path, capsys):
    source = write_latents(tmp_path / "source", {"a": {"latents": np.zeros((2, 4, 4, 7), np.float32)}})
    assert main(latents_command(source, tmp_path / "data", "space_to_depth")) == 0
    assert "no contact sheet: space_to_depth cannot decode" in capsys.readouterr().out


# ------------------------------------------------------------------------------- pipes, devices, files without an end


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def make_endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


def make_sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, 2**40)


ODD = [make_pipe, make_endless, make_sparse]


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_a_list_of_captions_that_is_no_file_is_refused(tmp_path, make, name):
    folder = write_videos(tmp_path / "videos", "0.mp4")
    make(folder / name)
    with pytest.raises(InputError, match=rf"{name}: expected a (regular )?file"):
        captioned_videos(folder)


@pytest.mark.parametrize("make", ODD)
def test_a_caption_beside_a_video_that_is_no_file_is_none(tmp_path, make):
    folder = write_videos(tmp_path / "videos", "0.mp4")
    (folder / "0.txt").unlink()
    make(folder / "0.txt")
    assert [video.caption for video in captioned_videos(folder)] == [None]


@pytest.mark.parametrize("make", ODD)
def test_prompts_and_null_text_that_are_no_files_are_refused(tmp_path, make):
    make(tmp_path / "prompts.txt")
    with pytest.raises(InputError, match=r"prompts\.txt: expected a (regular )?file"):
        read_prompts(tmp_path / "prompts.txt")
    source = write_latents(tmp_path / "source", {"0": {}})
    (source / "null_text.safetensors").unlink()
    make(source / "null_text.safetensors")
    assert main(latents_command(source, tmp_path / "data")) == 2


def test_a_video_of_nothing_but_a_terabyte_of_zeros_is_unreadable(tmp_path):
    folder = write_videos(tmp_path / "videos", "0.mp4")
    (folder / "0.mp4").unlink()
    make_sparse(folder / "0.mp4")
    assert main([str(folder), str(tmp_path / "data"), *OPTIONS]) == 2
    assert rejects(tmp_path / "data")["0.mp4"][0] == "unreadable"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.jsonl", json.dumps({"file": "n" * 10_000, "caption": "a"})),
        ("captions.jsonl", json.dumps({"file": "a.mp4", "caption": ["c" * 10_000]})),
        ("captions.jsonl", json.dumps({"file": "../" + "n" * 1000, "caption": "a"})),
        ("captions.jsonl", "x" * 2_000_000),
        ("captions.csv", "file," + "c" * 100_000),
        ("captions.csv", "file,caption\n" + "c" * 2_000_000),
    ],
)
def test_long_names_and_captions_are_shown_in_part(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read_captions(tmp_path / name)
    assert len(str(error.value)) < 1000 and name in str(error.value)


# --------------------------------------------------------------------------------------------------------- the teacher

TEACHER = Path(__file__).parent.parent / "assets/demo_teacher"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_of_trajectories_goes_on_with_the_same_teacher_alone(tmp_path, monkeypatch, capsys, is_file):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    weights = tmp_path / "teacher" / WEIGHTS
    (tmp_path / "prompts.txt").write_text("a seven\n")
    model, options = (
        weights if is_file else weights.parent,
        ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "8"],
    )
    command = ["teacher-trajectories", str(model), str(tmp_path / "data"), *options]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(units, "_prepare_unit", interrupt)
    assert main(command) == main(command) == INTERRUPTED
    plan = json.loads((tmp_path / "data" / units.PLAN).read_text())
    assert not plan["options"]["model"].startswith("0 files")

    whole = weights.read_bytes()
    # Trained further, without its first and last layers.
    changed = bytearray(whole)
    changed[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    weights.write_bytes(changed)
    assert main(command) == 2 and "options was" in capsys.readouterr().err
    weights.write_bytes(whole)
    # As an earlier version wrote it.
    del plan["options"]["model_blocks"]
    (tmp_path / "data" / units.PLAN).write_text(json.dumps(plan))
    assert main(command) == INTERRUPTED
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(command) == 2


def test_a_teacher_given_as_a_file_is_known_by_its_configuration_too(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    before = fingerprints(tmp_path / "teacher" / WEIGHTS)
    assert before == fingerprints(TEACHER / WEIGHTS)
    config = tmp_path / "teacher/config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprints(tmp_path / "teacher" / WEIGHTS) != before


def test_a_data_set_whose_path_is_not_utf8_is_refused_in_time(tmp_path, capsys):
    videos = write_videos(tmp_path / "videos", "a.mp4")
    assert main([str(videos), str(tmp_path / "\udcff"), *OPTIONS]) == 2
    assert r"\udcff: expected a path in UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "\udcff").exists()
    assert main([str(videos), str(tmp_path / "data"), *OPTIONS]) == 0
    os.rename(tmp_path / "data", tmp_path / "\udcff")
    with pytest.raises(InputError, match="expected a path in UTF-8"):
        PreparedExamples(tmp_path / "\udcff")
