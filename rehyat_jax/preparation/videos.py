"""Prepares training examples from videos and captions."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import is_text
from rehyat_jax.files.video import UnreadableVideo, find_ffmpeg, frame_size, read_clip
from rehyat_jax.generation.opening import get_codec, get_text_encoder
from rehyat_jax.preparation.captions import Captioned, captioned_videos
from rehyat_jax.preparation.units import STORED, Hosts, NotNow, Plan, UnitWriter, prepare

Size = tuple[int, int, int]
"""Frames, height and width of a video."""


class Rejected(Exception):
    """A video gives no example; the arguments are (reason, detail)."""


def prepare_videos(
    source: Path,
    destination: Path,
    *,
    codec: str,
    text_encoder: str,
    sizes: Sequence[Size],
    dtype: str,
    unit: int,
    workers: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the videos of a folder; see `captioned_videos` and `prepare`.

    A video becomes one example: its start, at the codec's frame rate, scaled and cropped to one of `sizes`. The video
    must be long and large enough for that size. Among such sizes it is the one that crops least, then the longest, then
    the largest.

    Args:
      sizes: sizes of the clips; by default the size for which the codec's models were made.
      dtype: a key of STORED.
      unit: number of videos in a unit.
      workers: number of videos that are decoded at the same time, each in its own process.

    Raises:
      InputError: the videos, their captions, a size or the destination is wrong; or a video cannot be read on this
        machine now, and all others are done. An unusable video gives no example, and the summary names it.
      NoFfmpeg: this machine has no ffmpeg program.
    """
    find_ffmpeg()  # raises here, before the destination is created
    the_codec, the_encoder = get_codec(codec), get_text_encoder(text_encoder)
    sizes = sorted(set(sizes or [the_codec.default_size]), reverse=True)
    for size in sizes:
        the_codec.latent_shape(*size)
    videos = captioned_videos(source)
    options = {"sizes": sizes, "fps": the_codec.fps, "dtype": dtype}
    plan = Plan("examples", codec, text_encoder, options, videos, unit)
    stored = STORED[dtype]

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        chosen = [videos[number] for number in numbers]
        for video, clip in zip(chosen, _clips(source, chosen, sizes, the_codec.fps, workers), strict=True):
            try:
                pixels = clip.result()
            except Rejected as error:
                writer.reject(video.name, *error.args)
                progress.update()
                continue
            except OSError as error:
                raise NotNow(str(error)) from error
            try:
                latents = the_codec.encode(pixels[None].astype(np.float32) / 255)[0]
                text = _embedded(the_encoder, video.caption)
                example = {"latents": np.asarray(latents).astype(stored), "text": text.astype(stored)}
                writer.add(example, {"name": video.name, "caption": video.caption})
            except Rejected as error:
                writer.reject(video.name, *error.args)
            except CorruptRecord as error:
                writer.reject(video.name, "not finite", str(error))
            progress.update()

    return prepare(destination, plan, fill, lambda: the_encoder([""])[0], hosts, item="video")


def _clips(
    folder: Path, videos: Sequence[Captioned], sizes: Sequence[Size], fps: int, workers: int
) -> Iterator[Future[np.ndarray]]:
    """The clips in order, each [frames, height, width, 3] uint8 or an exception of `_clip`; some are decoded ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for video in videos:
            try:
                ahead.append(pool.submit(_clip, folder, video, sizes, fps))
            except RuntimeError as error:  # no thread for it
                raise NotNow(f"{video.name}: {error}") from error
            if len(ahead) > workers:
                yield ahead.popleft()
        yield from ahead


def _clip(folder: Path, video: Captioned, sizes: Sequence[Size], fps: int) -> np.ndarray:
    """The clip of a video. Raises Rejected, or OSError if this machine cannot read it now."""
    if video.size is None:
        raise Rejected("no such video", "it has a caption")
    if not is_text(video.name):
        raise Rejected("name refused", "expected a name in UTF-8; rename the file")
    if video.caption is None:
        raise Rejected("no caption")
    if not is_text(video.caption):
        raise Rejected("caption refused", "expected Unicode text, found half of a surrogate pair; correct the caption")
    path = folder / video.name
    try:
        height, width = frame_size(path)
        fitting = sorted(
            (size for size in sizes if size[1] <= height and size[2] <= width),
            key=lambda size: _kept(height / size[1], width / size[2]),
            reverse=True,
        )
        if not fitting:
            smallest = min(sizes, key=lambda size: size[1] * size[2])
            raise Rejected("too small", f"{height}x{width}, expected at least {smallest[1]}x{smallest[2]}")
        for frames, height, width in fitting:
            clip = read_clip(path, fps=fps, frames=frames, height=height, width=width)
            if len(clip) == frames:
                return clip
    except UnreadableVideo as error:
        raise Rejected("unreadable", str(error).removeprefix(f"{path}: ")) from error
    raise Rejected("too short", f"{len(clip)} frames at {fps} a second, expected at least {min(fitting)[0]}")


def _kept(rows: float, columns: float) -> float:
    """The share of a picture that remains after cropping, rounded so that equal proportions compare as equal."""
    return round(min(rows, columns) / max(rows, columns), 6)


def _embedded(text_encoder, caption: str) -> np.ndarray:
    try:
        return text_encoder([caption])[0]
    except InputError as error:
        raise Rejected("caption refused", str(error)) from error
