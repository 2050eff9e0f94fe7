"""Folders of models by their name on the Hugging Face Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown

FILES = ("*.json", "*.safetensors", "*.model")
"""Files that are downloaded: weights, configurations and tokenizers. Pickles are never read."""

_NAME = re.compile(r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,200}))?")


class Models(NamedTuple):
    """A folder of models.

    Attributes:
      folder: its path.
      name: the path or Hub name that was asked for.
      revision: full hash of the Hub's commit; None for other folders.
    """

    folder: Path
    name: str
    revision: str | None = None


TRANSFORMER_FILES = ("*.json", "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Files of a pipeline without its VAE and text encoder, in diffusers' and the original layout."""


def open_models(models: str | os.PathLike, files: Sequence[str] = FILES) -> Models:
    """The folder at a path, or of a repository on the Hub, which is downloaded if it is not in the Hub's cache.

    Args:
      models: path; or "owner/name", with "@revision" for another branch, tag or commit than main. A path that exists is
        not looked up.
      files: patterns of the files to download.

    Raises:
      InputError: there is no such folder or repository, or the Hub cannot be reached.
    """
    name = os.fspath(models)
    if os.path.lexists(name):
        return Models(Path(name), name)
    if not (found := _NAME.fullmatch(name)) or name.startswith("."):
        raise InputError(f"{name}: does not exist; give a folder of models, or a Hub name such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = found["repository"]
    try:
        folder = Path(snapshot_download(repository, revision=found["revision"], allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = shown(next(iter(str(error).splitlines()), type(error).__name__))
        raise InputError(
            f"{name}: is no folder here, and could not be fetched from the Hugging Face Hub ({reason}); check the "
            f"name, or download it where there is a network (`hf download {repository} --local-dir FOLDER`), copy the "
            f"folder here, and give its path"
        ) from error
    # The cache keeps a snapshot in a folder named after its commit.
    return Models(folder, name, folder.name)
