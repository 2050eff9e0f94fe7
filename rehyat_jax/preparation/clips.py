"""Clips of videos, decoded ahead by several processes of ffmpeg."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from rehyat_jax.files.video import UnreadableVideo, frame_size, read_clip
from rehyat_jax.preparation.units import NotNow
from rehyat_jax.preparation.video_sources import Rejected, VideoSource, checked

Size = tuple[int, int, int]
"""Frames, height and width of a video."""


class ClipReader:
    """Decodes clips ahead, in a given order, while others are encoded. A context, which ends the decoding.

    Args:
      decode: number of a video -> its clip, as `read_best_clip` returns it.
      numbers: the videos, in the order in which they will be taken; some may be left out.
      workers: number of videos that are decoded at the same time.
      waiting: number of further clips that may wait in memory.
    """

    def __init__(self, decode: Callable[[int], np.ndarray], numbers: Sequence[int], *, workers: int, waiting: int):
        self._decode, self._later = decode, deque(numbers)
        self._ahead: deque[tuple[int, Future[np.ndarray]]] = deque()
        self._most = workers + waiting
        self._pool = ThreadPoolExecutor(workers)

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> np.ndarray:
        """The clip of a video; those of earlier videos that were not taken are dropped.

        Raises:
          Rejected: the video gives no example.
          NotNow: this machine cannot read it now.
        """
        found = None
        while found != number:
            self._start(number)
            found, clip = self._ahead.popleft()
            clip.cancel() if found != number else None
        self._start(number)
        try:
            return clip.result()
        except OSError as error:
            raise NotNow(str(error)) from error

    def _start(self, number: int) -> None:
        while self._later and len(self._ahead) < self._most:
            try:
                self._ahead.append((self._later[0], self._pool.submit(self._decode, self._later[0])))
            except RuntimeError as error:  # no thread for it
                raise NotNow(f"video {number}: {error}") from error
            self._later.popleft()


def read_best_clip(source: VideoSource, number: int, sizes: Sequence[Size], fps: int) -> np.ndarray:
    """The start of a video, in the size that loses least; see `prepare_videos`.

    Returns:
      uint8 [frames, height, width, 3] of one of the sizes.

    Raises:
      Rejected: the video gives no example.
      OSError: this machine cannot read it now.
    """
    checked(source.videos[number], source.faults.get(number))
    with source.file(number) as path:
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
            # ffmpeg may repeat the path, which is another one each time if the video was copied out of a shard.
            reason = str(error).removeprefix(f"{path}: ").replace(str(path), "the video")
            raise Rejected("unreadable", reason) from error
    raise Rejected("too short", f"{len(clip)} frames at {fps} a second, expected at least {min(fitting)[0]}")


def _kept(rows: float, columns: float) -> float:
    """The share of a picture that remains after cropping, rounded so that equal proportions compare as equal."""
    return round(min(rows, columns) / max(rows, columns), 6)
