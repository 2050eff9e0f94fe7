"""The demo's long videos: what becomes of digit, motion and chunk boundaries beyond the length of training."""

from typing import NamedTuple

import numpy as np

from rehyat_jax.demo.digits import CAPTIONS, FRAME_SIZE, NUM_FRAMES
from rehyat_jax.demo.judge import Judge
from rehyat_jax.demo.measure import SOLVER
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan.modeling import WanTransformer

SEGMENTS = 6
"""A long video is so many times as long as the videos of training."""

POSITIONS = {"absolute": None, "limited": NUM_FRAMES}
"""Name -> `longest` of `stream_latents`: a frame's own position, or one below those of training."""


class Segment(NamedTuple):
    """The quality of one segment of 21 frames, over all videos.

    Attributes:
      frame_accuracy: fraction of frames that show the caption's digit.
      motion_accuracy: fraction of videos that move along the caption's axis within the segment.
      jump: mean absolute change of pixels from chunk to chunk, over that from frame to frame within chunks. It is 1 if
        no boundary can be seen.
    """

    frame_accuracy: float
    motion_accuracy: float
    jump: float


def sample_long(student: WanTransformer, longest: int | None) -> tuple[np.ndarray, list[str]]:
    """Streams one long video for every caption.

    Args:
      student: causal hybrid attention in every block.
      longest: see `stream_latents`.

    Returns:
      (videos [20, 126, 24, 24, 3] in [0, 1], their captions).
    """
    captions, codec, encoder = list(CAPTIONS), SpaceToDepth(), WordVectors()
    noise = host_noise(0, len(captions), codec.latent_shape(SEGMENTS * NUM_FRAMES, FRAME_SIZE, FRAME_SIZE))
    text, negative_text = encoder(captions), encoder([""] * len(captions))
    latents = stream_latents(student, text, negative_text, noise, longest=longest, progress=True, **SOLVER)
    return codec.decode(latents), captions


def by_position(judge: Judge, videos: np.ndarray, captions: list[str], chunk_frames: int) -> list[Segment]:
    """The quality of every segment of videos [N, 21 k, 24, 24, 3]."""
    changes = np.abs(np.diff(videos, axis=1)).mean((0, 2, 3, 4))  # changes[i] leads to frame i + 1
    is_boundary = np.arange(1, videos.shape[1]) % chunk_frames == 0
    segments = []
    for begin in range(0, videos.shape[1], NUM_FRAMES):
        score = judge.score(videos[:, begin : begin + NUM_FRAMES], captions)
        # The change that leads into the segment belongs to it.
        inside = slice(max(begin - 1, 0), begin + NUM_FRAMES - 1)
        at, within = (changes[inside][chosen[inside]].mean() for chosen in (is_boundary, ~is_boundary))
        segments.append(Segment(score.frame_accuracy, score.motion_accuracy, float(at / within)))
    return segments
