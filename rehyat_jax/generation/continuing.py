"""Continues a video file: its last frames become the beginning of the videos that a pipeline samples."""

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import iterate_frames, read_facts
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.streaming import PART_CHUNKS
from rehyat_jax.generation.video_files import enlargement


class Continued(NamedTuple):
    """A video file that is continued.

    Attributes:
      file: the file.
      frames: number of its frames.
      last: its last frames, which the model sees; uint8 [F, height, width, 3].
      scale: factor by which this program enlarged it.
    """

    file: Path
    frames: int
    last: np.ndarray
    scale: int

    def pieces(self, videos: int) -> Iterator[np.ndarray]:
        """All frames in succession, uint8 [videos, 1, height, width, 3], equal for all videos."""
        _, height, width, _ = self.last.shape
        for frames in iterate_frames(self.file):
            yield np.stack([_reduced(frames, self.scale, height, width)] * videos)


def continue_video(pipeline: Pipeline, file: Path, new_frames: int | None) -> tuple[Pipeline, Continued]:
    """The pipeline that samples the last frames of a file together with those that follow.

    The model sees the frames of one part of a stream (`PART_CHUNKS`), in complete chunks if the video has one.

    Args:
      pipeline: the pipeline, with `options.stream` or `options.order` "chunks".
      file: the video.
      new_frames: number of frames that follow; None for the pipeline's default less one.

    Raises:
      InputError: the file is no video, has another size or rate, or the number of frames cannot be added.
    """
    options, factor = pipeline.options, pipeline.time_factor
    new_frames = (options.frames - 1) // factor * factor if new_frames is None else new_frames
    if new_frames % factor:
        nearest = max(round(new_frames / factor), 1) * factor
        raise InputError(
            f"--frames {new_frames}: expected a multiple of {factor} with --continue, which is the number of frames to "
            f"add; the nearest is {nearest}"
        )
    facts, size = read_facts(file), (options.height, options.width)
    scale = 1 if (facts.height, facts.width) == size else enlargement(options.height)
    even = lambda side: side * scale + side * scale % 2
    if (facts.height, facts.width) != size and (facts.height, facts.width) != tuple(map(even, size)):
        raise InputError(
            f"{file}: expected a video of {size[0]}x{size[1]}, found {facts.height}x{facts.width}; give --size "
            f"{facts.height}x{facts.width}, or a video of that size"
        )
    if facts.fps != pipeline.fps:
        raise InputError(
            f"{file}: expected {pipeline.fps} frames per second, as the model makes them, found {float(facts.fps):g}; "
            f"convert it (`ffmpeg -i IN -r {pipeline.fps} OUT`)"
        )
    chunk = pipeline.config.chunk_frames
    kept: collections.deque[np.ndarray] = collections.deque(maxlen=factor * (PART_CHUNKS * chunk - 1) + 1)
    count = 0
    for frames in iterate_frames(file):
        kept.extend(_reduced(frames, scale, *size))
        count += len(frames)
    latents = (len(kept) - 1) // factor + 1
    latents = latents // chunk * chunk or latents
    last = np.stack(list(kept)[-(factor * (latents - 1) + 1) :])
    options = dataclasses.replace(options, frames=len(last) + new_frames)
    return pipeline.with_options(options), Continued(file, count, last, scale)


def skip_frames(pieces: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The pieces [B, F, height, width, 3] of a video without its first `count` frames."""
    for piece in pieces:
        left, count = piece[:, count:], max(count - piece.shape[1], 0)
        if left.shape[1]:
            yield left


def _reduced(frames: np.ndarray, scale: int, height: int, width: int) -> np.ndarray:
    # The middle of each enlarged pixel.
    return frames[:, scale // 2 :: scale, scale // 2 :: scale][:, :height, :width]
