"""Prepares training examples from tables of latents: FastVideo's Parquet files, or a column of a data set."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.manifest import NULL_TEXT
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.codecs import LATENT_SIZES
from rehyat_jax.generation.opening import get_codec
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.preparation import fastvideo
from rehyat_jax.preparation.caption_embeddings import CaptionEmbeddings, open_caption_encoder
from rehyat_jax.preparation.tables import Damaged, Table
from rehyat_jax.preparation.units import STORED, Hosts, NotNow, Plan, UnitWriter, prepare
from rehyat_jax.preparation.video_sources import Rejected, checked
from rehyat_jax.weights.models import VAES
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUTS = ("CTHW", "THWC")
"""Orders of the axes of stored latents: channels, frames, height, width."""


class LatentColumn(NamedTuple):
    """What a table does not say about its latents.

    Attributes:
      normalised: whether they are normalised as the codec does, or as its encoder computes them.
      layout: one of `LAYOUTS`; FastVideo's is known.
      column: column of nested lists, for other tables than FastVideo's.
      caption: column of captions.
      embed_captions: whether the captions are embedded, and not the stored embeddings of FastVideo used.
    """

    normalised: bool
    layout: str | None
    column: str
    caption: str
    embed_captions: bool


def prepare_latent_table(
    source: Path,
    destination: Path,
    about: LatentColumn,
    *,
    codec: str,
    text_encoder: str,
    models: Path | None,
    dtype: str,
    unit: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the rows of a table; see `Table`, `rehyat_jax.preparation.fastvideo` and `prepare`.

    Latents must have the shape that the codec gives to a video. FastVideo's text embeddings are stored as they are,
    if they have the width and at most the length of the text encoder's. The embeddings of other tables are computed
    from the captions.

    Args:
      codec, text_encoder: names of the models that computed them, which the model to be trained must name too.
      models: path of their weights. The codec's are for the contact sheet, and its configuration has the statistics of
        latents. The text encoder's are needed where captions are embedded, or `source` has no null text.
      dtype: a key of STORED.
      unit: number of rows in a unit.

    Raises:
      InputError: the table, an option or the destination is wrong; or a row cannot be read on this machine now, and all
        others are done. A row that does not fit gives no example, and the summary names it.
    """
    if codec not in LATENT_SIZES:
        raise InputError(f"--codec {codec}: expected one of {', '.join(LATENT_SIZES)}, whose latents can be checked")
    table = Table(source, about.caption)
    is_fastvideo = fastvideo.is_fastvideo(table.schema.names)
    if is_fastvideo:
        fastvideo.check_schema(source, table.schema.names)
        if about.layout not in (None, "CTHW"):
            raise InputError(f"--layout {about.layout}: FastVideo's latents are CTHW; leave the option out")
    else:
        table.require([about.column], "give the name of the latents: --latents NAME")
        if about.layout is None:
            raise InputError(f"{source}: give the order of the axes of its latents: --layout {' or '.join(LAYOUTS)}")
    reader = _Reader(table, about, codec, _statistics(codec, models, about.normalised), is_fastvideo)
    embeds = about.embed_captions or not is_fastvideo
    text = _Text(source, destination, text_encoder, models, STORED[dtype], embeds)

    inputs = table.inputs
    options = {"dtype": dtype, **about._asdict(), **table.options, **text.options}
    plan = Plan("examples", codec, text_encoder, options, inputs, unit)

    def usable(number: int) -> bool:
        try:
            return bool(checked(inputs[number], table.faults.get(number)))
        except Rejected:
            return False

    def begin(numbers: list[int]) -> None:
        text.begin([str(inputs[number].caption) for number in numbers if embeds and usable(number)])

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        for number in numbers:
            name, _, caption = inputs[number]
            try:
                fault = table.faults.get(number)
                if embeds or fault or caption is not None:  # stored embeddings need no caption
                    checked(inputs[number], fault)
                latents, stored = reader.read(number)
                example = {"latents": latents, "text": text.get(stored, caption)}
                with np.errstate(over="ignore"):  # an infinity is refused next
                    example = {key: value.astype(STORED[dtype]) for key, value in example.items()}
                writer.add(example, {"name": name, "caption": caption or ""})
            except Rejected as error:
                writer.reject(name, *error.args)
            except CorruptRecord as error:
                writer.reject(name, "not an example", str(error))
            except Damaged as error:
                writer.reject(name, "damaged file", str(error))
            else:
                if embeds and (excess := text.excess(str(caption))):
                    writer.note(name, "caption cut", excess)
            progress.update()

    decoder = lambda: get_codec(codec, models)
    return prepare(destination, plan, fill, text.null, hosts, item="row", begin=begin, codec=decoder)


