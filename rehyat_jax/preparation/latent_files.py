"""Prepares training examples from files that were encoded elsewhere, one safetensors file for each example."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from rehyat_jax.data.manifest import NULL_TEXT
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.data.records import RANKS, CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.preparation.units import STORED, Hosts, Plan, UnitWriter, prepare


def prepare_latent_files(
    source: Path,
    destination: Path,
    *,
    codec: str,
    text_encoder: str,
    dtype: str,
    unit: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the examples in a folder; see `prepare`.

    The folder holds any number of `NAME.safetensors`. Each has the tensors `latents` [T, H, W, C], in the codec's
    normalisation, and `text` [L, text_dim], zero-padded to the same L in all files. It may have the caption as metadata
    "caption". The folder also holds `null_text.safetensors` with `text` [L, text_dim] float32, the embedding of no
    caption, which caption dropout uses instead of a caption. To write one file:
    `safetensors.numpy.save_file({"latents": latents, "text": text}, "folder/name.safetensors", {"caption": caption})`.

    Args:
      codec, text_encoder: names of the models that computed them, which the model to be trained must name too.
      dtype: a key of STORED.
      unit: number of files in a unit.

    Raises:
      InputError: the folder, its null text or the destination is wrong. A single file with a wrong format gives no
        example, and the summary names it.
    """
    if not source.is_dir():
        raise InputError(f"{source}: expected a folder of encoded examples, found none; check the path")
    files = sorted(path for path in source.glob("*.safetensors") if path.name != NULL_TEXT)
    if not files:
        raise InputError(f"{source}: expected files NAME.safetensors with latents and text, found none; check the path")
    null_text = read_null_text(source / NULL_TEXT)
    inputs = [(file.name, file.stat().st_size) for file in files]
    plan = Plan("examples", codec, text_encoder, {"dtype": dtype}, inputs, unit)

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        for file in (files[number] for number in numbers):
            try:
                example, caption = _read(file, null_text.shape)
                example = {name: tensor.astype(STORED[dtype]) for name, tensor in example.items()}
                writer.add(example, {"name": file.name, "caption": caption})
            except CorruptRecord as error:
                writer.reject(file.name, "not an example", str(error))
            progress.update()

    return prepare(destination, plan, fill, lambda: null_text, hosts, item="file")


def _read(file: Path, text_shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], str]:
    """(example, caption). Raises CorruptRecord."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = set(tensors.keys())
            if missing := sorted(RANKS["examples"].keys() - found):
                raise CorruptRecord(f"expected the tensors latents and text, found {sorted(found)}; add {missing}")
            example = {name: tensors.get_tensor(name) for name in RANKS["examples"]}
            caption = (tensors.metadata() or {}).get("caption", "")
    except (SafetensorError, OSError) as error:
        raise CorruptRecord(f"expected a complete safetensors file, found: {error}") from error
    for name, rank in RANKS["examples"].items():
        if example[name].ndim != rank or 0 in example[name].shape:
            raise CorruptRecord(
                f"tensor {name}: expected {rank} axes, without one for a batch, found shape {example[name].shape}"
            )
    if example["text"].shape != text_shape:
        raise CorruptRecord(
            f"tensor text: expected shape {text_shape} as in {NULL_TEXT}, found {example['text'].shape}"
        )
    return example, caption
