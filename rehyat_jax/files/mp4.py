"""Writes MP4 files frame by frame, with PyAV, and reads them again with the settings that are stored in them."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole

CODEC = "libx264"
"""FFmpeg's encoder. H.264 in yuv420p is what every player supports."""


class NoEncoder(InputError):
    """This machine cannot encode videos."""


class Writer(Protocol):
    """The function that `open_video` gives."""

    def __call__(self, frames: np.ndarray) -> None:
        """Appends uint8 frames [F, height, width, 3]."""


def check_encoder() -> None:
    """Raises NoEncoder unless PyAV is installed with an encoder of H.264."""
    try:
        import av  # not at the top: commands that write no videos do not need it

        av.codec.Codec(CODEC, "w")
    except (ImportError, ValueError) as error:
        raise NoEncoder(
            f"videos need the package av with {CODEC}, found: {shown(error)}; `pip install --force-reinstall av`"
        ) from error


@contextlib.contextmanager
def open_video(
    path: str | Path, *, fps: int, scale: int = 1, settings: Mapping[str, Any] | None = None
) -> Iterator[Writer]:
    """Yields a function that appends frames to an MP4 file; the file appears, complete, when the block ends.

    Memory does not grow with the length.

    Args:
      path: the file; missing directories are created, and an earlier file is replaced at the end.
      fps: frames per second.
      scale: integer factor of enlargement, without smoothing, which makes a tiny video watchable. If a height or width
        is still odd, its last row or column is repeated once, because the format needs even sizes.
      settings: JSON values, to be stored in the file as its comment; see `read_settings`.

    Raises:
      NoEncoder: see `check_encoder`.
      InputError: the file cannot be written.
    """
    check_encoder()
    import av

    with (
        _reported_encoder_errors(path),
        reported_write_errors(path),
        written_whole(path) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        if settings is not None:
            container.metadata["comment"] = json.dumps(settings, ensure_ascii=False)
        stream: Any = None

        def append(frames: np.ndarray) -> None:
            nonlocal stream
            for pixels in enlarged(frames, scale):
                if stream is None:
                    # crf 17 is visually lossless.
                    stream = container.add_stream(CODEC, rate=fps, options={"crf": "17"})
                    stream.height, stream.width = pixels.shape[:2]
                    stream.pix_fmt = "yuv420p"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

        yield append
        if stream is None:
            raise ValueError(f"{path}: expected at least one frame, found none")
        container.mux(stream.encode(None))


@contextlib.contextmanager
def _reported_encoder_errors(path: str | Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.FFmpegError as error:
        raise InputError(f"{path}: could not be encoded ({shown(error)}); choose another size or rate") from error


@contextlib.contextmanager
def open_array(path: str | Path, shape: tuple[int, ...]) -> Iterator[Writer]:
    """`open_video` for machines without an encoder: the frames as a NumPy file, uint8 [frames, height, width, 3].

    Args:
      path: the file.
      shape: of the complete video.

    Raises:
      InputError: the file cannot be written.
    """
    with reported_write_errors(path), written_whole(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
        )

        def append(frames: np.ndarray) -> None:
            file.write(np.ascontiguousarray(frames).data)

        yield append


def array_file(path: Path) -> Path:
    """The file of `open_array` in place of a video: path's name with .npy, or _1.npy and so on if that exists."""
    array, number = path.with_suffix(".npy"), 0
    while os.path.lexists(array):
        number += 1
        array = path.with_name(f"{path.stem}_{number}.npy")
    return array


def write_video(path: str | Path, video: np.ndarray, *, fps: int = 16, scale: int = 1) -> Path:
    """Writes a complete video, [frames, height, width, 3] floating point in [0, 1] or uint8; see `open_video`.

    On a machine without an encoder, the frames are written as an array that is not enlarged. A warning on stderr gives
    the reason. No file that exists is replaced by an array, because the caller did not name it.

    Returns:
      The written file.

    Raises:
      ValueError: the shape or type is wrong, or a value is not finite.
      InputError: the file cannot be written.
    """
    pixels = as_bytes(np.asarray(video))
    try:
        check_encoder()
    except NoEncoder as error:
        array = array_file(Path(path))
        with open_array(array, pixels.shape) as write:
            write(pixels)
        print(f"warning: {error}", file=sys.stderr)
        print(f"warning: {array} has the frames instead: uint8 [frames, height, width, 3]", file=sys.stderr)
        return array
    with open_video(path, fps=fps, scale=scale) as write:
        write(pixels)
    return Path(path)


class VideoFacts(NamedTuple):
    """Facts about a video file: its size in pixels, its frames per second, and its settings, if it has some."""

    height: int
    width: int
    fps: Fraction
    settings: dict[str, Any] | None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yields PyAV's container and its video stream. Raises InputError if the file is no readable video."""
    check_encoder()
    import av

    check_regular_file(path)
    try:
        # Other programs' metadata may be no UTF-8.
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{path}: its video has no codec that this PyAV knows; give another file")
            yield container, stream
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{path}: is not a readable video ({shown(error)}); give another file") from error


def read_facts(path: Path) -> VideoFacts:
    """The facts of a video that this program or another one wrote. Raises InputError if the file is no video."""
    with _opened(path) as (container, stream):
        facts = VideoFacts(stream.height, stream.width, Fraction(stream.average_rate or 0), None)
        comment = container.metadata.get("comment", "")
    with contextlib.suppress(ValueError):
        settings = json.loads(comment)
        if isinstance(settings, dict):
            return facts._replace(settings=settings)
    return facts


def iterate_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video in succession, uint8 [1, height, width, 3]; one is in memory.

    Raises:
      InputError: the file is no video, or has no frames.
    """
    with _opened(path) as (container, stream):
        is_empty = True
        for frame in container.decode(stream):
            is_empty = False
            yield frame.to_ndarray(format="rgb24")[None]
    if is_empty:
        raise InputError(f"{path}: has no frames; give another file")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `open_video` stored in a file. Raises InputError if it has none, or is no video."""
    settings = read_facts(path).settings
    if settings is None:
        raise InputError(f"{path}: has no settings in its comment; expected a video that this program wrote")
    return settings


def enlarged(frames: np.ndarray, scale: int) -> np.ndarray:
    """uint8 frames [F, height, width, 3], `scale` times larger, with even sizes.

    Raises:
      ValueError: the shape or type is wrong, or the scale is below 1.
    """
    if scale < 1:
        raise ValueError(f"scale: expected a whole number of at least 1, found {scale}")
    pixels = as_bytes(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    return np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")


def as_bytes(video: np.ndarray) -> np.ndarray:
    """A video [frames, height, width, 3], floating point in [0, 1] (clipped to it) or uint8, as uint8.

    Raises:
      ValueError: the shape or type is wrong, or a value is not finite.
    """
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