class _Reader:
    """Latents, and FastVideo's text embeddings, of the rows of a table."""

    def __init__(
        self,
        table: Table,
        about: LatentColumn,
        codec: str,
        statistics: tuple[np.ndarray, np.ndarray],
        is_fastvideo: bool,
    ):
        self._table, self._about, self._codec = table, about, codec
        self._mean, self._std = statistics
        self._is_fastvideo = is_fastvideo
        self._columns = [about.column]
        if is_fastvideo:
            names = (fastvideo.LATENTS, *(() if about.embed_captions else (fastvideo.TEXT, fastvideo.MASK)))
            wanted = [column for name in names for column in fastvideo.columns(name)]
            self._columns = [column for column in wanted if column in table.schema.names]

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(normalised latents [T, H, W, C], text embedding [n, text_dim] or None).

        Raises:
          CorruptRecord: the row has no such tensors, or they do not fit the codec.
          Damaged: the file is damaged there.
          NotNow: this machine cannot read it now.
        """
        try:
            row = self._table.row(number, self._columns)
        except OSError as error:
            raise NotNow(f"{self._table.inputs[number].name}: {error}") from error
        text = None
        if self._is_fastvideo:
            latents = fastvideo.tensor(row, fastvideo.LATENTS, 4)
            text = None if self._about.embed_captions else fastvideo.text(row)
        else:
            latents = _nested(row[self._about.column])
        if self._is_fastvideo or self._about.layout == "CTHW":
            latents = np.moveaxis(latents, 0, -1)
        self._check(latents.shape)
        return (latents.astype(np.float32) - self._mean) / self._std, text

    def _check(self, shape: tuple[int, ...]) -> None:
        sizes = LATENT_SIZES[self._codec]
        try:
            expected = sizes.latent_shape(*sizes.video_size(*shape[:3]))
        except InputError:
            expected = None
        if shape != expected:
            raise CorruptRecord(
                f"expected latents that {self._codec} gives, such as {sizes.latent_shape(*sizes.default_size)} of "
                f"frames, height, width and channels, found {shape}"
            )


class _Text:
    """Text embeddings: those of a table, or of its captions; and that of no caption.

    The last is `source/null_text.safetensors`, or else the text encoder computes it.
    """

    def __init__(self, source: Path, destination: Path, name: str, models: Path | None, dtype: np.dtype, embeds: bool):
        self._file, self._embeds = (source if source.is_dir() else source.parent) / NULL_TEXT, embeds
        self._embeddings: CaptionEmbeddings | None = None
        self.options: dict[str, Any] = {}
        if embeds or not self._file.is_file():
            try:
                encoder = open_caption_encoder(name, models)
            except InputError as error:
                if embeds or models is not None:
                    raise
                raise InputError(
                    f"{self._file}: expected the embedding of no caption, which caption dropout needs, found no file; "
                    f"write it, or give --models, with which it is computed"
                ) from error
            self._embeddings = CaptionEmbeddings(destination, encoder, dtype)
            self.options, self.excess = encoder.options, encoder.excess
        self.null: Callable[[], np.ndarray] = functools.cache(self._null)

    def begin(self, captions: list[str]) -> None:
        """Embeds captions and no caption, as far as they are needed."""
        if self._embeddings:
            self._embeddings.compute(captions)

    def get(self, stored: np.ndarray | None, caption: str | None) -> np.ndarray:
        """[n, text_dim], a stored embedding or that of the caption. Raises CorruptRecord, Rejected or NotNow."""
        if self._embeds:
            assert self._embeddings and caption is not None
            self._embeddings.check(caption)
            return self._embeddings.get(caption)
        length, width = self.null().shape
        assert stored is not None
        if stored.shape[1] != width or len(stored) > length:
            raise CorruptRecord(
                f"text embedding of shape {stored.shape}, expected at most {length} tokens of {width} numbers; embed "
                f"the captions: --embed-captions"
            )
        return stored

    def _null(self) -> np.ndarray:
        return self._embeddings.null_text() if self._embeddings else read_null_text(self._file)


def _statistics(codec: str, models: Path | None, normalised: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, to normalise stored latents. Raises InputError."""
    if normalised:
        return np.float32(0), np.float32(1)
    if codec not in VAES:
        raise InputError(f"--normalised no: codec {codec} has no other latents than normalised ones; give yes")
    config = open_torch_checkpoint(VAES[codec].find(models), specs=VAES).config if models else WanVaeConfig()
    return np.array(config.latents_mean, np.float32), np.array(config.latents_std, np.float32)


def _nested(value: "pa.Scalar") -> np.ndarray:
    """The four axes of nested lists of numbers. Raises CorruptRecord if they are no array."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(value, pa.FixedShapeTensorScalar) and value.is_valid and len(value.type.shape) == 4:
        return value.to_numpy()
    if isinstance(value, pa.ExtensionScalar):  # of `datasets`, where that is imported too
        value = value.value
    is_list = lambda kind: types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if value is None or not value.is_valid or not is_list(value.type):
        found = value.type if value is not None and value.is_valid else "none"
        raise CorruptRecord(f"expected latents as nested lists of numbers, found {shown(found)}")
    numbers, shape = value.values, [len(value.values)]
    while is_list(numbers.type) and len(shape) < 5:
        lengths = numbers.value_lengths().unique()
        if len(lengths) != 1 or numbers.null_count:
            raise CorruptRecord("expected latents as nested lists of equal lengths, found others or none")
        shape.append(lengths[0].as_py())
        numbers = numbers.flatten()
    if len(shape) != 4 or not types.is_floating(numbers.type) or numbers.null_count:
        raise CorruptRecord(f"expected latents with four axes of floats, found {len(shape)} of {shown(numbers.type)}")
    return numbers.to_numpy(zero_copy_only=False).reshape(shape)
