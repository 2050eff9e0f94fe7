"""Prepares training examples from videos and captions."""

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import is_text
from rehyat_jax.files.video import SUFFIXES, find_ffmpeg
from rehyat_jax.generation.codecs import Array
from rehyat_jax.parallel.memory import check_host_memory
from rehyat_jax.preparation.caption_embeddings import CaptionEmbeddings, open_caption_encoder
from rehyat_jax.preparation.captions import Captioned
from rehyat_jax.preparation.clips import ClipReader, Size, read_best_clip
from rehyat_jax.preparation.tables import has_table
from rehyat_jax.preparation.tar_shards import TarShards, find_shards
from rehyat_jax.preparation.units import STORED, Hosts, Plan, UnitWriter, prepare
from rehyat_jax.preparation.video_encoder import VideoEncoder, latent_sizes, open_video_encoder
from rehyat_jax.preparation.video_sources import Rejected, VideoFolder, VideoSource
from rehyat_jax.preparation.video_tables import VideoTable


def prepare_videos(
    source: Path,
    destination: Path,
    *,
    codec: str,
    text_encoder: str,
    models: Path | None,
    video: str = "video",
    caption: str = "caption",
    sizes: Sequence[Size],
    compute_dtype: str,
    dtype: str,
    unit: int,
    workers: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the videos of a folder, of shards or of a table; see `open_video_source` and `prepare`.

    A video becomes one example: its start, at the codec's frame rate, scaled and cropped to one of `sizes`. The video
    must be long and large enough for that size. Among such sizes it is the one that crops least, then the longest, then
    the largest.

    All captions are embedded before the first video is encoded. The devices of this process encode different videos,
    while further ones are decoded.

    Args:
      codec, text_encoder: their names.
      models: path of their weights, for those that have some; see `rehyat_jax.generation.opening`.
      video, caption: see `open_video_source`.
      sizes: sizes of the clips; by default the size for which the codec's models were made.
      compute_dtype: dtype in which a VAE computes.
      dtype: a key of STORED.
      unit: number of videos in a unit.
      workers: number of videos that are decoded at the same time, each in its own process.

    Raises:
      InputError: the videos, their captions, a model, a size or the destination is wrong; the models or the videos do
        not fit into memory; or a video cannot be read on this machine now, and all others are done. An unusable video
        gives no example, and the summary names it.
      NoFfmpeg: this machine has no ffmpeg program.
    """
    find_ffmpeg()  # raises here, before the destination is created
    about = latent_sizes(codec)
    sizes = sorted(set(sizes or [about.default_size]), reverse=True)
    for size in sizes:
        about.latent_shape(*size)
    opened = open_video_source(source, video=video, caption=caption)
    videos = opened.videos
    encoder, caption_encoder = (
        open_video_encoder(codec, models, compute_dtype),
        open_caption_encoder(text_encoder, models),
    )
    options = {"sizes": sizes, "fps": about.fps, "dtype": dtype, **opened.options}
    options |= {**encoder.options, **caption_encoder.options}
    plan = Plan("examples", codec, text_encoder, options, videos, unit)
    embeddings = CaptionEmbeddings(destination, caption_encoder, STORED[dtype])

    with contextlib.ExitStack() as stack:
        reader: ClipReader

        def begin(numbers: list[int]) -> None:
            nonlocal reader
            encoder.check(sizes)
            # Each of the two batches on their way to the devices is in memory as clips, and once more put together.
            clips = workers + (4 + len(sizes)) * encoder.rows
            check_host_memory(
                clips * max(3 * frames * height * width for frames, height, width in sizes),
                f"--workers {workers}: {clips} decoded videos",
                "choose fewer workers or smaller videos",
            )
            embeddings.compute([videos[n].caption for n in numbers if _is_embedded(videos[n])])
            decode = lambda number: read_best_clip(opened, number, sizes, about.fps)
            reader = stack.enter_context(ClipReader(decode, numbers, workers=workers, waiting=encoder.rows))

        def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
            unit = _Unit(videos, embeddings, encoder, STORED[dtype], writer, progress)
            for number in numbers:
                try:
                    clip = reader.take(number)
                    embeddings.check(videos[number].caption)
                except Rejected as error:
                    unit.reject(number, *error.args)
                else:
                    unit.add(number, clip)
            unit.finish()

        return prepare(
            destination, plan, fill, embeddings.null_text, hosts, item="video", begin=begin, codec=encoder.codec
        )


def open_video_source(source: Path, *, video: str, caption: str) -> VideoSource:
    """The videos of a path.

    Args:
      source: a folder with videos, or else with tar shards, or else with a table; or one shard or table file.
      video: column of a table with the videos.
      caption: column of a table, or field of the JSON files in shards, with the captions.

    Raises:
      InputError: the path has none of these, or a list of captions or a schema is wrong; or an optional package is
        missing.
    """
    if source.is_dir() and any(path.suffix.lower() in SUFFIXES and path.is_file() for path in source.rglob("*")):
        return VideoFolder(source)
    if shards := find_shards(source):
        return TarShards(source, shards, caption)
    if has_table(source):
        return VideoTable(source, video, caption)
    if not source.is_dir():
        raise InputError(
            f"{source}: expected a folder of videos, tar shards, Parquet or Arrow files, or one of the last three, "
            f"found none; check the path"
        )
    return VideoFolder(source)


def _is_embedded(video: Captioned) -> bool:
    """True if a video may give an example with its caption; see `read_best_clip`."""
    return video.size is not None and video.caption is not None and is_text(video.name) and is_text(video.caption)


class _Unit:
    """Encodes the clips of a unit in batches of one size, and writes the examples of each size in the videos' order.

    One batch is written while the devices encode the next one.
    """

    def __init__(
        self,
        videos: Sequence[Captioned],
        embeddings: CaptionEmbeddings,
        encoder: VideoEncoder,
        stored: np.dtype,
        writer: UnitWriter,
        progress: tqdm,
    ):
        self._videos, self._embeddings, self._encoder, self._stored = videos, embeddings, encoder, stored
        self._writer, self._progress = writer, progress
        self._waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        self._encoded: deque[tuple[list[int], Array]] = deque()
        self._rejected: dict[int, tuple[str, str]] = {}

    def reject(self, number: int, reason: str, detail: str = "") -> None:
        """A video gives no example."""
        self._rejected[number] = reason, detail
        self._progress.update()

    def add(self, number: int, clip: np.ndarray) -> None:
        """The clip of the next video, uint8 [frames, height, width, 3]."""
        batch = self._waiting.setdefault(clip.shape, [])
        batch.append((number, clip))
        if len(batch) == self._encoder.rows:
            self._encode(self._waiting.pop(clip.shape))

    def finish(self) -> None:
        """Encodes and writes what is left."""
        for batch in self._waiting.values():
            self._encode(batch)
        while self._encoded:
            self._write(*self._encoded.popleft())
        for number, rejected in sorted(self._rejected.items()):
            self._writer.reject(self._videos[number].name, *rejected)

    def _encode(self, batch: list[tuple[int, np.ndarray]]) -> None:
        numbers, clips = zip(*batch, strict=True)
        # Padded, because a smaller batch would compile again.
        padded = np.stack([*clips, *clips[-1:] * (self._encoder.rows - len(clips))])
        self._encoded.append((list(numbers), self._encoder(padded)))
        if len(self._encoded) == 2:
            self._write(*self._encoded.popleft())

    def _write(self, numbers: list[int], latents: Array) -> None:
        for number, row in zip(numbers, np.asarray(latents), strict=False):
            video = self._videos[number]
            example = {"latents": row.astype(self._stored), "text": self._embeddings.get(video.caption)}
            try:
                self._writer.add(example, {"name": video.name, "caption": video.caption})
            except CorruptRecord as error:
                self.reject(number, "not finite", str(error))
                continue
            if excess := self._embeddings.excess(video.caption):
                self._writer.note(video.name, "caption cut", excess)
            self._progress.update()
