"""The solver that a model of few steps was trained for, as its checkpoint stores it."""

import dataclasses
from typing import Any, get_args

from rehyat_jax.diffusion.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """Options of a solver; see `rehyat_jax.generation.generate.generate`.

    Attributes:
      steps: evaluations of the model, at least 1.
      guidance_scale: 1 for a model that has learned guidance.
      flow_shift: of the noise levels.
      sampler: the solver.

    Raises:
      ValueError: a value is not allowed.
    """

    steps: int
    guidance_scale: float
    flow_shift: float
    sampler: Sampler

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps should be an integer from 1 to 10000, found {self.steps!r}")
        for name, least in (("guidance_scale", 0.0), ("flow_shift", 0.001)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value <= 1000:
                raise ValueError(f"{name} should be a number from {least:g} to 1000, found {value!r}")
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler should be one of {get_args(Sampler)}, found {self.sampler!r}")

    @classmethod
    def from_json(cls, value: Any) -> "SolverOptions":
        """The options of a JSON object with all fields. Raises ValueError."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise ValueError(f"expected an object with the fields {', '.join(names)}, found {value!r}")
        return cls(**value)
