"""Writes sampled videos into files, frame by frame, with their settings and pictures of them."""

import contextlib
import itertools
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.files.mp4 import NoEncoder, Writer, array_file, check_encoder, open_array, open_video
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.files.shown import shown

WATCHABLE_HEIGHT = 240
"""Largest height, in pixels, to which smaller videos are enlarged by an integer factor."""

SHEET_FRAMES = 5
"""Frames of a video on its contact sheet."""


def has_encoder() -> bool:
    """Returns False, after a warning, if this machine cannot encode videos."""
    try:
        check_encoder()
    except NoEncoder as error:
        print(f"warning: {error}; the frames will be written as .npy files", file=sys.stderr)
        return False
    return True


def enlargement(height: int) -> int:
    """The integer factor by which videos of this height are enlarged."""
    return max(1, WATCHABLE_HEIGHT // height)


def write_videos(
    pieces: Iterator[np.ndarray],
    count: int,
    files: Sequence[Path],
    settings: Sequence[dict[str, Any]],
    *,
    fps: int,
    as_arrays: bool = False,
    contact_sheet: bool = False,
) -> dict[Path, str]:
    """Writes B videos into B files, all of them or none. No more than a piece and its successor are in memory.

    Args:
      pieces: the videos in successive pieces, uint8 [B, F, height, width, 3].
      count: frames of all pieces together.
      files: the .mp4 files.
      settings: of each video, to be stored in its file; "prompt" is the title of its contact sheet.
      fps: frames per second.
      as_arrays: write uint8 [frames, height, width, 3] as .npy instead, and replace no file.
      contact_sheet: also write a few frames of each video as .png next to it.

    Returns:
      The written files with descriptions of their videos.

    Raises:
      InputError: a file cannot be written.
    """
    chosen = np.linspace(0, count - 1, min(count, SHEET_FRAMES)).round().astype(int)
    sheets: list[list[np.ndarray]] = [[] for _ in files]
    first = next(pieces)
    _, _, height, width, _ = first.shape
    scale = 1 if as_arrays else enlargement(height)
    written = [array_file(file) if as_arrays else file for file in files]
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for file, own in zip(written, settings, strict=True):
            if as_arrays:
                writer = open_array(file, (count, height, width, 3))
            else:
                writer = open_video(file, fps=fps, scale=scale, settings=own)
            writers.append(stack.enter_context(writer))
        done = 0
        for piece in itertools.chain([first], pieces):
            for frames, write, sheet in zip(piece, writers, sheets, strict=True):
                write(frames)
                sheet += [frames[index - done] for index in chosen if done <= index < done + len(frames)]
            done += piece.shape[1]
    if contact_sheet:
        for file, own, sheet in zip(written, settings, sheets, strict=True):
            _write_sheet(file.with_suffix(".png"), own["prompt"], sheet, chosen)
    enlarged = f", enlarged {scale} times" if scale > 1 else ""
    return dict.fromkeys(written, f"{count} frames of {height}x{width}{enlarged}")


def _write_sheet(file: Path, prompt: str, frames: Sequence[np.ndarray], numbers: np.ndarray) -> None:
    title = "\n".join(textwrap.wrap(shown(prompt), 24, max_lines=5))
    titles = [f"frame {number}" for number in numbers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack a prompt's characters
        save_frames(file, {title: np.stack(frames) / 255}, range(len(frames)), titles=titles, inches=1.6)
