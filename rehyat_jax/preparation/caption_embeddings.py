"""Embeddings of captions: each different caption is embedded once, before any video is encoded.

A text encoder may be too large to stay in memory next to a VAE. It is loaded, embeds all captions that this host still
needs, and is freed. The embeddings wait in files of the working folder until their videos are encoded. A stopped run
keeps the files that it has written. They are removed when the data set is complete.
"""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from rehyat_jax.data.manifest import NULL_TEXT
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.temporary import remove_leftovers
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.generation.opening import get_text_encoder, given_models
from rehyat_jax.generation.text_encoders import TextEncoder
from rehyat_jax.generation.tokenizer import MAX_TOKENS
from rehyat_jax.generation.umt5 import find_text_encoder, sharding_mesh
from rehyat_jax.parallel.memory import check_device_memory, device_bytes
from rehyat_jax.preparation.units import TEXT, NotNow
from rehyat_jax.preparation.video_sources import Rejected
from rehyat_jax.weights.load import checkpoint_files
from rehyat_jax.weights.models import TEXT_ENCODERS
from rehyat_jax.weights.safetensors_file import StoredTensor, read_header, read_tensor

GROUP = 32
"""Captions of a file. They are embedded again if the command is stopped meanwhile. umT5's take 270 MB with padding."""


class CaptionEncoder(Protocol):
    """A text encoder for the preparation of videos; its weights are on disk.

    Attributes:
      options: JSON values that identify the encoder, in addition to its name.
    """

    options: dict[str, Any]

    def opened(self) -> contextlib.AbstractContextManager[TextEncoder]:
        """A context with the encoder in memory. Raises InputError if it does not fit."""

    def excess(self, caption: str) -> str:
        """A sentence about a caption that is too long and is cut; empty for others."""


def open_caption_encoder(name: str, models: Path | None) -> CaptionEncoder:
    """The encoder of this name. Arguments as in `prepare_videos`. Raises InputError."""
    if name in TEXT_ENCODERS:
        return ShardedEncoder(name, given_models(models, f"text encoder {name!r}"))
    return HostEncoder(get_text_encoder(name))


class HostEncoder:
    """A text encoder without weights, computed by NumPy. It refuses captions that are too long."""

    def __init__(self, encoder: TextEncoder):
        self._encoder = encoder
        self.options: dict[str, Any] = {}

    def opened(self) -> contextlib.AbstractContextManager[TextEncoder]:
        return contextlib.nullcontext(self._encoder)

    def excess(self, caption: str) -> str:
        return ""


