"""From a source of examples to an endless, resumable iterator of batches."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import grain
import numpy as np
from absl import flags

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError

SKIPPED = "skipped"
"""What a batch has beside its examples where corrupt records are skipped: [B] int32, 1 in the place of such a one."""


class Bucket(Protocol):
    """A Grain random-access source of training examples of one shape.

    Every example has "latents" [T, H, W, C] and "text" [L, text_dim], and of a teacher's trajectory "timestep" [], all
    float32. One that cannot be read raises `CorruptRecord`.

    Attributes:
      latents_shape: (T, H, W, C).
    """

    latents_shape: tuple[int, int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Source(Protocol):
    """Training examples of one or several shapes.

    Attributes:
      kind: "examples" (clean latents) or "trajectories" (latents that a teacher met on its way from noise to data).
      codec, text_encoder: names of what made latents and text embeddings.
      null_text: [L, text_dim] float32, the embedding of no caption.
      buckets: the examples, those of one shape together; at least one bucket.
    """

    kind: str
    codec: str
    text_encoder: str
    null_text: np.ndarray
    buckets: Sequence[Bucket]

    def __len__(self) -> int:
        """Examples in all."""
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

    Every bucket is shuffled as a whole, anew each epoch, by `seed` alone. All examples of an element are from one
    bucket; buckets take turns, each as often as its weight says and as evenly as possible. Elements do not depend on
    `workers`, and the parts of a batch put together are what one process would have read, in the same order.

    Args:
      batch_size: examples of a batch; B = batch_size / parts.
      seed: of the shuffle, from 0 to 2**32 - 1.
      accumulation_steps: S, how many batches come at a time, as [S, B, ...]; one, as [B, ...], by default.
      workers: processes that make batches ahead of time; 0 makes them in threads of this process.
      part, parts: which of how many equal parts of every batch to read, when several processes train together.
      weights: how many batches to take of each bucket, relative to the others; by default the number of its examples.
      skip_corrupt: in place of a record that is corrupt, take the next good one in shuffled order, which so comes
        twice in this epoch, and leave all others where they are. Otherwise such a record raises `CorruptRecord`.

    Raises:
      InputError: not one weight for each bucket, or none is positive.
    """
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

    def elements(bucket: Bucket) -> grain.MapDataset:
        examples = grain.MapDataset.source(_InOrder(bucket, seed, skip_corrupt))
        # Cut into batches before workers divide them, so that a batch is the same however many there are. Nothing
        # remains in an endless data set; without the flag, its length overflows at batch size 1.
        rows = examples.batch(batch_size // parts, drop_remainder=True)[part::parts]
        return rows if accumulation_steps is None else rows.batch(accumulation_steps, drop_remainder=True)

    used = [(elements(bucket), weight) for bucket, weight in zip(buckets, weights, strict=True) if weight]
    return Batches(grain.MapDataset.mix(*zip(*used, strict=True)) if len(used) > 1 else used[0][0], workers)


class Batches:
    """An iterator over the elements of an endless data set that can go on from any of them.

    The position is one number: it means the same to any number of workers and processes.

    Args:
      elements: the data set.
      workers: see `batches`.
    """

    def __init__(self, elements: grain.MapDataset, workers: int):
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
        """The position, for `set_state` of an iterator made with the same arguments but perhaps workers and parts."""
        return {"next": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a position that `get_state` gave."""
        self.seek(state["next"])

    def seek(self, index: int) -> None:
        """Goes to before the element of an index, from 0."""
        self.close()
        self._next = index

    def close(self) -> None:
        """Stops threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> grain.DatasetIterator:
        # Grain's default buffer of 500 elements counts examples; here an element is a whole batch.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        dataset = self._elements[self._next :].to_iter_dataset(ahead)
        if self._workers:
            # Grain reads absl's flags, which are an error to read in a program that never parses them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_parent)
        return iter(dataset)


class _InOrder:
    """The examples of a bucket as training meets them, epoch after epoch: a Grain source of endless length."""

    def __init__(self, bucket: Bucket, seed: int, skip_corrupt: bool):
        self._bucket, self._skip_corrupt = bucket, skip_corrupt
        # Repeated before it is cut into batches, so that no epoch drops a remainder.
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
                    print(f"skipped a corrupt record: {error}", file=sys.stderr, flush=True)
        raise InputError(f"all {len(self._bucket)} records of {self._bucket.latents_shape} are corrupt; prepare again")


def _follow_parent(worker: int, workers: int) -> None:
    """In a worker: end when the process that reads from it has ended, killed perhaps, and not before.

    SIGTERM often goes to all processes of a job. The one that trains stops after its step, for which it needs data.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
