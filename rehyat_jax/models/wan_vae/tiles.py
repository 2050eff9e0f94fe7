"""Overlapping tiles of a frame, blended where they overlap, for frames that do not fit into the device's memory.

The tiles and their blending are those of diffusers' `AutoencoderKLWan.enable_tiling`: every tile begins three quarters
of a tile after its neighbour, and its weight grows linearly from zero over the quarter that they share. One tile after
another is coded as a stream, and the host assembles the result. The device holds one tile of one latent frame and its
caches, for any length and any size of frames.
"""

from collections.abc import Callable

import numpy as np


def assembled(code: Callable[[slice, slice], np.ndarray], height: int, width: int, tile: int, scale: int) -> np.ndarray:
    """Codes the tiles of a frame row by row and blends them.

    Args:
      code: codes the latents, or the pixels of the latents, in these rows and columns: [B, F, H, W, C] with `scale`
        places for every latent along both sides.
      height, width: those of the latents.
      tile: side of a tile in latents, a multiple of 4.
      scale: see `code`.

    Returns:
      [B, F, scale * height, scale * width, C].
    """
    stride = tile * 3 // 4
    rows, columns = ([slice(at, min(at + tile, size)) for at in range(0, size, stride)] for size in (height, width))
    shared = scale * (tile - stride)
    lines: list[np.ndarray] = []
    above: dict[int, np.ndarray] = {}
    for row in rows:
        line: list[np.ndarray] = []
        left: np.ndarray | None = None
        for column in columns:
            part = code(row, column)
            if row.start:
                _blend(part, above[column.start], shared, axis=2)
            if left is not None:
                _blend(part, left, shared, axis=3)
            # The tiles below and to the right need only what they share.
            above[column.start] = part[:, :, scale * stride :].copy()
            left = part[:, :, :, scale * stride :]
            line.append(part[:, :, : scale * stride, : scale * stride].copy())
        lines.append(np.concatenate(line, axis=3))
    return np.concatenate(lines, axis=2)


def _blend(part: np.ndarray, before: np.ndarray, extent: int, *, axis: int) -> None:
    """Blends the beginning of a tile with the end of the tile before it along an axis, in place."""
    extent = min(part.shape[axis], before.shape[axis], extent)
    weight = (np.arange(extent, dtype=part.dtype) / extent).reshape(-1, *(1,) * (part.ndim - 1 - axis))
    shared = (slice(None),) * axis + (slice(extent),)
    part[shared] = before[shared] * (1 - weight) + part[shared] * weight
