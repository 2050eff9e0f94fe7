"""What must be right about an exported folder before it is uploaded."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.regular import SMALL, check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.publishing.card import HUB_NAME, LIBRARY, PIPELINE
from rehyat_jax.weights.adapters import ADAPTERS_FILE, read_adapters
from rehyat_jax.weights.models import MODELS
from rehyat_jax.weights.replacing import CARD, LOADER_FILE
from rehyat_jax.weights.safetensors_file import read_header, read_tensor
from rehyat_jax.weights.spec import Inferred, ModelSpec
from rehyat_jax.weights.streamed import MODELS_PLACE
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint
from rehyat_jax.weights.torch_config import BASE, CONFIG_FILE, SIDE_CAR, read_torch_config
from rehyat_jax.weights.torch_folder import BRANCH_FILE, PICKLES
from rehyat_jax.weights.without_base import branch_rows

Progress = Callable[[int], object]
"""Called with the size in bytes of each tensor that was read."""

NOT_UPLOADED = (Path(".git"), Path(".cache/huggingface"))
"""Folders that `hf upload` leaves out."""


def check_folder(folder: Path, progress: Progress = lambda nbytes: None) -> list[Path]:
    """The files of an exported folder that is fit to be uploaded, relative to it.

    Every tensor is read, and must be what config.json and rehyat.json describe.

    Args:
      folder: the folder, as `convert to-torch --layout diffusers` wrote it. It may have more files.
      progress: called with the size in bytes of each tensor that was read.

    Raises:
      InputError: something is missing, damaged or a pickle, or the model card lacks a field.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected an exported folder, found none; write it with convert to-torch")
    files = _files(folder)
    for name in (CONFIG_FILE, CARD):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: is missing; write the folder again with convert to-torch --layout diffusers"
            )
    base_name = _check_card(folder / CARD)
    if (folder / BRANCH_FILE).exists():
        _check_without_base(folder, base_name, progress)
    else:
        _check_complete(folder, progress)
    return files


def _files(folder: Path) -> list[Path]:
    """The files, sorted. Raises InputError for pickles, and for anything that is no file."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if (Path(place) / name).relative_to(folder) not in NOT_UPLOADED]
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise InputError(f"{Path(place) / name}: is a link to a folder, whose files are not checked; remove it")
        for name in names:
            file = Path(place) / name
            check_regular_file(file)
            with open(file, "rb") as stream:
                start = stream.read(4)
            # torch.save writes a zip archive; a bare pickle begins with 0x80 and a protocol number. A safetensors file
            # begins with any number.
            is_pickle = file.suffix != ".safetensors" and re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start)
            if is_pickle or file.suffix in PICKLES:
                raise InputError(
                    f"{file}: is a pickle or an archive, which can run any code when it is opened; remove it, or store "
                    f"its tensors as safetensors"
                )
            found.append(file.relative_to(folder))
    return sorted(found)


def _check_card(file: Path) -> str:
    """The base that the card's front matter names. Raises InputError if a field is missing or wrong."""
    check_regular_file(file, largest_bytes=SMALL)
    try:
        data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False).data
    except Exception as error:  # errors of YAML, and of the fields' types
        reason = shown(next(iter(str(error).splitlines()), type(error).__name__))
        raise InputError(f"{file}: its front matter cannot be read ({reason}); correct it") from error
    for name, expected in (("library_name", LIBRARY), ("pipeline_tag", PIPELINE)):
        if (found := data.get(name)) != expected:
            raise InputError(f"{file}: {name} should be {expected!r}, found {shown(found)!r}; correct the front matter")
    if not isinstance(data.get("license"), str):
        raise InputError(f"{file}: license is missing; add the licence of the weights to the front matter")
    base = data.get("base_model")
    if not isinstance(base, str) or not HUB_NAME.fullmatch(base):
        raise InputError(
            f"{file}: base_model should be the base's name on the Hub, such as owner/name, found {shown(base)}; add it "
            f"to the front matter, or give --base-name to convert to-torch"
        )
    return base


