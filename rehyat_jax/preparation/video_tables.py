"""Videos in a column of a table: bytes, or the struct of Hugging Face's `Video` feature."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.preparation.tables import Damaged, Table
from rehyat_jax.preparation.video_sources import LARGEST_VIDEO, Rejected, copied


class VideoTable:
    """The rows of a table as videos; see `VideoSource`.

    Args:
      source: see `Table`.
      video: column of binary values, or of structs with a binary field `bytes`. A path next to it is not followed.
      caption: column of captions.

    Raises:
      InputError: see `Table`; or the columns have other types.
    """

    def __init__(self, source: Path, video: str, caption: str):
        self._table, self._column = Table(source, caption), video
        remedy = "give its name: --video NAME; tables of latents are for python -m rehyat_jax.prepare latents"
        self._table.require([video], remedy)
        found = self._table.schema.field(video).type
        if not is_bytes(found) and not (is_struct(found) and is_bytes(found.field("bytes").type)):
            raise InputError(f"{source}: column {video!r}: expected the bytes of videos, found {found}; {remedy}")
        self.videos, self.faults = self._table.inputs, self._table.faults
        self.options: dict[str, Any] = {**self._table.options, "video": video}

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[Path]:
        try:
            value = self._table.row(number, [self._column])[self._column]
        except Damaged as error:
            raise Rejected("damaged file", str(error)) from error
        if is_struct(value.type) and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            raise Rejected("no such video", "the row has no bytes of a video; store the files themselves in the table")
        content = memoryview(value.as_buffer())
        if len(content) > LARGEST_VIDEO:
            raise Rejected("too large", f"{len(content):,} bytes, expected at most {LARGEST_VIDEO:,}")
        with copied([content]) as path:
            yield path


def is_bytes(found: Any) -> bool:
    """True for a type of binary values."""
    from pyarrow import types

    return types.is_binary(found) or types.is_large_binary(found)


def is_struct(found: Any) -> bool:
    """True for a struct with a field `bytes`."""
    from pyarrow import types

    return types.is_struct(found) and found.get_field_index("bytes") >= 0
