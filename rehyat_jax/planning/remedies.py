"""What to change in a run that does not fit, smallest change first."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rehyat_jax.planning.chips import chip_of, device_count, larger_topology
from rehyat_jax.planning.planner import Plan, Request


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes of the configuration, perhaps another topology, and what speaks for them.

    Attributes:
      estimate: bytes on a device by arithmetic; None where only the compiler can say.
      verified: whether it was compiled, and fits.
    """

    changes: dict[str, Any]
    topology: str
    estimate: int | None
    verified: bool = False

    def __str__(self) -> str:
        options = [f"--topology {self.topology}", *(f"--config.{name}={value}" for name, value in self.changes.items())]
        if self.verified:
            return f"{' '.join(options)} (compiled: fits)"
        told = "" if self.estimate is None else f", {self.estimate / 2**30:.1f} GiB a device"
        return f"{' '.join(options)} (by arithmetic{told}; not compiled)"


def remedies(plan: Plan) -> Iterator[Remedy]:
    """Candidates in the order in which they should be tried; later ones include earlier ones.

    Arithmetic: what a step is given is cut as its axes say; temporaries are in proportion to the examples that are on a
    device at a time, gradients apart, and a part of a video is a part of an example.
    """
    config, topology = plan.request.config, plan.request.topology
    changes: dict[str, Any] = {}
    given = sum(plan.arguments.values())
    gradients = plan.arguments["parameters"]
    temporary = (plan.peak or 0) - given if plan.peak else None

    def estimate(at_a_time: float, fixed: float = 1.0) -> int | None:
        """With this share of the examples on a device at a time, and that of what a step is given."""
        if temporary is None or "remat" in changes:
            return None
        return round(fixed * (given + 2 * gradients) + at_a_time * max(temporary - gradients, 0))

    if config.stage != "distill" and config.remat != "block":
        changes |= {"remat": "block"}
        yield Remedy(dict(changes), topology, None)

    # What a step is given is cut along all axes but "data" and, in part, "tensor".
    rows, given_share = plan.mesh["data"] * plan.mesh["fsdp"], 1 / plan.mesh["data"]
    share, steps = 1.0, config.accumulation_steps
    while config.batch_size % (2 * steps * rows) == 0:
        share, steps = share / 2, 2 * steps
        changes |= {"accumulation_steps": steps}
        yield Remedy(dict(changes), topology, estimate(share))

    if plan.mesh["data"] > 1:
        changes |= {"mesh.data": 1, "mesh.fsdp": rows}
        yield Remedy(dict(changes), topology, estimate(share, given_share))

    if rows > 1 and rows % 2 == 0 and config.batch_size % (2 * steps) == 0:
        # Half of every video on a device, and half as many at a time in all.
        cut = changes | {
            "mesh.context": 2 * plan.mesh["context"],
            "mesh.data": 1,
            "mesh.fsdp": rows // 2,
            "accumulation_steps": 2 * steps,
        }
        yield Remedy(cut, topology, estimate(share / 2, given_share))

    while topology := larger_topology(topology):
        times = device_count(topology) // plan.devices
        fsdp = times * rows
        if (config.batch_size // steps) % fsdp == 0:
            grown = changes | {"mesh.data": 1, "mesh.fsdp": fsdp}
        else:
            grown = changes | {"mesh.context": times * plan.mesh["context"], "mesh.data": 1, "mesh.fsdp": rows}
        yield Remedy(grown, topology, estimate(share / times, given_share / times))


def smallest_remedy(plan: Plan, compile_plan: Callable[[Request], Plan], *, compilations: int = 2) -> Remedy | None:
    """The first candidate that fits, by the compiler while it may be asked, then by arithmetic; None if none does."""
    for remedy in remedies(plan):
        limit = chip_of(remedy.topology).hbm_bytes
        if remedy.estimate is not None and remedy.estimate > limit:
            continue
        if compilations:
            compilations -= 1
            if compile_plan(plan.request.changed(remedy.changes, remedy.topology)).fits:
                return dataclasses.replace(remedy, verified=True)
        elif remedy.estimate is not None:
            return remedy
    return None
