"""Model checkpoints: a directory with `model.json`, the architecture, and `params/`, an Orbax checkpoint.

model.json names the model's codec and text encoder. It may also have "models", the folder or Hub name of the pipeline
whose VAE and text encoder these are; "noise_levels", "by_chunk" if every chunk had its own in training; and
"sampling", the solver of a model of few steps. It has format version 2. Version 1 has "hybrid_blocks" and one "hybrid"
form instead of "attention".
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rehyat_jax.diffusion.solver_options import SolverOptions
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.files.new_directory import new_directory, new_shared_directory
from rehyat_jax.files.shown import check_path
from rehyat_jax.weights.config_fields import CURRENT, check_version, config_from_json, require_known
from rehyat_jax.weights.models import MODELS, spec_of
from rehyat_jax.weights.safetensors_file import DTYPES
from rehyat_jax.weights.streamed import (
    BY_CHUNK,
    MODELS_PLACE,
    NOISE_LEVELS,
    OPTIONAL,
    SAMPLING,
    StreamedArray,
    StreamedModel,
    check_metadata,
)

MODEL_FILE = "model.json"
PARAMS = "params"
METADATA = ("codec", "text_encoder")
"""Fields that every model.json has."""


def is_model_checkpoint(path: Path) -> bool:
    """True if a directory has a model.json, of whatever kind; reading it refuses all but regular files."""
    return (path / MODEL_FILE).exists()


def check_replaceable(path: Path) -> None:
    """Raises InputError if something exists that is no part of a model checkpoint, and that `save_model` would lose."""
    check_path(path)
    if not path.exists():
        return
    if not is_model_checkpoint(path):
        raise InputError(f"{path}: already exists and is not a model checkpoint; move it, or choose another place")
    if others := foreign_entries(path):
        raise InputError(f"{path}: {others[0]} is no part of a model checkpoint; move it, or choose another place")


def foreign_entries(path: Path) -> list[str]:
    """The names in a model checkpoint's directory that are none of its own, sorted."""
    is_own = {MODEL_FILE: Path.is_file, PARAMS: Path.is_dir}
    return sorted(entry.name for entry in path.iterdir() if not is_own.get(entry.name, lambda entry: False)(entry))


def save_model(
    path: str | Path,
    config: Any,
    params: dict[str, Any],
    *,
    codec: str,
    text_encoder: str,
    models: str | None = None,
    noise_by_chunk: bool = False,
    sampling: SolverOptions | None = None,
) -> None:
    """Writes a model checkpoint, complete or not at all; replaces a model checkpoint that is already there.

    Args:
      path: the directory to write; missing parents are created.
      config: architecture.
      params: nested dict of numpy or JAX arrays, such as `nnx.to_pure_dict` of a model. They reach the host one at a
        time. If arrays are spread over several processes, all processes write them together, into a directory that
        all of them see.
      codec: name of the codec between the model's latents and videos.
      text_encoder: name of the encoder of its prompts.
      models: folder or Hub name of the pipeline that has the weights of both, if that is known.
      noise_by_chunk: whether every chunk had its own noise level in training.
      sampling: the solver that a model of few steps was trained for.

    Raises:
      ValueError: the parameters do not match the configuration.
      InputError: something else exists at `path`, or it can't be written.
    """
    path = Path(path).absolute()
    check_params(params, config)
    check_replaceable(path)
    arrays = traverse_util.flatten_dict(params, sep=".")
    metadata: dict[str, Any] = {"codec": codec, "text_encoder": text_encoder}
    metadata |= {MODELS_PLACE: models} if models else {}
    metadata |= {NOISE_LEVELS: BY_CHUNK} if noise_by_chunk else {}
    metadata |= {SAMPLING: dataclasses.asdict(sampling)} if sampling else {}
    if jax.process_count() > 1:
        from rehyat_jax.weights.orbax_params import save_arrays

        with new_shared_directory(path, replace=True) as directory:
            save_arrays(directory / PARAMS, arrays)
            if jax.process_index() == 0:
                _write_description(directory, config, metadata)
        return
    streamed = {
        name: StreamedArray(array.shape, np.dtype(array.dtype), functools.partial(np.asarray, array))
        for name, array in arrays.items()
    }
    with new_directory(path, replace=True) as directory:
        write_model_checkpoint(directory, StreamedModel(config, metadata, streamed))


