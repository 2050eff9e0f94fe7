"""The umT5 text encoder with its tokenizer, from the folders in which Wan is published."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.tokenizer import FILES, MAX_TOKENS, Tokenizer, find_tokenizer, places
from rehyat_jax.models.umt5.config import UMT5Config
from rehyat_jax.models.umt5.modeling import UMT5Encoder, apply_encoder
from rehyat_jax.parallel.mesh import AXES, BATCH, axis_size, make_mesh
from rehyat_jax.weights.load import load_module
from rehyat_jax.weights.models import TEXT_ENCODERS
from rehyat_jax.weights.streamed import StreamedModel
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint
from rehyat_jax.weights.umt5.spec import UMT5


def load_text_encoder(path: str | Path, *, dtype: jnp.dtype = jnp.bfloat16) -> "UMT5TextEncoder":
    """Wan's text encoder; parameters are on the default device or sharded on the mesh in use (`jax.set_mesh`).

    Tensors may have the names of transformers' `UMT5EncoderModel` or of Wan's original `T5Encoder`. One parameter at a
    time is read.

    Args:
      path: one of
        - a folder with a safetensors file, or with shards and their index;
        - a diffusers pipeline's folder, with `text_encoder/`;
        - the folder of one of Wan's original repositories, with `models_t5_*.safetensors`;
        - a safetensors file.
        The tokenizer's file, `tokenizer.json` or `spiece.model`, is in the same folder, in `tokenizer/` next to it or
        in `google/umt5-xxl/` in it. It is needed for prompts only.
      dtype: dtype of the parameters and of the computation.

    Raises:
      InputError: the checkpoint or the tokenizer does not exist, is another model's, is incomplete, or is damaged; or
        the mesh does not divide a parameter.
    """
    return find_text_encoder(path).load(dtype)


def sharding_mesh(config: UMT5Config, devices: Sequence[jax.Device]) -> Mesh:
    """All of these devices; as many of them as umT5's sizes allow shard its weights, and the rest has copies."""
    shards = math.gcd(len(devices), config.model_dim, config.width, config.ffn_dim)
    return make_mesh({**dict.fromkeys(AXES, 1), "fsdp": shards, "data": len(devices) // shards}, list(devices))


def find_text_encoder(path: str | Path) -> "FoundTextEncoder":
    """Checks the files that `load_text_encoder` takes; the weights stay on disk. Raises InputError as it does."""
    source = UMT5.find(Path(path))
    folder = source if source.is_dir() else source.parent
    tokenizer = find_tokenizer(folder)
    model = open_torch_checkpoint(source, specs=TEXT_ENCODERS)
    if tokenizer and tokenizer.size > model.config.vocab_size:
        raise InputError(
            f"{tokenizer.file}: has {tokenizer.size} tokens, expected at most the {model.config.vocab_size} of "
            f"{source}; give the tokenizer that belongs to the encoder"
        )
    return FoundTextEncoder(source, model, tokenizer)


class FoundTextEncoder(NamedTuple):
    """A text encoder whose weights are on disk.

    Attributes:
      source: its own folder or file.
      model: its sizes and parameters.
      tokenizer: its tokenizer, if there is one.
    """

    source: Path
    model: StreamedModel
    tokenizer: Tokenizer | None

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.source if self.source.is_dir() else self.source.parent

    def load(
        self, dtype: jnp.dtype = jnp.bfloat16, progress: Callable[[int], object] = lambda nbytes: None
    ) -> "UMT5TextEncoder":
        """Reads the weights; see `load_text_encoder`, and `load_module` for `progress`."""
        module = load_module(self.source, self.model, progress=progress, dtype=dtype)
        return UMT5TextEncoder(module, self.tokenizer, self.folder)

    def prompt_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises InputError if there is none."""
        return _required_tokenizer(self.tokenizer, self.folder)


def _required_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer:
    if tokenizer is None:
        places_shown = ", ".join(map(str, places(folder)))
        raise InputError(
            f"{folder}: expected the text encoder's tokenizer ({' or '.join(FILES)}) in one of "
            f"{places_shown}, found none; copy it there from the repository of the encoder"
        )
    return tokenizer


class UMT5TextEncoder:
    """umT5 as a function of token ids, and of prompts.

    Args:
      encoder: the module with its parameters.
      tokenizer: its tokenizer, if there is one.
      folder: folder of the encoder, for messages.

    Attributes:
      config: sizes of the encoder.
      params: nested dict of its parameters.
      tokenizer: its tokenizer, or None.
    """

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer | None, folder: Path):
        graphdef, state = nnx.split(encoder)
        self.config: UMT5Config = encoder.config
        self.params: dict[str, Any] = nnx.to_pure_dict(state)
        self.tokenizer = tokenizer
        self._folder = folder
        self._apply = jax.jit(apply_encoder(graphdef))

    def __call__(self, ids: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> jax.Array:
        """Embeddings of token ids.

        Args:
          ids: integers [B, L] below config.vocab_size.
          mask: [B, L], nonzero or True at tokens, zero or False at padding.

        Returns:
          [B, L, config.model_dim] in the encoder's dtype, exactly zero at padding.

        Raises:
          ValueError: on arrays of other ranks or shapes.
        """
        return self._apply(self.params, ids, mask)

    def for_prompts(self, length: int = MAX_TOKENS) -> "UMT5Prompts":
        """The encoder as a function of prompts, for sampling and data preparation.

        Args:
          length: tokens of every prompt, at most 512. Shorter prompts are padded, longer ones are cut.

        Raises:
          ValueError: on another length.
          InputError: there is no tokenizer.
        """
        if not 1 <= length <= MAX_TOKENS:
            raise ValueError(f"length must be from 1 to {MAX_TOKENS}, found {length}")
        return UMT5Prompts(self, _required_tokenizer(self.tokenizer, self._folder), length)


class UMT5Prompts:
    """umT5 as a `TextEncoder`; see `UMT5TextEncoder.for_prompts`.

    Attributes:
      length: tokens per prompt; shorter prompts are padded with zero vectors.
      text_dim: width of an embedding.
    """

    def __init__(self, encoder: UMT5TextEncoder, tokenizer: Tokenizer, length: int):
        self.length = length
        self.text_dim = encoder.config.model_dim
        self._encoder, self._tokenizer = encoder, tokenizer

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """B prompts -> [B, length, text_dim] float32. Positions after a prompt's end token are exactly zero.

        A prompt that is too long is cut with a warning, and keeps its end token. The cleaning of prompts is Wan's. On a
        mesh, the devices along `BATCH` encode different prompts.

        Raises:
          InputError: a prompt is not UTF-8.
        """
        if isinstance(prompts, str):
            raise ValueError(f"expected a sequence of prompts, found one string {prompts!r}; wrap it in a list")
        different = list(dict.fromkeys(prompts))
        tokens = self._tokenizer(different, self.length)
        for prompt, count in tokens.cut.items():
            warnings.warn(
                f"prompt '{shown(prompt)}': has {count} tokens, only the first {self.length} are used; shorten it",
                stacklevel=2,
            )
        embeddings: dict[str, np.ndarray] = {}
        # One on each device at a time: the attention weights of 64 heads over 512 tokens are 64 MB for each prompt. The
        # last group is padded, because a smaller one would compile again.
        rows = math.prod(map(axis_size, BATCH))
        for start in range(0, len(different), rows):
            group = [min(start + row, len(different) - 1) for row in range(rows)]
            found = np.asarray(self._encoder(tokens.ids[group], tokens.mask[group]), np.float32)
            embeddings |= zip(different[start : start + rows], found, strict=False)
        shape = (len(prompts), self.length, self.text_dim)
        return np.array([embeddings[prompt] for prompt in prompts], np.float32).reshape(shape)
