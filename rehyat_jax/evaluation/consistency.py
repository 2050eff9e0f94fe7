"""Measures of videos frame by frame: the change to the next frame, jumps between chunks, sharpness."""

import numpy as np


def frame_changes(videos: np.ndarray) -> np.ndarray:
    """Mean absolute change of pixels from each frame to the next: [N, F, height, width, 3] in [0, 1] -> [N, F - 1]."""
    return np.stack([np.abs(np.diff(video, axis=0)).mean((1, 2, 3)) for video in np.asarray(videos)])


def sharpness(videos: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels in each frame: [N, F, height, width, 3] -> [N, F]."""
    videos = np.asarray(videos)
    rows, columns = (np.abs(np.diff(videos, axis=axis)).mean((2, 3, 4)) for axis in (2, 3))
    return (rows + columns) / 2


def chunk_changes(frames: int, time_factor: int, chunk_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in `frame_changes` that lead from chunk to chunk, and those from latent frame to latent frame within.

    Changes within a latent frame are of another kind, because a codec decodes these frames together.

    Args:
      frames: frames of the video.
      time_factor: frames of a latent frame, except the first one, which is a single frame.
      chunk_frames: latent frames of a chunk.

    Returns:
      Two booleans [frames - 1]. There is no boundary if the video is one chunk.
    """
    frame = np.arange(1, frames)  # the frame that a change leads to
    begins = (frame - 1) % time_factor == 0
    latent_frame = (frame - 1) // time_factor + 1
    is_boundary = latent_frame % chunk_frames == 0
    return begins & is_boundary, begins & ~is_boundary


def jump(changes: np.ndarray, at: np.ndarray, within: np.ndarray) -> float:
    """The mean of some changes over the mean of others: 1 if nobody can see that `at` are special.

    Args:
      changes: [N, F - 1], from `frame_changes`.
      at, within: booleans [F - 1].
    """
    return float(changes[:, at].mean() / changes[:, within].mean())
