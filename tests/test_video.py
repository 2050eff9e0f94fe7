"""The ffmpeg program is found where it is; without it, sampling keeps its frames and preparation ends at once."""

import shutil
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
from test_sample_cli import arguments, save_random_model

from rehyat_jax import prepare, sample
from rehyat_jax.errors import InputError
from rehyat_jax.files.video import NoFfmpeg, find_ffmpeg, read_clip, write_mp4, write_video

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
        lambda: write_mp4(tmp_path / "a.mp4", VIDEO),
        lambda: read_clip(tmp_path / "a.mp4", fps=16, frames=2, height=8, width=16),
    ):
        with pytest.raises(
            NoFfmpeg, match=r"expected .* imageio-ffmpeg or ffmpeg on PATH, found neither .*pip install"
        ):
            use()
    assert issubclass(NoFfmpeg, InputError) and list(tmp_path.iterdir()) == [without_ffmpeg]


def test_sampling_without_ffmpeg_keeps_the_frames(without_ffmpeg, tmp_path, capsys):
    checkpoint = save_random_model(tmp_path / "model")
    assert sample.main(arguments(checkpoint, tmp_path / "new" / "a.mp4", batch=2)) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a_0.npy", "a_1.npy"]
    frames = np.load(tmp_path / "new" / "a_0.npy")
    assert frames.shape == (2, 8, 16, 3) and frames.dtype == np.uint8 and frames.std() > 0
    output = capsys.readouterr()
    assert f"wrote {tmp_path / 'new' / 'a_1.npy'}: 2 frames of 8x16\n" in output.out
    assert "warning: " in output.err and "pip install imageio-ffmpeg" in output.err
    assert "a_0.npy has the frames instead: uint8 [frames, height, width, 3]" in output.err


def test_an_ffmpeg_that_fails_loses_no_frames(tmp_path, capsys, monkeypatch):
    # As one without H.264.
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: shutil.which("false"))
    assert write_video(tmp_path / "a.mp4", VIDEO) == tmp_path / "a.npy"
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), (VIDEO * 255).round())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert "ffmpeg could not write the video" in capsys.readouterr().err


def test_preparing_videos_without_ffmpeg_ends_before_anything_is_made(tmp_path, capsys, without_ffmpeg):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "a.txt").write_text("a seven")
    assert prepare.main([str(tmp_path / "videos"), str(tmp_path / "data")]) == 2
    assert "error: videos need the ffmpeg program" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
