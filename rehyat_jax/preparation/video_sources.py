"""Where videos and their captions come from: a folder of files, WebDataset's tar shards, or a table of a data set."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rehyat_jax.files.shown import is_text
from rehyat_jax.preparation.captions import Captioned, captioned_videos

LARGEST_VIDEO = 2**32
"""Largest size in bytes of a video in a shard or a table; it is copied into a temporary file, which ffmpeg reads."""


class Rejected(Exception):
    """A video gives no example; the arguments are (reason, detail)."""


class VideoSource(Protocol):
    """Videos in a fixed order, which several threads may read.

    Attributes:
      videos: the videos and their captions; names and captions are not trusted.
      faults: (reason, detail) by the number of a video, for those of which the list is damaged.
      options: JSON values that identify the source, in addition to the list of videos.
    """

    videos: Sequence[Captioned]
    faults: Mapping[int, tuple[str, str]]
    options: dict[str, Any]

    def file(self, number: int) -> contextlib.AbstractContextManager[Path]:
        """A context with the path of a video's file, for a video without a fault.

        Raises:
          Rejected: the shard or the table is damaged there.
          OSError: this machine cannot read it now.
        """


class VideoFolder:
    """A folder of videos; see `captioned_videos`. Raises InputError as it does."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.videos = captioned_videos(folder)
        self.faults: dict[int, tuple[str, str]] = {}
        self.options: dict[str, Any] = {}

    def file(self, number: int) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(self._folder / self.videos[number].name)


@contextlib.contextmanager
def copied(pieces: Iterable[bytes | memoryview]) -> Iterator[Path]:
    """A context with a temporary file of these bytes. Raises OSError if it cannot be written."""
    with tempfile.TemporaryDirectory(prefix="rehyat_video_") as folder:
        file = Path(folder) / "video"
        with file.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
        yield file


def checked(video: Captioned, fault: tuple[str, str] | None) -> str:
    """The caption of a video. Raises Rejected if the list alone shows that the video gives no example."""
    if fault:
        raise Rejected(*fault)
    if video.size is None:
        raise Rejected("no such video", "it has a caption")
    if not is_text(video.name):
        raise Rejected("name refused", "expected a name in UTF-8; rename the file")
    if video.caption is None:
        raise Rejected("no caption")
    if not is_text(video.caption):
        raise Rejected("caption refused", "expected Unicode text, found half of a surrogate pair; correct the caption")
    return video.caption