def _check_complete(folder: Path, progress: Progress) -> None:
    """Checks a folder with all weights."""
    model = open_torch_checkpoint(folder, progress)
    _read_config(folder)
    if model.config.hybrid_blocks and not (folder / LOADER_FILE).is_file():
        raise InputError(
            f"{folder / LOADER_FILE}: is missing, and without it the student cannot be loaded; export it again"
        )
    for array in model.params.values():
        array.read()


def _check_without_base(folder: Path, base_name: str, progress: Progress) -> None:
    """Checks a folder of a student without a copy of its base."""
    for name in (SIDE_CAR, LOADER_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing; export the student again")
    config = _read_config(folder)
    record = _read_base(folder / SIDE_CAR, base_name)
    file, tensors = folder / BRANCH_FILE, read_header(folder / BRANCH_FILE)
    expected = {name: row for row in branch_rows(config) for name in row.names("diffusers")}
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for names, words in ((missing, "is missing"), (unknown, "is unknown")):
        if names:
            raise InputError(
                f"{file}: tensor {min(names)} {words} ({len(names)} such tensors); export the student again"
            )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].torch_shape:
            raise InputError(
                f"{file}: tensor {name} should have shape {list(expected[name].torch_shape)}, found "
                f"{list(tensor.shape)}; export the student again"
            )
        read_tensor(tensor)
        progress(tensor.nbytes)
    if record["adapter"]:
        read_adapters(folder, config)
    elif (folder / ADAPTERS_FILE).exists():
        raise InputError(f"{folder / ADAPTERS_FILE}: expected no adapters by {SIDE_CAR}; remove the file")


def _read_base(file: Path, base_name: str) -> dict[str, Any]:
    """The object "base" of rehyat.json. Raises InputError."""
    record = read_json_object(file).get(BASE)
    if (
        not isinstance(record, dict)
        or record.keys() != {"name", "identity", "adapter"}
        or not re.fullmatch("[0-9a-f]{64}", str(record["identity"]))
        or type(record["adapter"]) is not bool
    ):
        raise InputError(
            f"{file}: base should have name, identity and adapter, found {shown(record)}; export the student again"
        )
    if record["name"] is not None and str(record["name"]).partition("@")[0] != base_name:
        raise InputError(
            f"{file}: base.name is {shown(record['name'])!r}, but base_model of {CARD} is {base_name!r}; correct one"
        )
    return record


def _read_config(folder: Path) -> Any:
    """The architecture that config.json and rehyat.json describe. Raises InputError unless it is diffusers' layout."""
    file = folder / CONFIG_FILE
    fields = read_json_object(file)
    spec = _spec(fields, file)
    heads, size = (fields.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    if type(heads) is not int or type(size) is not int:
        raise InputError(
            f"{file}: num_attention_heads and attention_head_dim should be integers; export the model again"
        )
    config, metadata = read_torch_config(spec, folder, {"width": Inferred(heads * size, CONFIG_FILE)}, "diffusers")
    models = metadata.get(MODELS_PLACE)
    if models is not None and not HUB_NAME.fullmatch(models.partition("@")[0]):
        raise InputError(
            f"{folder / SIDE_CAR}: {MODELS_PLACE} is {shown(models)!r}, a folder of this machine; remove it, or give a "
            f"name on the Hub"
        )
    return config


def _spec(fields: dict[str, Any], file: Path) -> ModelSpec:
    classes = {spec.upstream["diffusers"].fixed["_class_name"]: spec for spec in MODELS.values()}
    if (found := fields.get("_class_name")) not in classes:
        raise InputError(
            f"{file}: _class_name should be one of {sorted(classes)}, found {shown(found)!r}; export the model with "
            f"--layout diffusers"
        )
    return classes[found]
