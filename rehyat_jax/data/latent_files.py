"""Training examples that were encoded beforehand, one safetensors file each."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rehyat_jax.errors import InputError

NULL_TEXT = "null_text.safetensors"


class LatentFiles:
    """Grain random-access source over a folder of encoded videos.

    The folder holds any number of `NAME.safetensors`, each one example with the tensors `latents` [T, H, W, C],
    normalised as the model's codec gives them, and `text` [L, text_dim], zero-padded to the same L in all files. It
    also holds `null_text.safetensors` with `text` [L, text_dim], the embedding of no caption, which caption dropout
    puts in a caption's place. Any floating-point type is read as float32. Examples are ordered by file name. To write
    one: `safetensors.numpy.save_file({"latents": latents, "text": text}, "folder/name.safetensors")`.

    Attributes:
      null_text: [L, text_dim] float32.

    Raises:
      InputError: here if the folder, its null text or its first example is not like that; on access if another example
        is not, or differs from the first one in shape.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a folder of encoded examples, found none; check the path")
        self._files = sorted(path for path in folder.glob("*.safetensors") if path.name != NULL_TEXT)
        if not self._files:
            raise InputError(
                f"{folder}: expected at least one example NAME.safetensors with latents and text, found none; "
                "encode videos and captions into this folder first"
            )
        if not (folder / NULL_TEXT).exists():
            raise InputError(
                f"{folder / NULL_TEXT}: expected a file with the tensor text, found none; write the text encoder's "
                "embedding of the empty caption there"
            )
        self.null_text = _read(folder / NULL_TEXT, {"text": 2})["text"]
        first = _read(self._files[0], {"latents": 4})
        self._shapes = {"latents": first["latents"].shape, "text": self.null_text.shape}
        self[0]  # A folder that is wrong throughout is found now, not in a worker at the first batch.

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = _read(self._files[index], {"latents": 4, "text": 2})
        for name, tensor in example.items():
            if tensor.shape != self._shapes[name]:
                reference = NULL_TEXT if name == "text" else self._files[0].name
                raise InputError(
                    f"{self._files[index]}: tensor {name}: expected shape {self._shapes[name]} as in {reference}, "
                    f"found {tensor.shape}; examples of one folder must agree to be put into one batch"
                )
        return example


def _read(path: Path, ranks: dict[str, int]) -> dict[str, np.ndarray]:
    """The tensors named in `ranks`, as float32. Raises InputError unless they are there, finite and of those ranks."""
    try:
        with safe_open(path, framework="numpy") as file:
            missing = sorted(ranks.keys() - set(file.keys()))
            if missing:
                raise InputError(
                    f"{path}: expected tensors {sorted(ranks)}, found {sorted(file.keys())}; {missing} must be added"
                )
            tensors = {name: file.get_tensor(name) for name in ranks}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: expected a complete safetensors file, found {error}; write it again") from error
    for name, tensor in tensors.items():
        if tensor.ndim != ranks[name]:
            raise InputError(
                f"{path}: tensor {name}: expected {ranks[name]} axes without a batch axis, found shape {tensor.shape}"
            )
        tensors[name] = tensor.astype(np.float32)
        if not np.isfinite(tensors[name]).all():
            raise InputError(f"{path}: tensor {name}: expected finite values, found NaN or infinity; encode it again")
    return tensors
