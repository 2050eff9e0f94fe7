"""From a random-access source of examples to an endless, resumable iterator of batches."""

from collections.abc import Mapping
from typing import Protocol

import grain
import numpy as np
from absl import flags


class Source(Protocol):
    """A Grain random-access source of training examples.

    Every example has "latents" [T, H, W, C] float32 and "text" [L, text_dim] float32, of the same shapes throughout.

    Attributes:
      null_text: [L, text_dim] float32, the embedding of no caption.
    """

    null_text: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    accumulation_steps: int | None = None,
    workers: int = 0,
    part: int = 0,
    parts: int = 1,
) -> grain.DatasetIterator:
    """Endless iterator of {"latents": [B, T, H, W, C], "text": [B, L, text_dim]} numpy batches.

    The source is shuffled as a whole, anew each epoch, by `seed` alone: batches do not depend on `workers`, and the
    parts of a batch put together are what one process would have read, in the same order. The iterator's position is
    saved with `grain.checkpoint.CheckpointSave` and restored with `CheckpointRestore` through Orbax, into an iterator
    made with the same arguments; the batches then continue as if nothing had happened. Its `close()` stops threads and
    workers.

    Args:
      batch_size: examples of a batch; B = batch_size / parts.
      seed: of the shuffle, from 0 to 2**32 - 1.
      accumulation_steps: S, how many batches come at a time, as [S, B, ...]; one, as [B, ...], by default.
      workers: processes that make batches ahead of time; 0 makes them in threads of this process.
      part, parts: which of how many equal parts of every batch to read, when several processes train together.
    """
    if len(source) == 0:
        raise ValueError("source: expected at least one example, found none")
    # Repeated before it is cut into batches, so that no epoch drops a remainder; cut before workers divide it, so that
    # a batch is the same however many there are.
    examples = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    # Nothing remains in an endless data set; without the flag, its length overflows at batch size 1.
    rows = examples.batch(batch_size // parts, drop_remainder=True)[part::parts]
    # Grain's default buffer of 500 elements counts examples; here an element is a whole batch.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    if accumulation_steps is not None:
        rows = rows.batch(accumulation_steps, drop_remainder=True)
    dataset = rows.to_iter_dataset(ahead)
    if workers:
        # Grain reads absl's flags, which are an error to read in a program that never parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(dataset)
