"""Writing videos to MP4 files and reading them back, with the ffmpeg program that imageio-ffmpeg brings."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from rehyat_jax.files import written_whole


def write_mp4(path: str | Path, video: np.ndarray, *, fps: int = 16, scale: int = 1) -> None:
    """Writes an H.264 file that every player understands (yuv420p). A file already at `path` is replaced at the end.

    Args:
      path: the file; missing directories are created.
      video: [frames, height, width, 3] floating point in [0, 1] (clipped to it), or uint8.
      fps: frames per second.
      scale: whole number of times to enlarge, without smoothing, so that a tiny video can be watched. A height or width
        that is still odd is repeated once at the edge, because the format needs even ones.

    Raises:
      ValueError: another shape or type, a value that is not finite, or a scale below 1.
      OSError: ffmpeg failed; the message is its own.
    """
    if scale < 1:
        raise ValueError(f"scale: expected a whole number of at least 1, found {scale}")
    pixels = _as_bytes(np.asarray(video))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    height, width = pixels.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)]
    # crf 17 is visually lossless; without yuv420p, RGB input gives a file that most players refuse.
    encoding = ["-c:v", "libx264", "-crf", "17", "-pix_fmt", "yuv420p", "-f", "mp4"]
    with written_whole(path) as temporary:
        # imageio-ffmpeg brings the program, but its own writer forks this process, which JAX's threads make unsafe.
        ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y"]
        run = subprocess.run(
            [*ffmpeg, *source, "-i", "-", *encoding, temporary], input=pixels.tobytes(), stderr=subprocess.PIPE
        )
        if run.returncode:
            raise OSError(f"{path}: ffmpeg could not write the video: {run.stderr.decode(errors='replace').strip()}")


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """([frames, height, width, 3] uint8, frames per second). Raises OSError if `path` is not a readable video."""
    reader = imageio_ffmpeg.read_frames(str(path))
    metadata = next(reader)
    width, height = metadata["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.stack(frames), metadata["fps"]


def _as_bytes(video: np.ndarray) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video: expected [frames, height, width, 3], found shape {video.shape}")
    if video.dtype == np.uint8:
        return video
    if video.dtype.kind not in "fV":  # bfloat16 is of kind V.
        raise ValueError(f"video: expected floating point in [0, 1] or uint8, found {video.dtype}")
    video = video.astype(np.float32)
    if not np.isfinite(video).all():
        raise ValueError("video: expected finite values, found NaN or infinity; look at the latents it comes from")
    return (video.clip(0, 1) * 255).round().astype(np.uint8)