def write_model_checkpoint(directory: Path, model: StreamedModel) -> None:
    """Writes model.json and params/ into an existing empty directory; one parameter is in memory at a time.

    Args:
      directory: absolute path.
      model: the model to write.
    """
    # Orbax takes a fifth of a second to import.
    from rehyat_jax.weights.orbax_params import save_params

    save_params(directory / PARAMS, model.params)
    _write_description(directory, model.config, model.metadata)


def _write_description(directory: Path, config: Any, metadata: dict[str, Any]) -> None:
    versions = {"format_version": CURRENT, "architecture": spec_of(config).architecture}
    write_json(directory / MODEL_FILE, {**versions, "config": config.to_dict(), **metadata})


def read_model_description(path: Path) -> tuple[Any, dict[str, Any]]:
    """(config, metadata, see `StreamedModel`) of a model checkpoint. Raises InputError."""
    if not is_model_checkpoint(path):
        raise InputError(f"{path}: is not a model checkpoint (it has no {MODEL_FILE}); give the directory of one")
    file = path / MODEL_FILE
    content = read_json_object(file)
    fields = ("format_version", "architecture", "config", *METADATA)
    for name in content:
        require_known(name, (*fields, *OPTIONAL), str(file))
    for name in fields:
        if name not in content:
            raise InputError(
                f"{file}: field {name!r} is missing; the file is damaged, convert or train the model again"
            )
    version = check_version(content["format_version"], str(file))
    architecture = content["architecture"]
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise InputError(
            f"{file}: architecture should be one of {tuple(MODELS)}, found {architecture!r}; another version of "
            f"rehyat_jax wrote it"
        )
    metadata = {name: content[name] for name in (*METADATA, *OPTIONAL) if name in content}
    check_metadata(metadata, file)
    config = config_from_json(MODELS[architecture].config, content["config"], f"{file}: config", version)
    return config, metadata


def open_model_checkpoint(path: Path) -> StreamedModel:
    """Checks a model checkpoint's parameters against its configuration; values are read on demand.

    Raises:
      InputError: the model checkpoint does not exist, is incomplete, or is damaged. Damaged values are found when read.
    """
    from rehyat_jax.weights.orbax_params import open_params

    config, metadata = read_model_description(path)
    params = open_params(path.absolute() / PARAMS)
    try:
        _check_params(params, config, str(path / PARAMS))
    except ValueError as error:
        raise InputError(f"{error}; {MODEL_FILE} and {PARAMS}/ belong to different models") from error
    return StreamedModel(config, metadata, params)


def restore_sharded(
    path: Path, shardings: dict[str, jax.sharding.Sharding], dtypes: dict[str, Any]
) -> dict[str, jax.Array]:
    """Parameters of a model checkpoint by path, in `dtypes` on the devices of `shardings`. Raises InputError."""
    from rehyat_jax.weights.orbax_params import restore_arrays

    return restore_arrays(path.absolute() / PARAMS, shardings, dtypes)


def check_params(params: dict[str, Any], config: Any) -> None:
    """Raises ValueError unless `save_model` can write a nested dict of parameters with these shapes and dtypes."""
    _check_params(traverse_util.flatten_dict(params, sep="."), config, "params")


def _check_params(params: dict[str, Any], config: Any, source: str) -> None:
    """Raises ValueError unless the arrays have exactly the configuration's names and shapes, and dtypes of weights."""
    expected = {row.path: row.stacked_shape for row in spec_of(config).table(config)}
    if missing := sorted(expected.keys() - params.keys()):
        raise ValueError(f"{source}: {missing[0]} is missing ({len(missing)} of {len(expected)} parameters are)")
    if extra := sorted(params.keys() - expected.keys()):
        raise ValueError(f"{source}: {extra[0]} is not a parameter of this configuration ({len(extra)} such arrays)")
    for path, array in params.items():
        if tuple(array.shape) != expected[path]:
            raise ValueError(f"{source}: {path} should have shape {expected[path]}, found {tuple(array.shape)}")
        if np.dtype(array.dtype) not in DTYPES.values():
            known = ", ".join(map(str, DTYPES.values()))
            raise ValueError(f"{source}: {path} should be one of {known}, found {array.dtype}")
