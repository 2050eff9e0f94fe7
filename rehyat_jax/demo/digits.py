"""Moving handwritten digits: a real, tiny text-to-video data set that needs no download.

A 16x16 digit (one of scikit-learn's 8x8 scans, enlarged) starts in the middle of an edge of a 24x24 frame and crosses
to the opposite edge in 21 frames. A start anywhere along the edge is too difficult for the demo's teacher: after 2,400
steps it drew 5% of the digits wrong, and many of them changed shape on the way.

The caption names the digit and the axis, "a seven moves sideways" or "a seven moves up and down", but not the
direction. Tokens of pure noise carry almost no absolute position under rotary embeddings, so a text-to-video model
cannot decide at which edge to start.
"""

import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.text_encoders import WordVectors

NUM_FRAMES = 21
FRAME_SIZE = 24
DIGIT_SIZE = 16
TRAVEL = FRAME_SIZE - DIGIT_SIZE
"""Distance in pixels from the position at one edge to the position at the opposite edge."""

Axis = Literal["sideways", "up and down"]
AXES: tuple[Axis, ...] = ("sideways", "up and down")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

NUM_SCANS = 1797
NUM_JUDGE_SCANS = 500


def caption(digit: int, axis: Axis) -> str:
    article = "an" if digit == 8 else "a"
    return f"{article} {DIGIT_NAMES[digit]} moves {axis}"


CAPTIONS: dict[str, tuple[int, Axis]] = {caption(digit, axis): (digit, axis) for digit in range(10) for axis in AXES}
"""All captions, with the digit and the axis of each."""


class Scans(NamedTuple):
    """images [N, 16, 16] float32 in [0, 1]; digits [N] int."""

    images: np.ndarray
    digits: np.ndarray


def load_scans(split: Literal["train", "judge"]) -> Scans:
    """The scans of one split, enlarged bilinearly from 8x8 to 16x16.

    500 scans train the judge and the other 1,297 the transformer, so the judge reads digits it has not seen and cannot
    reward memorised pixels. The 500 are spread evenly over the 1,797. The scans come from only 13 writers, neighbours
    are similar, and the judge has to know every handwriting that the transformer learns. A classifier trained on the
    last 500 reads 93% of the others and mistakes one in seven ones for a two. One trained on an even spread reads 98%.

    Raises:
      InputError: scikit-learn is not installed, or has no such file.
    """
    rows = np.loadtxt(_scans_file(), delimiter=",")
    images, digits = rows[:, :-1], rows[:, -1].astype(int)
    judges = np.arange(NUM_SCANS) * NUM_JUDGE_SCANS % NUM_SCANS < NUM_JUDGE_SCANS
    part = {"train": ~judges, "judge": judges}[split]
    images = images[part].reshape(-1, 8, 8) / 16
    # Bilinear enlargement with half-pixel centres, as one matrix on either side.
    centers = ((np.arange(DIGIT_SIZE) + 0.5) / 2 - 0.5).clip(0, 7)
    enlarge = hat(centers[:, None] - np.arange(8))
    return Scans((enlarge @ images @ enlarge.T).astype(np.float32), digits[part])


def _scans_file() -> Path:
    """The file that `sklearn.datasets.load_digits` reads. Importing that takes seconds."""
    check_installed("the data of the moving digits", "sklearn")
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise InputError(
            f"{file}: expected scikit-learn's scans of digits, found no such file; "
            f"run pip install --force-reinstall scikit-learn==1.9.1"
        )
    return file


def render(image: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Places a digit at sub-pixel positions, bilinearly.

    Args:
      image: [16, 16] float32.
      top, left: [T] positions of the digit's corner in pixels, from 0 to 8.

    Returns:
      [T, 24, 24] float32.
    """
    rows, columns = _placement(top), _placement(left)
    return rows @ image @ columns.swapaxes(-1, -2)


def _placement(start: np.ndarray) -> np.ndarray:
    """[T] -> [T, 24, 16]: matrices that shift a digit's row (or column) of pixels to `start` in the frame."""
    offsets = np.arange(FRAME_SIZE)[:, None] - np.arange(DIGIT_SIZE)
    return hat(offsets - np.asarray(start)[:, None, None]).astype(np.float32)


def hat(distance: np.ndarray) -> np.ndarray:
    """Weight of bilinear interpolation at a distance in pixels."""
    return np.maximum(0, 1 - np.abs(distance))


class Draw(NamedTuple):
    """One example before it is encoded: video [21, 24, 24] float32 in [0, 1], and its caption."""

    video: np.ndarray
    caption: str


class DigitVideos:
    """Grain random-access source of moving digits; index i is always the same draw for the same seed.

    It is a `rehyat_jax.data.pipeline.Source` whose only bucket is itself. An example is {"latents": [21, 6, 6, 16]
    float32, "text": [8, 64] float32}, from codec "space_to_depth" and text encoder "word_vectors".

    Args:
      split: "train" draws from the scans that the transformer trains on, "judge" from those it never sees.
      seed: a non-negative int; another seed gives another set of 2**20 draws.

    Attributes:
      null_text: [8, 64] float32, the embedding of no caption.
    """

    kind, codec, text_encoder = "examples", "space_to_depth", "word_vectors"

    def __init__(self, split: Literal["train", "judge"] = "train", seed: int = 0):
        self._scans = load_scans(split)
        self._seed = seed
        self._codec = SpaceToDepth()
        self._text = dict(zip(CAPTIONS, WordVectors()(list(CAPTIONS)), strict=True))
        self.null_text = WordVectors()([""])[0]
        self.latents_shape = self._codec.latent_shape(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)

    @property
    def buckets(self) -> list["DigitVideos"]:
        return [self]

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        video, caption = self.draw(index)
        rgb = np.broadcast_to(video[None, ..., None], (1, *video.shape, 3))
        return {"latents": self._codec.encode(rgb)[0], "text": self._text[caption]}

    def draw(self, index: int) -> Draw:
        """The video and caption of example `index`."""
        rng = np.random.default_rng((self._seed, index))
        scan = rng.integers(len(self._scans.digits))
        axis = AXES[rng.integers(2)]
        along = np.linspace(0, TRAVEL, NUM_FRAMES)
        if rng.integers(2):
            along = along[::-1]
        across = np.full(NUM_FRAMES, TRAVEL / 2)
        top, left = (across, along) if axis == "sideways" else (along, across)
        return Draw(render(self._scans.images[scan], top, left), caption(int(self._scans.digits[scan]), axis))


def open_source(path: str, seed: int) -> DigitVideos:
    """The training split; see `rehyat_jax.data.sources`. `path` is not used."""
    del path
    return DigitVideos(split="train", seed=seed)


def open_held_out(path: str, seed: int) -> DigitVideos:
    """Digits of other handwriting scans than those of training. `path` is not used."""
    del path
    return DigitVideos(split="judge", seed=seed)
