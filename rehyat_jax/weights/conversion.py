"""Conversion between PyTorch checkpoints and model checkpoints, one parameter at a time."""

import importlib.resources
from pathlib import Path

from tqdm import tqdm

from rehyat_jax.files.new_directory import new_directory
from rehyat_jax.files.shown import check_path
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.weights.model_checkpoint import open_model_checkpoint, write_model_checkpoint
from rehyat_jax.weights.replacing import LOADER_FILE, MARK, check_force
from rehyat_jax.weights.streamed import MODELS_PLACE, StreamedModel
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.torch_checkpoint import MAX_SHARD_BYTES, open_torch_checkpoint, write_torch_checkpoint

LOADER = importlib.resources.files("rehyat_jax.pytorch") / LOADER_FILE


def convert_from_torch(
    source: Path, destination: Path, *, models: str | None = None, replace: bool = False
) -> StreamedModel:
    """Writes a PyTorch checkpoint in either layout as a model checkpoint; shows progress on stderr.

    Args:
      source: a safetensors file, an index, a folder of them or a diffusers pipeline's folder.
      destination: the model checkpoint to write; its parent must exist.
      models: folder or Hub name of the pipeline with the VAE and text encoder, to be named in the checkpoint.
      replace: whether to replace an earlier conversion at the destination.

    Returns:
      The converted model.

    Raises:
      InputError: the source is not a complete, finite checkpoint of Wan's text-to-video transformer, or the destination
        can't be written. The destination then stays as it was.
    """
    check_path(destination)
    destination = _checked(source, destination, replace=replace)
    with _progress_bar() as bar:
        model = open_torch_checkpoint(source, bar.update)
        if models:
            model = model._replace(metadata=model.metadata | {MODELS_PLACE: models})
        bar.total = model.nbytes
        with reported_write_errors(destination), new_directory(destination, replace=replace) as directory:
            write_model_checkpoint(directory, model)
    return model


def convert_to_torch(
    source: Path,
    destination: Path,
    layout: Layout,
    *,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> StreamedModel:
    """Writes a model checkpoint as a PyTorch folder; shows progress on stderr.

    A student in diffusers' layout gets `rehyat_torch.py` next to its weights, because upstream has no code to run it.

    Args:
      source: a model checkpoint.
      destination: the folder to write; its parent must exist.
      layout: "diffusers" or "original".
      replace: whether to replace an earlier conversion at the destination.
      max_shard_bytes: size above which weights are written in shards.

    Returns:
      The converted model.

    Raises:
      InputError: the source is not a complete, finite model checkpoint, or the destination can't be written. The
        destination then stays as it was.
    """
    destination = _checked(source, destination, replace=replace)
    with _progress_bar() as bar:
        model = open_model_checkpoint(source)
        bar.total = model.nbytes
        with reported_write_errors(destination), new_directory(destination, replace=replace) as directory:
            write_torch_checkpoint(directory, model, layout, progress=bar.update, max_shard_bytes=max_shard_bytes)
            (directory / MARK).touch()
            if layout == "diffusers" and model.config.hybrid_blocks:
                (directory / LOADER_FILE).write_bytes(LOADER.read_bytes())
    return model


def _progress_bar() -> tqdm:
    # The delay avoids drawing the bar over the message of an error that is found before any value is read.
    return tqdm(unit="B", unit_scale=True, delay=1)


def _checked(source: Path, destination: Path, *, replace: bool) -> Path:
    """The absolute destination. Raises InputError if it may not be replaced but should be."""
    if replace:
        check_force(source, destination)
    return destination.absolute()
