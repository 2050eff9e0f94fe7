"""Estimates with 95% confidence intervals, by the percentile bootstrap over examples, videos or prompts.

A figure is a ratio of sums over units, sum(a_i) / sum(b_i); a mean has b_i = 1. `Resampling` draws once how often each
unit occurs in each resample. All figures of the same units share that draw, so figures of two models on the same units
are resampled in pairs. `scipy.stats.bootstrap` was not used: it draws anew for every statistic, and copies the data
for every resample instead of counting.
"""

import dataclasses
from typing import Any

import numpy as np

RESAMPLES = 2000
INTERVAL = 2.5, 97.5
"""Percentiles of the resampled figures at the ends of an interval."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, or an array of figures, with the ends of its 95% confidence interval.

    Attributes:
      value, low, high: float64 arrays of one shape, NaN where there are no data. An exact figure has equal ends.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def exact(cls, value: Any) -> "Estimate":
        """A figure without sampling error, such as a count of FLOPs."""
        array = np.asarray(value, np.float64)
        return cls(array, array, array)

    def to_json(self) -> dict[str, Any]:
        """{"value", "low", "high"}: numbers or nested lists, None in place of NaN."""
        return {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Any) -> "Estimate":
        """Inverse of `to_json`. Raises ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise ValueError(f"expected an object with {', '.join(names)}, found {value!r}")
        try:
            return cls(*(np.array(value[name], np.float64) for name in names))
        except TypeError as error:
            raise ValueError(f"expected numbers, found {value!r}") from error


def _to_json(array: np.ndarray) -> Any:
    cells = np.array(array, object)
    cells[~np.isfinite(array)] = None
    return cells.tolist()


class Resampling:
    """Resamples of `units` units, drawn with replacement.

    Attributes:
      counts: float64 [RESAMPLES, units], how often each unit occurs in each resample.
    """

    def __init__(self, units: int, *, seed: int = 0):
        if units < 2:
            raise ValueError(f"units: expected at least 2, because fewer have no spread, found {units}")
        drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
        self.counts = drawn.astype(np.float64)

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray, *, over: tuple[int, ...] = ()) -> Estimate:
        """Estimates of sum(numerators) / sum(denominators) over the units.

        Args:
          numerators: [units, ...].
          denominators: of the same shape.
          over: axes of the ratios, counted from the first after the units, over which the mean is taken.
        """
        ratios = lambda counts: self._ratios(counts, numerators, denominators).mean(tuple(axis + 1 for axis in over))
        low, high = np.percentile(ratios(self.counts), INTERVAL, axis=0)
        return Estimate(ratios(np.ones_like(self.counts[:1]))[0], low, high)

    def mean(self, values: np.ndarray) -> Estimate:
        """Estimates of the mean over the units of values [units, ...], any real dtype."""
        return self.ratio(np.asarray(values), np.ones_like(values, np.float64))

    @staticmethod
    def _ratios(counts: np.ndarray, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        above, below = (
            (counts @ np.asarray(part, np.float64).reshape(len(part), -1)).reshape(len(counts), *part.shape[1:])
            for part in (numerators, denominators)
        )
        return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)
