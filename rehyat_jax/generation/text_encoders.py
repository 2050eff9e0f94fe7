"""Text encoders: prompts to the embeddings that the diffusion transformer's cross attention reads."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import is_text, shown


class TextEncoder(Protocol):
    """The interface of a text encoder to sampling and data preparation.

    Attributes:
      length: tokens per prompt; shorter prompts are padded with zero vectors.
      text_dim: width of an embedding.
    """

    length: int
    text_dim: int

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """B prompts -> [B, length, text_dim] float32.

        A prompt that is too long raises InputError, or is cut with a warning.
        """


class WordVectors:
    """The demo's text encoder: a fixed random vector for each lower-cased word, without any learned meaning.

    The empty prompt is all zeros, which is also the unconditional input of classifier-free guidance. Every word has a
    vector, so a word that a model was never trained on is not an error; it just carries no meaning for that model.
    """

    length = 8
    text_dim = 64

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """B prompts of at most 8 words -> [B, 8, 64] float32, entries uniform with mean 0 and variance 1."""
        if isinstance(prompts, str):
            raise ValueError(f"expected a sequence of prompts, found one string {prompts!r}; wrap it in a list")
        embeddings = np.zeros((len(prompts), self.length, self.text_dim), np.float32)
        for row, prompt in zip(embeddings, prompts, strict=True):
            words = checked_text(prompt).lower().split()
            if len(words) > self.length:
                raise InputError(
                    f"prompt {prompt!r}: expected at most {self.length} words, found {len(words)}; shorten the prompt"
                )
            for position, word in enumerate(words):
                row[position] = self._vector(word)
        return embeddings

    def _vector(self, word: str) -> np.ndarray:
        # Straight from a cryptographic hash: numpy's generators may change their streams between versions, and a
        # trained model's vocabulary must not.
        stream = hashlib.shake_256(word.encode()).digest(4 * self.text_dim)
        unit_interval = np.frombuffer(stream, "<u4") / 2**32
        return (unit_interval - 0.5) * np.sqrt(12)


def checked_text(prompt: str) -> str:
    """The prompt itself. Raises InputError if it has no UTF-8 form."""
    if not is_text(prompt):
        raise InputError(f"prompt '{shown(prompt)}': expected text in UTF-8, found other bytes; write it in UTF-8")
    return prompt
