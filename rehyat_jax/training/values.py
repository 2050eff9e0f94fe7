"""Kinds of values that a field of a configuration may have: what is allowed, in words and as a check."""

import abc
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import closest, shown


def shown_value(value: Any) -> str:
    """A value as in Python, for a message: on one line of at most 200 characters."""
    try:
        return shown(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a value within itself
        return f"a {type(value).__name__} that is too large to show"


class Values(abc.ABC):
    """The values that a field may have. `str` says in words which they are."""

    @abc.abstractmethod
    def __contains__(self, value: Any) -> bool: ...

    def check(self, value: Any, place: str) -> None:
        """Raises InputError, naming `place`, unless the value is one of these."""
        if value not in self:
            raise InputError(f"{place} must be {self}, found {shown_value(value)}")


@dataclasses.dataclass(frozen=True)
class Integer(Values):
    """Integers from `low` to `high`, and those in `also`."""

    low: int
    high: int = 2**31 - 1
    also: tuple[int, ...] = ()

    def __contains__(self, value: Any) -> bool:
        return type(value) is int and (self.low <= value <= self.high or value in self.also)

    def __str__(self) -> str:
        return " or ".join([*map(str, self.also), f"an integer from {self.low} to {self.high}"])


@dataclasses.dataclass(frozen=True)
class Real(Values):
    """Finite numbers from `low` to `high`.

    Attributes:
      above, below: True leaves out `low` or `high` itself.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )
        return inside and abs(value) <= sys.float_info.max

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'above' if self.above else 'of at least'} {self.low:g}"
        if not self.above and not self.below:
            return f"a number from {self.low:g} to {self.high:g}"
        low = f"{'above' if self.above else 'of at least'} {self.low:g}"
        return f"a number {low} and {'less than' if self.below else 'at most'} {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Choice(Values):
    """Names. They may be the keys of a table that grows later."""

    names: Iterable[str]

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and value in tuple(self.names)

    def __str__(self) -> str:
        return f"one of {tuple(self.names)}"

    def check(self, value: Any, place: str) -> None:
        if value not in self:
            nearest = closest(str(value), self.names)[0]
            raise InputError(f"{place} must be {self}, found {shown_value(value)}; did you mean {nearest!r}?")


@dataclasses.dataclass(frozen=True)
class Text(Values):
    """Text that can be a path."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and "\0" not in value

    def __str__(self) -> str:
        return "text"


@dataclasses.dataclass(frozen=True)
class Boolean(Values):
    def __contains__(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "True or False"


@dataclasses.dataclass(frozen=True)
class Blocks(Values):
    """Blocks of a model. The number of its blocks is checked when the model is known.

    Attributes:
      may_be_unset: None is allowed, too.
    """

    may_be_unset: bool = False

    def __contains__(self, value: Any) -> bool:
        if value is None:
            return self.may_be_unset
        if not isinstance(value, tuple | list):
            return isinstance(value, str) and value == "all"
        return all(type(block) is int and block >= 0 for block in value) and list(value) == sorted(set(value))

    def __str__(self) -> str:
        return f'"all" or indices in increasing order as (1, 3){" or unset" if self.may_be_unset else ""}'


@dataclasses.dataclass(frozen=True)
class Several(Values):
    """Any number of values, each of them one of `each`."""

    each: Values

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, tuple | list) and all(element in self.each for element in value)

    def __str__(self) -> str:
        return f"a tuple; each element is {self.each}"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, tuple | list):
            super().check(value, place)
        for number, element in enumerate(value):
            self.each.check(element, f"{place}[{number}]")


@dataclasses.dataclass(frozen=True)
class Entry(Values):
    """A dictionary whose keys are names of fields. Each field has allowed values of its own."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, Mapping | ml_collections.ConfigDict) and all(isinstance(name, str) for name in value)

    def __str__(self) -> str:
        return "a dictionary of fields"
