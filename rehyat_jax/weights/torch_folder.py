"""Finds and creates the files of a PyTorch checkpoint: one safetensors file, shards with an index, or a pipeline."""

import math
import re
from pathlib import Path

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.files.packaged import here_or_packaged
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.weights.safetensors_file import GGUF_REMEDY, StoredTensor, create_file, pickle_remedy, read_header

NAME = "diffusion_pytorch_model"
"""Name of the weights in Wan's and diffusers' repositories."""

BRANCH_NAME = "rehyat_branch"
"""Name of the file of a student without a copy of its base, without its suffix."""

BRANCH_FILE = f"{BRANCH_NAME}.safetensors"

INDEX = ".safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")


def find_tensors(source: Path, part: str = "transformer") -> tuple[Path, dict[str, StoredTensor]]:
    """The tensors of a checkpoint by name; no values are read.

    Args:
      source: a safetensors file, an index of shards, a folder with either, or a pipeline's folder with a folder `part`.
        `assets/demo_teacher` is also found in the package.
      part: the model's folder in a diffusers pipeline.

    Returns:
      (the folder of the files, the tensors).

    Raises:
      InputError: the checkpoint does not exist, a shard is missing, the index is wrong, or a file is damaged or a
        pickle.
    """
    source = here_or_packaged(source)
    file = _file_in_folder(source, part) if source.is_dir() else source
    if not file.exists():
        raise InputError(f"{file}: does not exist; give a safetensors file or a folder with one")
    check_regular_file(file)
    if file.suffix in PICKLES:
        raise InputError(
            f"{file}: is a PyTorch pickle by its name, expected safetensors; pickles can run any code when opened and "
            f"are never read: {pickle_remedy(file)}"
        )
    if file.name.endswith(INDEX):
        return file.parent, _read_shards(file)
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name):
        raise InputError(f"{file}: is one shard of a checkpoint; give the folder with all shards and their index")
    return file.parent, read_header(file)


def create_files(
    folder: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], *, max_shard_bytes: int, name: str = NAME
) -> dict[str, StoredTensor]:
    """Creates one file for the tensors, or shards with an index, split and named like those of Hugging Face libraries.

    Args:
      folder: existing directory.
      tensors: dtype and shape of each tensor by name, in the order of the state dict.
      max_shard_bytes: size of a shard above which a new one begins.
      name: name of the files, without number and suffix.

    Returns:
      The place of each tensor; fill all of them with `write_tensor`.
    """
    shards, size = [{}], 0
    for tensor, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if size and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][tensor] = (dtype, shape)
        size += nbytes
    if len(shards) == 1:
        return create_file(folder / f"{name}.safetensors", shards[0])

    placed = {}
    for number, shard in enumerate(shards, start=1):
        placed |= create_file(folder / f"{name}-{number:05d}-of-{len(shards):05d}.safetensors", shard)
    total_size = sum(tensor.nbytes for tensor in placed.values())
    weight_map = {tensor.name: tensor.file.name for tensor in placed.values()}
    write_json(folder / f"{name}{INDEX}", {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return placed


def _file_in_folder(folder: Path, part: str) -> Path:
    """The index or the single file of the weights in a folder."""
    if (folder / "model.json").exists():
        raise InputError(f"{folder}: is a model checkpoint of rehyat_jax already; to-torch converts it to PyTorch")
    if (folder / BRANCH_FILE).exists():
        raise InputError(
            f"{folder}: is a student without a copy of its base; load it with load_student of its rehyat_torch.py, "
            f"write it with save_student, and give that folder"
        )
    if (folder / f"{part}_2").is_dir():
        experts = " (Wan2.2's two experts)" if part == "transformer" else ""
        raise InputError(
            f"{folder}: expected one {part}, found {part}/ and {part}_2/{experts}; "
            f"give {folder / part} or {folder / f'{part}_2'}"
        )
    if (folder / part).is_dir():
        folder = folder / part
    for name in (f"{NAME}{INDEX}", f"{NAME}.safetensors"):
        if (folder / name).exists():
            return folder / name
    for pattern in (f"*{INDEX}", "*.safetensors"):
        files = sorted(folder.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise InputError(
                f"{folder}: expected one checkpoint, found {', '.join(file.name for file in files[:5])} and no "
                f"{NAME}{INDEX}; give the file to convert, or get the index that belongs to the shards"
            )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: expected safetensors, found only PyTorch pickles ({', '.join(pickles[:5])}); pickles can run "
            f"any code when opened and are never read: {pickle_remedy(folder / pickles[0])}"
        )
    if gguf := sorted(file.name for file in folder.iterdir() if file.suffix == ".gguf"):
        raise InputError(
            f"{folder}: expected safetensors, found only GGUF files ({', '.join(gguf[:5])}); {GGUF_REMEDY}"
        )
    raise InputError(f"{folder}: has no safetensors file, no index of shards and no {part}/; give another folder")


def _read_shards(index_file: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards, checked against the index."""
    index = read_json_object(index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index_file}: weight_map should map tensor names to file names; get the index again")

    tensors = {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", shard):
            raise InputError(
                f"{index_file}: weight_map names {shard[:200]!r}, expected a safetensors file in the same folder; "
                f"get the index again"
            )
        file = index_file.parent / shard
        if not file.exists():
            raise InputError(f"{file}: this shard is named in {index_file.name} but does not exist; get it again")
        for name, tensor in read_header(file).items():
            if weight_map.get(name) != shard:
                raise InputError(
                    f"{index_file}: tensor {name} is in {shard}, but weight_map says {weight_map.get(name)}; "
                    f"the index and the shards belong to different checkpoints, get them again"
                )
            tensors[name] = tensor
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise InputError(
            f"{index_file}: tensor {missing[0]} should be in {weight_map[missing[0]]} but is not there "
            f"({len(missing)} such tensors); the index and the shards belong to different checkpoints, get them again"
        )

    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    if stated is not None and stated != total_size:
        raise InputError(
            f"{index_file}: metadata.total_size is {stated}, but the shards hold {total_size} bytes of tensors; "
            f"the index and the shards belong to different checkpoints, get them again"
        )
    return tensors
