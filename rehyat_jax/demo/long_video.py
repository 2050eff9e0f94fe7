"""The demo's long videos: what becomes of digit, motion and chunk boundaries beyond the length of training."""

from typing import NamedTuple

import numpy as np

from rehyat_jax.demo.digits import CAPTIONS, FRAME_SIZE, NUM_FRAMES
from rehyat_jax.demo.judge import Judge
from rehyat_jax.demo.measure import SOLVER
from rehyat_jax.evaluation.consistency import frame_changes, jump
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.noise import host_noise
from rehyat_jax.generation.streaming import PART_CHUNKS, stream_latents
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan.modeling import WanTransformer

SEGMENTS = 6
"""A long video is so many times as long as the videos of training."""


class Segment(NamedTuple):
    """The quality of one segment of 21 frames, over all videos.

    Attributes:
      frame_accuracy: fraction of frames that show the caption's digit.
      motion_accuracy: fraction of videos that move along the caption's axis within the segment.
      chunk_jump: mean absolute change of pixels from chunk to chunk within parts, over that from frame to frame within
        chunks. It is 1 if no boundary can be seen.
      part_jump: the same from part to part. With limited positions, a new part also has another origin of positions.
    """

    frame_accuracy: float
    motion_accuracy: float
    chunk_jump: float
    part_jump: float


def sample_long(student: WanTransformer, longest: int | None = NUM_FRAMES) -> tuple[np.ndarray, list[str]]:
    """Streams one long video for every caption.

    Args:
      student: causal hybrid attention in every block.
      longest: see `stream_latents`. docs/sampling.md compares the default with None.

    Returns:
      (videos [20, 126, 24, 24, 3] in [0, 1], their captions).
    """
    captions, codec, encoder = list(CAPTIONS), SpaceToDepth(), WordVectors()
    noise = host_noise(0, len(captions), codec.latent_shape(SEGMENTS * NUM_FRAMES, FRAME_SIZE, FRAME_SIZE))
    text, negative_text = encoder(captions), encoder([""] * len(captions))
    latents = stream_latents(student, text, negative_text, noise, longest=longest, progress=True, **SOLVER)
    return codec.decode(latents), captions


def by_position(judge: Judge, videos: np.ndarray, captions: list[str], chunk_frames: int) -> list[Segment]:
    """The quality of every segment of videos [N, 21 k, 24, 24, 3], streamed in chunks of `chunk_frames` frames."""
    changes = frame_changes(videos)
    # Change i leads to frame i + 1, and belongs to its segment.
    frame = np.arange(1, videos.shape[1])
    is_part = frame % (PART_CHUNKS * chunk_frames) == 0
    is_chunk = (frame % chunk_frames == 0) & ~is_part
    segments = []
    for begin in range(0, videos.shape[1], NUM_FRAMES):
        score = judge.score(videos[:, begin : begin + NUM_FRAMES], captions)
        inside = (begin <= frame) & (frame < begin + NUM_FRAMES)
        within = inside & ~is_chunk & ~is_part
        jumps = [jump(changes, inside & chosen, within) for chosen in (is_chunk, is_part)]
        segments.append(Segment(score.frame_accuracy, score.motion_accuracy, *jumps))
    return segments
