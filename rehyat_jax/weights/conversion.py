"""Conversion between PyTorch checkpoints and model checkpoints, one parameter at a time."""

import importlib.resources
from pathlib import Path

from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.files.new_directory import new_directory
from rehyat_jax.files.shown import check_path
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.weights.adapters import ADAPTERS_FILE, read_adapters
from rehyat_jax.weights.load import open_checkpoint
from rehyat_jax.weights.model_checkpoint import open_model_checkpoint, write_model_checkpoint
from rehyat_jax.weights.models import spec_of
from rehyat_jax.weights.replacing import LOADER_FILE, check_force, write_marks
from rehyat_jax.weights.streamed import MODELS_PLACE, StreamedModel
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.torch_checkpoint import (
    MAX_SHARD_BYTES,
    open_torch_checkpoint,
    write_tensors,
    write_torch_checkpoint,
)
from rehyat_jax.weights.torch_config import write_torch_config
from rehyat_jax.weights.torch_folder import BRANCH_NAME
from rehyat_jax.weights.without_base import branch_rows, check_base

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
    card: str | None = None,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> StreamedModel:
    """Writes a model checkpoint as a PyTorch folder; shows progress on stderr.

    A student in diffusers' layout gets `rehyat_torch.py` next to its weights, because upstream has no code to run it.

    Args:
      source: a model checkpoint.
      destination: the folder to write; its parent must exist.
      layout: "diffusers" or "original".
      card: text of the model card, README.md; None for no card.
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
            write_marks(directory, card)
            if layout == "diffusers" and model.config.hybrid_blocks:
                (directory / LOADER_FILE).write_bytes(LOADER.read_bytes())
    return model


def convert_without_base(
    source: Path,
    destination: Path,
    base: Path,
    *,
    base_name: str | None,
    adapter: Path | None = None,
    card: str | None = None,
    replace: bool = False,
) -> StreamedModel:
    """Writes what a student adds to its base as a PyTorch folder, which `rehyat_torch.load_student` joins to the base.

    Every other weight must be the base's, or the base's plus low-rank adapters. All of them are compared. Progress is
    shown on stderr.

    Args:
      source: a model checkpoint.
      destination: the folder to write; its parent must exist.
      base: the student's base: a model checkpoint, or a source that `open_torch_checkpoint` takes.
      base_name: the base's name on the Hub, to be named in the folder; None if it has none.
      adapter: the student's adapters, see `read_adapters`; None if it was trained without them.
      card: text of the model card, README.md; None for no card.
      replace: whether to replace an earlier conversion at the destination.

    Returns:
      The student, with only the parameters that were written.

    Raises:
      InputError: a source is not a complete, finite checkpoint, the student has no hybrid blocks, it has other weights
        than its base, or the destination can't be written. The destination then stays as it was.
    """
    destination = _checked(source, destination, replace=replace)
    with _progress_bar() as bar:
        model, softmax = open_model_checkpoint(source), open_checkpoint(base)
        if not model.config.hybrid_blocks:
            raise InputError(f"{source}: has no hybrid blocks, so it adds nothing to a base; export it completely")
        bar.total = softmax.nbytes
        adapters = read_adapters(adapter, model.config) if adapter else {}
        identity = check_base(model, softmax, adapters, source, base_name or base, progress=bar.update)
        spec, rows = spec_of(model.config), branch_rows(model.config)
        with reported_write_errors(destination), new_directory(destination, replace=replace) as directory:
            record = {"name": base_name, "identity": identity, "adapter": adapter is not None}
            write_torch_config(spec, directory, model.config, model.metadata, "diffusers", base=record)
            write_tensors(directory, BRANCH_NAME, model, "diffusers", rows)
            if adapter:
                file = adapter / ADAPTERS_FILE if adapter.is_dir() else adapter
                (directory / ADAPTERS_FILE).write_bytes(file.read_bytes())
            write_marks(directory, card)
            (directory / LOADER_FILE).write_bytes(LOADER.read_bytes())
    return model._replace(params={row.path: model.params[row.path] for row in rows})


def _progress_bar() -> tqdm:
    # The delay avoids drawing the bar over the message of an error that is found before any value is read.
    return tqdm(unit="B", unit_scale=True, delay=1)


def _checked(source: Path, destination: Path, *, replace: bool) -> Path:
    """The absolute destination. Raises InputError if it may not be replaced but should be."""
    if replace:
        check_force(source, destination)
    return destination.absolute()