class ShardedEncoder:
    """A text encoder with weights, sharded over the devices of this process. Each device encodes one caption at a time.

    Devices gather the weights block by block, so an embedding does not depend on their number. `VaeEncoder` lists what
    it does depend on.

    Args:
      name: name of the encoder.
      models: path of the weights and the tokenizer, as for `load_text_encoder`.
    """

    def __init__(self, name: str, models: Path):
        self._found, self._name = find_text_encoder(models), name
        self._tokenizer = self._found.prompt_tokenizer()
        folder, files = checkpoint_files(self._found.source, TEXT_ENCODERS[name].part)
        self.options = {
            "text_encoder_files": fingerprint(files, folder, blocks=BLOCKS),
            "tokenizer_file": fingerprint([self._tokenizer.file], self._tokenizer.file.parent),
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[TextEncoder]:
        mesh = sharding_mesh(self._found.model.config, jax.local_devices())
        self._check_memory(mesh.shape["fsdp"], mesh.size)
        with jax.set_mesh(mesh), warnings.catch_warnings():
            # The summary of the data set has every caption that was cut.
            warnings.filterwarnings("ignore", message="prompt .* only the first", category=UserWarning)
            yield self._found.load().for_prompts()

    def excess(self, caption: str) -> str:
        cut = self._tokenizer([caption], MAX_TOKENS).cut
        return f"has {cut[caption]} tokens, only the first {MAX_TOKENS} are used" if cut else ""

    def _check_memory(self, shards: int, devices: int) -> None:
        """Compares a device's memory with its part of the weights, a block's weights and the attention of a caption."""
        model = self._found.model
        sizes = [math.prod(array.shape) for array in model.params.values()]
        blocks = sum(math.prod(array.shape) for path, array in model.params.items() if path.startswith("blocks."))
        itemsize = 2  # of bfloat16
        attention = 8 * model.config.num_heads * MAX_TOKENS**2
        working = itemsize * blocks // model.config.num_layers + attention
        needed = itemsize * sum(sizes) // shards + working
        remedy, device = "use devices with more memory", jax.local_devices()[0]
        free = device_bytes(device)
        if device.platform != "cpu" and free is not None and free > working:
            remedy = f"use {-(-itemsize * sum(sizes) // (free - working))} such devices, or {remedy[4:]}"
        check_device_memory(needed, f"text encoder {self._name}", remedy, devices=devices)


class CaptionEmbeddings:
    """The embeddings of a data set's captions.

    Args:
      folder: folder of the data set.
      encoder: the text encoder.
      dtype: dtype of stored embeddings.
    """

    def __init__(self, folder: Path, encoder: CaptionEncoder, dtype: np.dtype):
        self._folder, self._encoder, self._dtype = folder / TEXT, encoder, dtype
        self._stored: dict[str, StoredTensor] = {}
        self._refused: dict[str, str] = {}

    def compute(self, captions: Sequence[str]) -> None:
        """Embeds those of the captions, and no caption, whose embeddings are not stored yet.

        Raises:
          InputError: the encoder does not fit into memory, its weights are damaged, or a file cannot be written.
        """
        self._find()
        missing = [caption for caption in dict.fromkeys(captions) if _key(caption) not in self._stored]
        if not missing and self._has_null_text():
            return
        with (
            self._encoder.opened() as encode,
            tqdm(total=len(missing), desc="captions", unit="caption", dynamic_ncols=True, smoothing=0.05) as progress,
        ):
            if not self._has_null_text():
                self._write(NULL_TEXT, {"text": np.asarray(encode([""])[0], np.float32)})
            for start in range(0, len(missing), GROUP):
                group = missing[start : start + GROUP]
                self._store(group, _embedded(encode, group))
                progress.update(len(group))

    def check(self, caption: str) -> None:
        """Raises Rejected if the encoder refuses a caption."""
        if reason := self._refused.get(_key(caption)):
            raise Rejected("caption refused", reason)

    def get(self, caption: str) -> np.ndarray:
        """[n, text_dim] in the stored dtype, without the zero vectors that pad it.

        Raises:
          NotNow: the embedding cannot be read now.
        """
        try:
            return read_tensor(self._stored[_key(caption)])
        except InputError as error:
            raise NotNow(str(error)) from error

    def excess(self, caption: str) -> str:
        """See `CaptionEncoder`."""
        return self._encoder.excess(caption)

    def null_text(self) -> np.ndarray:
        """The embedding of no caption, [L, text_dim] float32."""
        self.compute([])
        return read_null_text(self._folder / NULL_TEXT)

    def _has_null_text(self) -> bool:
        try:
            read_null_text(self._folder / NULL_TEXT)
        except InputError:
            return False
        return True

    def _find(self) -> None:
        """Finds stored embeddings, also those of other hosts."""
        self._stored = {}
        if not self._folder.is_dir():
            return
        remove_leftovers(self._folder)
        for file in sorted(self._folder.glob("*.safetensors")):
            if file.name == NULL_TEXT:
                continue
            with contextlib.suppress(InputError):  # a damaged file: its captions are embedded again
                self._stored |= read_header(file)

    def _store(self, captions: Sequence[str], embeddings: Sequence[np.ndarray | InputError]) -> None:
        tensors = {}
        for caption, embedding in zip(captions, embeddings, strict=True):
            if isinstance(embedding, InputError):
                self._refused[_key(caption)] = str(embedding)
            else:
                tokens = np.flatnonzero(embedding.any(-1))
                tensors[_key(caption)] = embedding[: tokens[-1] + 1 if len(tokens) else 0].astype(self._dtype)
        if tensors:
            name = f"{_key(' '.join(tensors))}.safetensors"
            self._write(name, tensors)
            self._stored |= read_header(self._folder / name)

    def _write(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        with reported_write_errors(self._folder), written_whole(self._folder / name) as temporary:
            temporary.write_bytes(save(tensors))


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def _embedded(encode: TextEncoder, captions: Sequence[str]) -> list[np.ndarray | InputError]:
    """The embedding of every caption, or the reason why it has none."""
    try:
        embeddings = encode(captions)
    except InputError as error:
        if len(captions) == 1:
            return [error]
        return [found for caption in captions for found in _embedded(encode, [caption])]
    return [
        embedding if np.isfinite(embedding).all() else InputError("its embedding has NaN or infinity")
        for embedding in embeddings
    ]
