"""Opens the codec and the text encoder that a model's checkpoint names.

Those of Wan have weights, which are read from a folder of models: a diffusers pipeline's folder, Wan's original
repository, or another path that `load_vae` or `load_text_encoder` takes.
"""

from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import closest
from rehyat_jax.generation.codecs import Codec, SpaceToDepth
from rehyat_jax.generation.text_encoders import TextEncoder, WordVectors
from rehyat_jax.generation.umt5 import load_text_encoder
from rehyat_jax.generation.wan_codec import load_wan_codec


def get_codec(name: str, models: Path | None = None) -> Codec:
    """The codec of this name.

    Args:
      name: name of the codec in a model's checkpoint or in a data set.
      models: path of the VAE's weights, for a codec that has some. They are read at once.

    Raises:
      InputError: the name is unknown, or the weights are missing or damaged.
    """
    if name == "space_to_depth":
        return SpaceToDepth()
    if name == "wan_vae":
        return load_wan_codec(_given(models, f"codec {name!r}"))
    raise _unknown("codec", name, ("space_to_depth", "wan_vae"))


def get_text_encoder(name: str, models: Path | None = None) -> TextEncoder:
    """The text encoder of this name.

    Args:
      name: name of the text encoder in a model's checkpoint or in a data set.
      models: path of its weights and tokenizer, for an encoder that has some. They are read at once.

    Raises:
      InputError: the name is unknown, or the weights or the tokenizer are missing or damaged.
    """
    if name == "word_vectors":
        return WordVectors()
    if name == "umt5":
        return load_text_encoder(_given(models, f"text encoder {name!r}")).for_prompts()
    raise _unknown("text encoder", name, ("word_vectors", "umt5"))


def _given(models: Path | None, part: str) -> Path:
    if models is None:
        raise InputError(
            f"{part}: has weights, and no folder of them was given; give --models, the folder of Wan2.1's pipeline"
        )
    return models


def _unknown(part: str, name: str, known: tuple[str, ...]) -> InputError:
    return InputError(f"unknown {part} {name!r}; the known ones, closest first: {', '.join(closest(name, known))}")
