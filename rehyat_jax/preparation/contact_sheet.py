"""A picture of a few prepared examples, decoded from the stored latents."""

import textwrap
import warnings
from pathlib import Path

import numpy as np

from rehyat_jax.data.manifest import NULL_TEXT, BucketFiles, Manifest
from rehyat_jax.data.prepared import Bucket, read_null_text
from rehyat_jax.errors import InputError
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.opening import get_codec

FILE = "contact_sheet.png"
EXAMPLES = 6
FRAMES = ("first frame", "at 1/4", "at 1/2", "at 3/4", "last frame")


def write_contact_sheet(folder: Path, manifest: Manifest) -> str:
    """Writes a PNG with the first, the last and three intermediate frames of examples spread over the data set.

    Returns:
      A sentence for the user: the name of the file, or the reason why it was not written.
    """
    try:
        codec = get_codec(manifest.codec)
    except InputError as error:
        return f"no contact sheet: {error}"
    text_shape = read_null_text(folder / NULL_TEXT).shape
    buckets = [Bucket(folder, files, manifest.kind, text_shape) for files in manifest.buckets]
    rows = {}
    for bucket, index in _spread(manifest.buckets):
        latents, description = buckets[bucket][index]["latents"], buckets[bucket].description(index)
        try:
            video = np.asarray(codec.decode(latents[None]))[0]
        except (RuntimeError, ValueError) as error:  # the codec's name may be wrong, which must not stop the data set
            return f"no contact sheet: {manifest.codec} cannot decode latents {latents.shape}: {shown(error)}"
        chosen = np.linspace(0, len(video) - 1, len(FRAMES)).round().astype(int)
        caption = "\n".join(textwrap.wrap(shown(description["caption"]), 24, max_lines=5))
        rows[f"{shown(description['name'], 60)}\n{caption}"] = video[chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks a caption's characters, which the summary has
        save_frames(folder / FILE, rows, range(len(FRAMES)), titles=FRAMES, inches=1.2)
    return f"a few of them: {FILE}"


def _spread(buckets: tuple[BucketFiles, ...]) -> list[tuple[int, int]]:
    """(bucket, index) of evenly spaced examples."""
    everything = np.cumsum([0, *(files.examples for files in buckets)])
    chosen = np.unique(np.linspace(0, everything[-1] - 1, EXAMPLES).round().astype(int))
    bucket = np.searchsorted(everything, chosen, side="right") - 1
    return [(int(b), int(i - everything[b])) for b, i in zip(bucket, chosen, strict=True)]
