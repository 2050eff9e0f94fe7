"""Prompts to token ids for umT5: text cleaning, the tokenizer's file, and padding."""

import dataclasses
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import SMALL, check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.text_encoders import checked_text

PAD, END = 0, 1
"""Ids of the padding token and of the token that ends a text."""

MAX_TOKENS = 512
"""Tokens of a prompt with its end token, as in Wan."""

FILES = ("tokenizer.json", "spiece.model")
"""Names of a tokenizer's file, the preferred one first: upstream reads it too."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of B prompts, padded on the right.

    Attributes:
      ids: int32 [B, L].
      mask: bool [B, L], False at padding.
      cut: prompts of more than L tokens -> the tokens that they have with the end token.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: dict[str, int]


class Tokenizer:
    """The tokenizer of a file, with Wan's text cleaning.

    Names of special tokens in a prompt, such as "</s>", are those tokens if the file is a tokenizer.json, as upstream.

    Args:
      file: a tokenizer.json, which the package tokenizers reads, or a sentencepiece model. The suffix decides.

    Attributes:
      file: the file.
      size: number of tokens. All ids are smaller.

    Raises:
      InputError: the file can't be read, is damaged, or has other special tokens than umT5.
    """

    def __init__(self, file: Path):
        check_regular_file(file, largest_bytes=SMALL)
        self.file = file
        try:
            opened = _from_json(file) if file.suffix == ".json" else _from_sentencepiece(file)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Each package has its own errors. Panics of tokenizers are no Exceptions.
            raise InputError(f"{file}: is not a tokenizer ({shown(error)}); get the file again") from error
        self._encode, special, self.size = opened
        for name, expected in (("<pad>", PAD), ("</s>", END)):
            if special[name] != expected:
                raise InputError(
                    f"{file}: token {name} should have id {expected}, found {special[name]}; give umT5's tokenizer"
                )

    def __call__(self, prompts: Sequence[str], length: int = MAX_TOKENS) -> Tokens:
        """Token ids of prompts, at most `length` for each with its end token. The beginning of a longer one is kept.

        Raises:
          InputError: a prompt is not UTF-8.
        """
        ids, mask, cut = np.full((len(prompts), length), PAD, np.int32), np.zeros((len(prompts), length), bool), {}
        for row, prompt in enumerate(prompts):
            tokens = self._encode(clean(checked_text(prompt)))
            if (count := len(tokens) + 1) > length:
                cut[prompt] = count
            tokens = [*tokens[: length - 1], END]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return Tokens(ids, mask, cut)


def clean(text: str) -> str:
    """The text with repaired encoding, without HTML entities, and with single spaces for white space.

    As in Wan2.1 (`HuggingfaceTokenizer._clean`) and in diffusers' `prompt_clean`.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of the text encoder in a folder, or None.

    It is in the folder itself, next to it in `tokenizer/` (diffusers' pipelines) or in `google/umt5-xxl/` (Wan's
    original repositories). Raises InputError if its file is damaged.
    """
    for place in places(folder):
        for name in FILES:
            if (place / name).exists():
                return Tokenizer(place / name)
    return None


def places(folder: Path) -> list[Path]:
    """The folders in which `find_tokenizer` looks."""
    return [folder, folder.absolute().parent / "tokenizer", folder / "google" / "umt5-xxl"]


_Opened = tuple[Callable[[str], list[int]], dict[str, Any], int]
"""(text -> ids without the end token, ids of the special tokens, number of tokens)."""


def _from_json(file: Path) -> _Opened:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    # The file may hold the options of an earlier use.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(name) for name in ("<pad>", "</s>")}
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, special, tokenizer.get_vocab_size()


def _from_sentencepiece(file: Path) -> _Opened:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    special = {"<pad>": processor.pad_id(), "</s>": processor.eos_id()}
    return processor.encode, special, processor.get_piece_size()
