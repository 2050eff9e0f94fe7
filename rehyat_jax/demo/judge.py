"""Recognises the digit and the motion in videos, to score how well they follow their captions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rehyat_jax.demo.digits import (
    CAPTIONS,
    DIGIT_SIZE,
    FRAME_SIZE,
    NUM_JUDGE_SCANS,
    TRAVEL,
    Axis,
    hat,
    load_scans,
    render,
)

BACKGROUND = 0.15
"""Largest value of a background pixel: the faint haze of an imperfect video must not move its centre of mass."""

NO_DIGIT = -1
"""Reading of a frame that is all background."""


class Reading(NamedTuple):
    """The content of N videos of T frames.

    Attributes:
      digits: [N, T] int, the digit in each frame, or NO_DIGIT.
      axes: N axes of motion; None if the digit moves less than half the distance between the edges.
      amplitudes: [N], the distance in pixels that the digit's centre of mass covers along the axis where it is greater.
    """

    digits: np.ndarray
    axes: list[Axis | None]
    amplitudes: np.ndarray


class Score(NamedTuple):
    """How well videos follow their captions; fractions in [0, 1].

    Attributes:
      digit_accuracy: fraction of videos in which most frames show the caption's digit.
      frame_accuracy: fraction of frames that show the caption's digit.
      motion_accuracy: fraction of videos that move along the caption's axis.
    """

    digit_accuracy: float
    frame_accuracy: float
    motion_accuracy: float


class Judge:
    """A support-vector classifier of single frames, trained on scans that no transformer trains on.

    It reads 97.9% of real videos of the transformer's 1,297 scans correctly, and the motion of all. Samples may score
    higher, because they are more typical than handwriting. It is a `rehyat_jax.data.sources.Judge`.
    """

    prompts = tuple(CAPTIONS)
    frame_size = FRAME_SIZE, FRAME_SIZE

    def __init__(self, classifier: Any):
        self._classifier = classifier

    @classmethod
    def fit(cls) -> "Judge":
        """Trains on the judge's 500 scans, each rendered at 8 random positions; it takes less than a second.

        Raises:
          InputError: scikit-learn is not installed.
        """
        scans = load_scans("judge")  # before the import, because its error explains a missing scikit-learn
        from sklearn.svm import SVC

        rng = np.random.default_rng(0)
        copies = 8
        tops, lefts = rng.uniform(0, TRAVEL, (2, NUM_JUDGE_SCANS, copies))
        frames = [render(image, top, left) for image, top, left in zip(scans.images, tops, lefts, strict=True)]
        features = _features(np.concatenate(frames))
        return cls(SVC(C=10, gamma=0.2).fit(features, scans.digits.repeat(copies)))

    def read(self, videos: np.ndarray) -> Reading:
        """Reads videos [N, T, 24, 24, 3], floating point in [0, 1], that codec "space_to_depth" decoded."""
        videos = np.asarray(videos, np.float32)
        if videos.ndim != 5 or videos.shape[2:] != (FRAME_SIZE, FRAME_SIZE, 3):
            raise ValueError(f"videos: expected [N, T, {FRAME_SIZE}, {FRAME_SIZE}, 3], found shape {videos.shape}")
        frames = videos.mean(-1).reshape(-1, FRAME_SIZE, FRAME_SIZE)
        shows_digit = (frames > BACKGROUND).any((1, 2))
        digits = np.where(shows_digit, self._classifier.predict(_features(frames)), NO_DIGIT)
        digits, shows_digit = digits.reshape(videos.shape[:2]), shows_digit.reshape(videos.shape[:2])
        tracks = _centers_of_mass(frames).reshape(*videos.shape[:2], 2)
        covered = [_covered(track[shown]) for track, shown in zip(tracks, shows_digit, strict=True)]
        return Reading(digits, [_axis(*distances) for distances in covered], np.array([max(d) for d in covered]))

    def verdicts(self, videos: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Reads N videos [N, T, 24, 24, 3] against N captions from `rehyat_jax.demo.digits.CAPTIONS`.

        Returns:
          Booleans whose means are the fields of `Score`: "digit_accuracy" [N], "frame_accuracy" [N, T] and
          "motion_accuracy" [N]. And "motion_amplitude" [N], see `Reading`.
        """
        unknown = [caption for caption in captions if caption not in CAPTIONS]
        if unknown:
            raise ValueError(f"captions: expected some of {list(CAPTIONS)}, found {unknown[0]!r}")
        if len(captions) != len(videos):
            raise ValueError(f"captions: expected one for each of {len(videos)} videos, found {len(captions)}")
        wanted_digits = np.array([CAPTIONS[caption][0] for caption in captions])
        wanted_axes = [CAPTIONS[caption][1] for caption in captions]
        reading = self.read(videos)
        right = reading.digits == wanted_digits[:, None]
        return {
            "digit_accuracy": right.mean(1) > 0.5,
            "frame_accuracy": right,
            "motion_accuracy": np.array([a == b for a, b in zip(reading.axes, wanted_axes, strict=True)]),
            "motion_amplitude": reading.amplitudes,
        }

    def score(self, videos: np.ndarray, captions: Sequence[str]) -> Score:
        """The means of `verdicts`."""
        verdicts = self.verdicts(videos, captions)
        return Score(*(float(verdicts[name].mean()) for name in Score._fields))


def open_judge() -> Judge:
    """See `rehyat_jax.data.sources.make_judge`."""
    return Judge.fit()


def _covered(track: np.ndarray) -> tuple[float, float]:
    """The distances that a track of centres [frames, (row, column)] covers along rows and columns."""
    rows, columns = np.ptp(track, axis=0) if len(track) else (0.0, 0.0)
    return float(rows), float(columns)


def _axis(rows: float, columns: float) -> Axis | None:
    """The axis along which the digit covers the greater distance."""
    if max(rows, columns) < TRAVEL / 2:
        return None
    return "sideways" if columns > rows else "up and down"


def _centers_of_mass(frames: np.ndarray) -> np.ndarray:
    """[N, 24, 24] -> [N, 2], row and column in pixels; the middle of the frame if all is background."""
    mass = np.maximum(frames - BACKGROUND, 0)
    # A negligible constant puts the centre of an empty frame in the middle.
    mass = mass + 1e-6
    pixels = np.arange(FRAME_SIZE)
    moments = np.stack([mass.sum(2) @ pixels, mass.sum(1) @ pixels], -1)
    return moments / mass.sum((1, 2))[:, None]


def _features(frames: np.ndarray) -> np.ndarray:
    """[N, 24, 24] -> [N, 64]: the 16x16 window around the centre of mass, averaged down to a scan's 8x8 pixels."""
    centers = _centers_of_mass(frames)
    window = np.arange(DIGIT_SIZE) - (DIGIT_SIZE - 1) / 2
    samples = hat((centers[..., None] + window)[..., None] - np.arange(FRAME_SIZE))
    rows, columns = samples.reshape(-1, 2, DIGIT_SIZE // 2, 2, FRAME_SIZE).mean(3).swapaxes(0, 1)
    return (rows @ frames @ columns.swapaxes(-1, -2)).reshape(len(frames), -1)
