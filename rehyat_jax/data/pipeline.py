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
    source: Source, *, batch_size: int, seed: int, workers: int = 0, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless iterator of {"latents": [B, T, H, W, C], "text": [B, L, text_dim]} numpy batches.

    The source is shuffled as a whole, anew each epoch, by `seed` alone: batches do not depend on `workers`, and the
    processes' batches put together are what one process would have read. The iterator's position is saved with
    `grain.checkpoint.CheckpointSave` and restored with `CheckpointRestore` through Orbax, into an iterator made with
    the same arguments; the batches then continue as if nothing had happened. Its `close()` stops threads and workers.

    Args:
      batch_size: B, examples in each of this process's batches.
      seed: of the shuffle, from 0 to 2**32 - 1.
      workers: processes that make batches ahead of time; 0 makes them in threads of this process.
      process_index, process_count: this process's share when several train together (`jax.process_index()` and
        `jax.process_count()`).
    """
    if len(source) == 0:
        raise ValueError("source: expected at least one example, found none")
    # Repeated before it is cut into batches, so that no epoch drops a remainder; cut before workers divide it, so that
    # a batch is the same however many there are.
    examples = grain.MapDataset.source(source).shuffle(seed=seed).repeat()[process_index::process_count]
    # Grain's default buffer of 500 elements counts examples; here an element is a whole batch.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    # Nothing remains in an endless data set; without the flag, its length overflows at batch size 1.
    dataset = examples.batch(batch_size, drop_remainder=True).to_iter_dataset(ahead)
    if workers:
        # Grain reads absl's flags, which are an error to read in a program that never parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(dataset)
