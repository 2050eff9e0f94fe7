"""Videos are written by PyAV, or as arrays without it; ffmpeg reads them, and is found where it is."""

import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
from test_sample_cli import arguments, save_random_model
from videos import read_mp4

from rehyat_jax import prepare, sample
from rehyat_jax.errors import InputError
from rehyat_jax.files import mp4
from rehyat_jax.files.mp4 import NoEncoder, open_video, read_facts, read_settings, write_video
from rehyat_jax.files.video import NoFfmpeg, find_ffmpeg, read_clip

PROGRAM = imageio_ffmpeg.get_ffmpeg_exe()
VIDEO = np.linspace(0, 1, 2 * 8 * 16 * 3).reshape(2, 8, 16, 3)


def without_program():
    raise RuntimeError("No ffmpeg exe could be found.")


@pytest.fixture(params=["no package", "no program"])
def without_ffmpeg(request, monkeypatch, tmp_path):
    """Either imageio-ffmpeg is missing, or it has no program; nor has PATH. Returns PATH's one folder."""
    if request.param == "no package":
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    else:
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", without_program)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def test_no_command_needs_imageio_ffmpeg_to_start():
    modules = "train, rehyat_jax.convert, rehyat_jax.sample, rehyat_jax.prepare, rehyat_jax.demo.report"
    code = f"import sys; sys.modules['imageio_ffmpeg'] = None; import rehyat_jax.{modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_machines_own_ffmpeg_is_used(without_ffmpeg, tmp_path):
    (without_ffmpeg / "ffmpeg").symlink_to(PROGRAM)
    assert find_ffmpeg() == str(without_ffmpeg / "ffmpeg")
    assert write_video(tmp_path / "a.mp4", VIDEO, scale=2) == tmp_path / "a.mp4"
    assert read_clip(tmp_path / "a.mp4", fps=16, frames=2, height=8, width=16).shape == VIDEO.shape


def test_a_missing_ffmpeg_is_explained(without_ffmpeg, tmp_path):
    for use in (
        find_ffmpeg,
        lambda: read_clip(tmp_path / "a.mp4", fps=16, frames=2, height=8, width=16),
    ):
        with pytest.raises(
            NoFfmpeg, match=r"expected .* imageio-ffmpeg or ffmpeg on PATH, found neither .*pip install"
        ):
            use()
    assert issubclass(NoFfmpeg, InputError) and list(tmp_path.iterdir()) == [without_ffmpeg]


@pytest.fixture(params=["no package", "no H.264"])
def without_encoder(request, monkeypatch):
    if request.param == "no package":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr(mp4, "CODEC", "h264_of_nobody")


def test_sampling_without_an_encoder_keeps_the_frames(without_encoder, tmp_path, capsys):
    checkpoint = save_random_model(tmp_path / "model")
    assert sample.main(arguments(checkpoint, tmp_path / "new" / "a.mp4", batch=2)) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a_0.npy", "a_1.npy"]
    frames = np.load(tmp_path / "new" / "a_0.npy")
    assert frames.shape == (2, 8, 16, 3) and frames.dtype == np.uint8 and frames.std() > 0
    output = capsys.readouterr()
    assert f"wrote {tmp_path / 'new' / 'a_1.npy'}: 2 frames of 8x16\n" in output.out
    assert "warning: videos need the package av" in output.err and "written as .npy files" in output.err


def test_a_video_without_an_encoder_is_an_array_that_replaces_nothing(without_encoder, tmp_path, capsys):
    (tmp_path / "a.npy").write_text("earlier")
    assert write_video(tmp_path / "a.mp4", VIDEO, scale=2) == tmp_path / "a_1.npy"
    np.testing.assert_array_equal(np.load(tmp_path / "a_1.npy"), (VIDEO * 255).round())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a_1.npy"]
    assert "a_1.npy has the frames instead: uint8" in capsys.readouterr().err


def test_frames_and_settings_are_those_that_were_given(tmp_path):
    rng = np.random.default_rng(0)
    # Smooth: neighbouring pixels share their colour in yuv420p.
    frames = np.repeat(np.repeat(rng.integers(0, 256, (5, 3, 5, 3), dtype=np.uint8), 8, axis=1), 8, axis=2)
    settings = {"prompt": "猫 'a' \"b\" = ; # \\ \n" * 500, "steps": 50, "shift": 3.5, "longest": None}
    with open_video(tmp_path / "new" / "a.mp4", fps=24, settings=settings) as write:
        write(frames[:1])
        write(frames[1:])
        assert not (tmp_path / "new" / "a.mp4").exists()
    video, fps = read_mp4(tmp_path / "new" / "a.mp4")
    assert video.shape == frames.shape and fps == 24
    # Of random colours in H.264 at crf 17, limited to video range; a wrong frame or channel differs by 80.
    assert np.abs(video.astype(int) - frames).mean() < 8
    assert read_settings(tmp_path / "new" / "a.mp4") == settings
    facts = read_facts(tmp_path / "new" / "a.mp4")
    assert (facts.height, facts.width, facts.fps) == (24, 40, 24)


def test_a_stopped_video_leaves_nothing(tmp_path):
    (tmp_path / "a.mp4").write_text("earlier")
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / "a.mp4", fps=16) as write:
        write(np.zeros((3, 16, 16, 3), np.uint8))
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_files_without_settings_are_explained(tmp_path):
    write_video(tmp_path / "a.mp4", VIDEO)
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a\.mp4: has no settings in its comment"):
        read_settings(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"b\.mp4: is not a readable video"):
        read_settings(tmp_path / "b.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    assert b"avc1" in content and b"Lavf" in content
    (tmp_path / "c.mp4").write_bytes(content.replace(b"avc1", b"none"))
    with pytest.raises(InputError, match=r"c\.mp4: its video has no codec"):
        read_settings(tmp_path / "c.mp4")
    (tmp_path / "d.mp4").write_bytes(content.replace(b"Lavf", b"\xff\xfe\xff\xfe"))  # in the metadata
    with pytest.raises(InputError, match=r"d\.mp4: has no settings in its comment"):
        read_settings(tmp_path / "d.mp4")
    assert issubclass(NoEncoder, InputError)


def test_preparing_videos_without_ffmpeg_ends_before_anything_is_made(tmp_path, capsys, without_ffmpeg):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "a.txt").write_text("a seven")
    assert prepare.main([str(tmp_path / "videos"), str(tmp_path / "data")]) == 2
    assert "error: videos need the ffmpeg program" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
