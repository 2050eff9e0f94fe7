"""Changes that make a run fit, smallest change first."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from rehyat_jax.attention.hybrid.context_parallel import padded_frames
from rehyat_jax.cost_model.chips import chip_of, device_count, larger_topology
from rehyat_jax.errors import InputError
from rehyat_jax.planning.planner import Plan, Request, placement
from rehyat_jax.training.stages import STAGES


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes of the configuration, perhaps another topology, and the evidence for them.

    Attributes:
      estimate: bytes on a device by arithmetic; None if only the compiler can say.
      verified: True if it was compiled and fits.
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


_KEEPS_LESS = dict.fromkeys(("none", "dots", "attention"), "block") | {"attention_offload": "offload"}
"""remat -> the policy that keeps least on the device, with a block's input in the same place."""


def smallest_remedy(plan: Plan, compile_plan: Callable[[Request], Plan], *, compilations: int = 2) -> Remedy | None:
    """The first change that fits; None if none does.

    At most `compilations` changes are compiled. Arithmetic decides about the others.
    """
    config, topology = plan.request.config, plan.request.topology
    remat = {}
    if STAGES[config.stage].recomputes and config.remat in _KEEPS_LESS:
        # Only the compiler can say how much this saves; the next candidates start from its answer.
        remat, compilations = {"remat": _KEEPS_LESS[config.remat]}, compilations - 1
        plan = compile_plan(plan.request.changed(remat))
        if plan.fits:
            return Remedy(remat, topology, None, verified=True)
    for changes, topology in candidates(plan):
        request = plan.request.changed(changes, topology)
        try:
            remedy = Remedy(remat | changes, topology, estimated_peak(plan, request))
            if remedy.estimate is not None and remedy.estimate > chip_of(topology).hbm_bytes:
                continue
            if compilations:
                compilations -= 1
                if compile_plan(request).fits:
                    return dataclasses.replace(remedy, verified=True)
            elif remedy.estimate is not None:
                return remedy
        except InputError:  # the mesh cannot shard the model
            continue
    return None


def candidates(plan: Plan) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of the configuration, and a topology, in the order in which to try them; later ones go further."""
    config, topology = plan.request.config, plan.request.topology
    steps, context, rows = config.accumulation_steps, plan.mesh["context"], plan.mesh["data"] * plan.mesh["fsdp"]

    def changes(steps: int, data: int, fsdp: int, context: int) -> dict[str, Any]:
        wanted = {"accumulation_steps": steps, "mesh.data": data, "mesh.fsdp": fsdp, "mesh.context": context}
        before = {"accumulation_steps": config.accumulation_steps}
        before |= {f"mesh.{axis}": size for axis, size in config.mesh.items()}
        # -1 stands for all devices that the other axes leave.
        return {name: value for name, value in wanted.items() if before[name] not in (value, -1)}

    while config.batch_size % (2 * steps * rows) == 0:
        steps *= 2
        yield changes(steps, plan.mesh["data"], plan.mesh["fsdp"], context), topology
    if plan.mesh["data"] > 1:
        yield changes(steps, 1, rows, context), topology
    if rows % 2 == 0:
        # Half of every video on a device, and half as many videos at a time in total.
        yield changes(2 * steps, 1, rows // 2, 2 * context), topology
    while topology := larger_topology(topology):
        times = device_count(topology) // plan.devices
        fitting = [n for n in range(1, steps + 1) if config.batch_size % (n * times * rows) == 0]
        if fitting:
            yield changes(fitting[-1], 1, times * rows, context), topology
        else:
            yield changes(steps, 1, rows, times * context), topology


def estimated_peak(plan: Plan, request: Request) -> int | None:
    """Estimated bytes on a device of a run other than the plan's; None if the plan does not know its own peak.

    The arguments of a step are known exactly, and gradients are as large as parameters. Other temporaries are
    proportional to the tokens on a device at a time.

    Raises:
      InputError: the mesh cannot shard the model or the batch.
    """
    placed = placement(request)
    if plan.peak is None:
        return None
    tokens = _tokens(request, placed.mesh) / _tokens(plan.request, plan.mesh)
    temporary = plan.peak - sum(plan.arguments.values()) - _gradient_bytes(plan.request, plan.arguments)
    kept = sum(placed.arguments.values()) + _gradient_bytes(request, placed.arguments)
    return round(kept + tokens * max(temporary, 0))


def _gradient_bytes(request: Request, arguments: dict[str, int]) -> int:
    """Gradients, and their sum if several steps are accumulated."""
    return arguments["parameters"] * (2 if request.config.accumulation_steps > 1 else 1)


def _tokens(request: Request, mesh: dict[str, int]) -> float:
    """The tokens on a device at a time, counted as frames of videos."""
    config, wan = request.config, request.wan
    frames = request.latents[0] // wan.patch_size[0]
    videos = config.batch_size / (config.accumulation_steps * mesh["data"] * mesh["fsdp"])
    return videos * padded_frames(frames, wan.block_forms.chunk_frames, mesh["context"]) / mesh["context"]
