"""Still pictures of videos, for reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rehyat_jax.files.write import written_whole


def save_frames(
    path: str | Path,
    videos: Mapping[str, np.ndarray],
    frames: Sequence[int],
    *,
    titles: Sequence[str] | None = None,
    inches: float = 0.8,
) -> None:
    """Writes a PNG with one row for each video and one column for each chosen frame.

    Args:
      path: the file; replaced only when the picture is complete.
      videos: title of the row -> its video, [T, height, width, 3] in [0, 1].
      frames: indices of the frames to show.
      titles: titles of the columns; by default "frame" and the index.
      inches: height and width of a frame, at 100 pixels an inch.
    """
    if not videos or not frames:
        raise ValueError(f"expected at least one video and one frame, found {len(videos)} and {len(frames)}")
    from matplotlib.figure import Figure  # not at the top: a command starts sooner without

    figure = Figure(figsize=(inches * len(frames) + 1.5, inches * len(videos) + 0.3), layout="constrained", dpi=100)
    grid = figure.subplots(len(videos), len(frames), squeeze=False)
    for row, (title, video) in zip(grid, videos.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8, parse_math=False)
        for axes, frame in zip(row, frames, strict=True):
            axes.imshow(np.clip(video[frame], 0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], titles or [f"frame {frame}" for frame in frames], strict=True):
        axes.set_title(title, fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
