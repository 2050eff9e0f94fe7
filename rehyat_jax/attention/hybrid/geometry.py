"""The frames that every frame attends to, and the division of tokens into chunks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ChunkGeometry:
    """A video of `num_frames` latent frames, divided along time into chunks (ReHyAt section 3).

    Tokens are frame-major: token n belongs to frame n // tokens_per_frame. Chunk t holds the frames [t*Tc, (t+1)*Tc),
    where Tc = chunk_frames; the last chunk may hold fewer. The softmax window of chunk t reaches To = overlap_frames
    further into the past. Because To <= Tc, the overlap of chunk t is the end of chunk t-1. The video's first
    A = anchor_frames frames, at most Tc, are softmax keys of every chunk. With linear_window, the frames of the window
    are linear keys too.
    """

    num_frames: int
    tokens_per_frame: int
    chunk_frames: int
    overlap_frames: int
    anchor_frames: int = 0
    linear_window: bool = False

    @property
    def num_chunks(self) -> int:
        return -(-self.num_frames // self.chunk_frames)

    @property
    def is_ragged(self) -> bool:
        """True if the last chunk holds fewer than chunk_frames frames."""
        return self.num_frames % self.chunk_frames > 0

    @property
    def overlap_start(self) -> int:
        """The token of a chunk at which the next chunk's overlap begins."""
        return (self.chunk_frames - self.overlap_frames) * self.tokens_per_frame

    @property
    def linear_delay(self) -> int:
        """Frame i is a linear key, of the past or of the window, from chunk (i + linear_delay) // Tc on."""
        return 0 if self.linear_window else self.chunk_frames + self.overlap_frames

    def key_masks(self, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """The softmax keys and the linear keys of every frame, as two boolean arrays [query frame, key frame].

        Softmax keys of chunk t are the anchors and the frames of its window, [max(t*Tc - To, 0), (t+1)*Tc). Linear
        keys are the other frames before the window and, unless `causal`, also those after it. They include the window
        if it is linear_window; without, no key is of both kinds. An anchor is no linear key.
        """
        frame = np.arange(self.num_frames)
        chunk = frame[:, None] // self.chunk_frames
        is_anchor = frame < self.anchor_frames
        before_window = (frame < chunk * self.chunk_frames - self.overlap_frames) & ~is_anchor
        after_window = frame >= (chunk + 1) * self.chunk_frames
        linear_keys = before_window if causal else before_window | (after_window & ~is_anchor)
        softmax_keys = ~before_window & (~after_window | is_anchor)
        if self.linear_window:
            linear_keys = linear_keys | (softmax_keys & ~is_anchor)
        return softmax_keys, linear_keys

    def window_distance(self) -> np.ndarray:
        """The number of frames between every frame and the window of a query's chunk, int [query frame, key frame].

        It is 0 for the last frame before the window and for the first frame after it.
        """
        frame = np.arange(self.num_frames)
        chunk = frame[:, None] // self.chunk_frames
        before = chunk * self.chunk_frames - self.overlap_frames - 1 - frame
        after = frame - (chunk + 1) * self.chunk_frames
        return np.maximum(before, after)

    def split(self, tokens: jax.Array) -> jax.Array:
        """[batch, tokens, ...] -> [chunks, batch, chunk tokens, ...], a ragged last chunk padded with zeros."""
        chunk_tokens = self.chunk_frames * self.tokens_per_frame
        padding = self.num_chunks * chunk_tokens - tokens.shape[1]
        padded = jnp.pad(tokens, [(0, 0), (0, padding)] + [(0, 0)] * (tokens.ndim - 2))
        chunks = padded.reshape(tokens.shape[0], self.num_chunks, chunk_tokens, *tokens.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    def join(self, chunks: jax.Array) -> jax.Array:
        """Inverse of `split`: [chunks, batch, chunk tokens, ...] -> [batch, tokens, ...], padding dropped."""
        tokens = jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])
        return tokens[:, : self.num_frames * self.tokens_per_frame]

    def delay(self, tokens: jax.Array) -> jax.Array:
        """The tokens [batch, tokens, ...] delayed by To = overlap_frames: frame i moves to the place of frame i + To.

        Chunk t of the delayed video holds the frames that leave the softmax window after chunk t.
        """
        delay = self.overlap_frames * self.tokens_per_frame
        return jnp.pad(tokens, [(0, 0), (delay, 0)] + [(0, 0)] * (tokens.ndim - 2))[:, : tokens.shape[1]]

    def chunk_tokens(self, num_frames: jax.Array | None = None) -> np.ndarray | jax.Array:
        """The number of each chunk's tokens that are keys of its window, int32 [chunks].

        Args:
          num_frames: number of frames before the padding, int32 scalar; None if there is no padding, which makes the
            result a constant. Chunks after the last frame hold only padding. They count as complete, because nobody
            reads them.
        """
        where: Any = np.where if num_frames is None else jnp.where
        last: Any = self.num_frames if num_frames is None else num_frames
        frames = last - np.arange(self.num_chunks) * self.chunk_frames
        is_ragged = (frames > 0) & (frames < self.chunk_frames)
        return where(is_ragged, frames, self.chunk_frames).astype(np.int32) * self.tokens_per_frame

    def anchor_keys(self, chunk: Any) -> Any:
        """Boolean [chunks, anchor tokens]: True for the anchors that a chunk attends to in addition to its window.

        Args:
          chunk: numbers of the chunks, int32 [chunks].
        """
        frame = np.arange(self.anchor_frames * self.tokens_per_frame) // self.tokens_per_frame
        return frame < (chunk * self.chunk_frames - self.overlap_frames)[:, None]

    def is_token(self, num_frames: jax.Array | None = None) -> np.ndarray | jax.Array:
        """Boolean [chunks, chunk tokens]: True for tokens of `split` that are keys of a window; see `chunk_tokens`."""
        return np.arange(self.chunk_frames * self.tokens_per_frame) < self.chunk_tokens(num_frames)[:, None]

    def decay_exponents(self, *, future: bool = False) -> np.ndarray:
        """The power of the decay with which each frame enters its sums, int [frames], at most Tc - 1.

        A frame enters the sums of the past when it leaves the window, and is as far from the next window then. It
        enters the sums of the future with its chunk, at the distance from that chunk's beginning.
        """
        frame = np.arange(self.num_frames)
        if future:
            return frame % self.chunk_frames
        return self.chunk_frames - 1 - (frame + self.overlap_frames) % self.chunk_frames


def without_padding(tokens: jax.Array, geometry: ChunkGeometry, num_frames: jax.Array | None) -> jax.Array:
    """Tokens [batch, tokens, ...], zero from frame `num_frames` (int32 scalar) on; None if there is no padding."""
    if num_frames is None:
        return tokens
    is_token = np.arange(tokens.shape[1]) < num_frames * geometry.tokens_per_frame
    return jnp.where(jnp.expand_dims(is_token, range(1, tokens.ndim - 1)), tokens, 0)
