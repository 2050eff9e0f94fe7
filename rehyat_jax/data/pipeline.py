"""Turns a source of examples into an endless, resumable iterator of batches."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from absl import flags

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown

if TYPE_CHECKING:
    import grain  # only where it is used: it takes a fifth of the time in which commands start

SKIPPED = "skipped"
"""Key of a batch when corrupt records are skipped: [B] int32, 1 for an example that replaces a corrupt record."""


class Bucket(Protocol):
    """A Grain random-access source of training examples of one shape.

    Every example has "latents" [T, H, W, C] and "text" [L, text_dim]; one of a teacher's trajectory also has "timestep"
    []. All are float32. An example that cannot be read raises `CorruptRecord`.

    Attributes:
      latents_shape: (T, H, W, C).
    """

    latents_shape: tuple[int, int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Source(Protocol):
    """Training examples of one or several shapes.

    Attributes:
      kind: "examples" (clean latents) or "trajectories" (noisy latents from a teacher's path from noise to data).
      codec, text_encoder: names of the models that computed latents and text embeddings.
      null_text: [L, text_dim] float32, the embedding of no caption.
      buckets: the examples, grouped by shape; at least one bucket.

    A source that reads files of a folder, `config.data.path`, also has the list `files` of their paths: a run that is
    resumed compares their fingerprints. It also has `teacher`, which may be None, see `rehyat_jax.data.manifest`.
    """

    kind: str
    codec: str
    text_encoder: str
    null_text: np.ndarray
    buckets: Sequence[Bucket]

    def __len__(self) -> int:
        """Total number of examples."""
        ...


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    accumulation_steps: int | None = None,
    workers: int = 0,
    part: int = 0,
    parts: int = 1,
    weights: Sequence[float] = (),
    skip_corrupt: bool = False,
) -> "Batches":
    """Endless iterator of {"latents": [B, T, H, W, C], "text": [B, L, text_dim]} numpy batches.

    Every bucket is shuffled globally, again in each epoch; the order depends only on `seed`. All examples of an element
    are from one bucket. Buckets alternate in proportion to their weights and as evenly as possible. Elements do not
    depend on `workers`. The parts of a batch together equal the batch that one process would read, in the same order.

    Args:
      batch_size: number of examples in a batch; B = batch_size / parts.
      seed: seed of the shuffle, from 0 to 2**32 - 1.
      accumulation_steps: S, number of batches in an element [S, B, ...]; by default an element is one batch [B, ...].
      workers: number of processes that prepare batches ahead of time; 0 uses threads of this process.
      part, parts: index of the part of every batch to read, and number of equal parts, if several processes train
        together.
      weights: relative number of batches from each bucket; by default the number of its examples.
      skip_corrupt: whether to replace a corrupt record by the next good one in shuffled order, which then occurs twice
        in this epoch; all other records keep their places. Otherwise a corrupt record raises `CorruptRecord`.

    Raises:
      InputError: the number of weights is not the number of buckets, or no weight is positive, or one is negative.
    """
    import grain

    buckets = source.buckets
    if not all(len(bucket) for bucket in buckets):
        raise ValueError("source: expected at least one example in every bucket, found none")
    weights = tuple(weights) or tuple(len(bucket) for bucket in buckets)
    if len(weights) != len(buckets) or min(weights) < 0 or max(weights) <= 0:
        shapes = ", ".join("x".join(map(str, bucket.latents_shape)) for bucket in buckets)
        raise InputError(
            f"config.data.weights: expected one number for each of the buckets {shapes}, 0 to skip one, found "
            f"{weights}; correct it"
        )

    def elements(bucket: Bucket) -> "grain.MapDataset":
        examples = grain.MapDataset.source(_InOrder(bucket, seed, skip_corrupt))
        # Batches are formed before workers divide them, so that a batch does not depend on their number. An endless
        # data set has no remainder; without the flag, its length overflows at batch size 1.
        rows = examples.batch(batch_size // parts, drop_remainder=True)[part::parts]
        return rows if accumulation_steps is None else rows.batch(accumulation_steps, drop_remainder=True)

    used = [(elements(bucket), weight) for bucket, weight in zip(buckets, weights, strict=True) if weight]
    return Batches(grain.MapDataset.mix(*zip(*used, strict=True)) if len(used) > 1 else used[0][0], workers)


class Batches:
    """An iterator over the elements of an endless data set that can resume from any of them.

    The position is one number, independent of the number of workers and processes.

    Args:
      elements: the data set.
      workers: see `batches`.
    """

    def __init__(self, elements: "grain.MapDataset", workers: int):
        self._elements, self._workers = elements, workers
        self._next = 0
        self._iterator = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        element = next(self._iterator)
        self._next += 1
        return element

    def get_state(self) -> dict[str, int]:
        """The position, for `set_state` of an iterator with the same arguments; only workers and parts may differ."""
        return {"next": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Moves to a position that `get_state` returned."""
        self.seek(state["next"])

    def seek(self, index: int) -> None:
        """Moves to the position before the element with an index, counted from 0."""
        self.close()
        self._next = index

    def close(self) -> None:
        """Stops threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> "grain.DatasetIterator":
        import grain

        # Grain's default buffer of 500 elements assumes single examples; here an element is a complete batch.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        dataset = self._elements[self._next :].to_iter_dataset(ahead)
        if self._workers:
            # Grain reads absl's flags, which raises an error in a program that never parses them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_parent)
        return iter(dataset)


class _InOrder:
    """An endless Grain source: the examples of a bucket in the order of training, epoch after epoch."""

    def __init__(self, bucket: Bucket, seed: int, skip_corrupt: bool):
        import grain

        self._bucket, self._skip_corrupt = bucket, skip_corrupt
        # Repeated before batches are formed, so that no epoch drops a remainder.
        self._order = grain.MapDataset.range(len(bucket)).shuffle(seed=seed).repeat()
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Mapping[str, np.ndarray]:
        for skipped in range(len(self._bucket)):
            index = self._order[position + skipped]
            try:
                example = self._bucket[index]
                return {**example, SKIPPED: np.int32(skipped > 0)} if self._skip_corrupt else example
            except CorruptRecord as error:
                if not self._skip_corrupt:
                    raise CorruptRecord(f"{error}, or skip such records: --config.data.corrupt=skip") from error
                if index not in self._told:
                    self._told.add(index)
                    print(f"skipped a corrupt record: {shown(error, 1000)}", file=sys.stderr, flush=True)
        raise InputError(f"all {len(self._bucket)} records of {self._bucket.latents_shape} are corrupt; prepare again")


def _follow_parent(worker: int, workers: int) -> None:
    """Makes a worker end exactly when the process that reads from it has ended, for example because it was killed.

    SIGTERM often goes to all processes of a job. The training process stops only after its step, which needs data.
    Ctrl-C also goes to all of them, but only the training process handles it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
