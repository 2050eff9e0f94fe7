"""The plan of one run on one topology: its compiled step, and the figures from it."""

import dataclasses
import importlib.metadata
import json
from typing import Any, NamedTuple

import jax
import ml_collections

from rehyat_jax.cost_model.chips import chip_of, devices_of
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.flops import StepFlops
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.planning import train_step
from rehyat_jax.planning.compiled import HasOutcome, Outcome, Report, compiled_outcome, no_report
from rehyat_jax.planning.estimate import TpuCost
from rehyat_jax.training.stages import STAGES


@dataclasses.dataclass(frozen=True)
class Request:
    """The run to plan: a configuration, the architecture it trains, a video's latents (frames, height, width)."""

    config: ml_collections.ConfigDict
    wan: WanConfig
    latents: tuple[int, int, int]
    topology: str

    def case(self) -> dict[str, Any]:
        """The arguments of `train_step.lowered`, JSON-ready."""
        config = json.loads(self.config.to_json())
        return {"config": config, "model": self.wan.to_dict(), "latents": list(self.latents)}

    @property
    def flops(self) -> StepFlops:
        """Operations of one example of a step."""
        return STAGES[self.config.stage].step_flops(self.wan, self.latents, self.config)

    def changed(self, changes: dict[str, Any], topology: str | None = None) -> "Request":
        """A request with other values of the configuration's fields, optionally on another topology."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return dataclasses.replace(self, config=config, topology=topology or self.topology)


@dataclasses.dataclass(frozen=True)
class Plan(HasOutcome):
    """The memory and the cost of a run.

    Attributes:
      mesh: the resolved sizes of its axes.
      arguments: bytes on a device of a step's arguments, by kind.
      outcome: the compiled step.
    """

    request: Request
    devices: int
    mesh: dict[str, int]
    arguments: dict[str, int]
    outcome: Outcome

    @property
    def chips(self) -> int:
        return self.devices // chip_of(self.request.topology).devices_per_chip

    @property
    def model_flops(self) -> int:
        """Model FLOPs of a step, all devices together; see `models.wan.flops`."""
        return self.request.flops.model * self.request.config.batch_size

    @property
    def recomputed_flops(self) -> int:
        """FLOPs that a step recomputes to save memory."""
        return self.request.flops.recomputed * self.request.config.batch_size

    @property
    def _compiler(self) -> str:
        return "jaxlib" if chip_of(self.request.topology).is_gpu else "libtpu"

    def utilization(self, step_seconds: float) -> float:
        """Model FLOPs use: the share of the peak of all chips, at `step_seconds` a step."""
        return self.model_flops / (step_seconds * chip_of(self.request.topology).peak_flops * self.devices)

    def to_json(self) -> dict[str, Any]:
        """The plan as --json writes it. Ranges are {"low", "high"}; the lowest use is at the longest step."""
        plan = {
            "topology": self.request.topology,
            "devices": self.devices,
            "chips": self.chips,
            "mesh": self.mesh,
            "fits": self.fits,
            "hbm_bytes_limit": chip_of(self.request.topology).hbm_bytes,
            "hbm_bytes_peak": self.peak,
            "memory": self.memory or self.arguments,
            "flops_per_step": self.model_flops,
            "recomputed_flops_per_step": self.recomputed_flops,
            "compile_seconds": round(self.outcome.compile_seconds, 1),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", self._compiler)},
        }
        if self.cost is None:
            return plan
        low, high = self.cost.step_seconds
        hours = {"low": low * self.request.config.steps / 3600, "high": high * self.request.config.steps / 3600}
        of_kernels = isinstance(self.cost, TpuCost)
        return plan | {
            "static_cycles": self.cost.cycles if of_kernels else None,
            "least_cycles": self.cost.least_cycles if of_kernels else None,
            "static_cycles_of_kernels": self.cost.kernel_cycles if of_kernels else None,
            "collective_bytes": self.cost.collective_bytes,
            "hbm_traffic_bytes": self.cost.hbm_traffic,
            "host_bytes": self.cost.host_bytes,
            "compute_seconds": dict(zip(("low", "high"), self.cost.compute_seconds, strict=True)),
            "collective_seconds": self.cost.collective_seconds,
            "step_seconds_low": low,
            "step_seconds_high": high,
            "model_flops_utilization": {"low": self.utilization(high), "high": self.utilization(low)},
            "hours": hours,
            "chip_hours": {end: value * self.chips for end, value in hours.items()},
        }


class Placement(NamedTuple):
    """The devices and the arguments of a run's step, before anything is compiled.

    Attributes:
      mesh: the resolved sizes of its axes.
      arguments: bytes on a device by kind.
    """

    devices: int
    mesh: dict[str, int]
    arguments: dict[str, int]


def placement(request: Request) -> Placement:
    """The placement of a run.

    Raises:
      InputError: libtpu is missing or does not know the topology, or the mesh cannot shard the model or the batch.
    """
    devices = devices_of(request.topology)
    mesh = make_mesh(request.config.mesh, devices)
    with jax.set_mesh(mesh):
        arguments = train_step.abstract_step(request.config, request.wan, request.latents).memory
    return Placement(len(devices), dict(mesh.shape), arguments)


def make_plan(request: Request, report: Report = no_report) -> Plan:
    """The plan of a run. Compiling its train step takes minutes.

    Args:
      report: see `compiled_outcome`.

    Raises:
      InputError: see `placement`; or a kernel needs more VMEM than the chip has.
    """
    placed = placement(request)
    flops = request.flops.model + request.flops.recomputed
    outcome = compiled_outcome(
        train_step.__name__,
        request.case(),
        request.topology,
        arguments=placed.arguments,
        devices=placed.devices,
        wan=request.wan,
        flops=flops * request.config.batch_size / placed.devices,
        vmem_remedy="choose another config.attention_implementation or another form of config.hybrid",
        report=report,
    )
    return Plan(request, **placed._asdict(), outcome=outcome)
