"""Changes that make sampling fit, smallest change first."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from rehyat_jax.cost_model.chips import chip_of, larger_topology
from rehyat_jax.errors import InputError
from rehyat_jax.generation.options import SIZES
from rehyat_jax.planning.sampling.plan import PartPlan, Program, SamplingPlan, SamplingRequest, placement


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Options that fit, and the evidence for them.

    Attributes:
      options: the options of the command that change.
      peak: the largest bytes on a device of the parts that did not fit before.
      compiled: True if the compiler says so, False if arithmetic does.
    """

    options: str
    peak: int
    compiled: bool

    def __str__(self) -> str:
        evidence = "compiled" if self.compiled else "by arithmetic, not compiled"
        return f"{self.options} ({evidence}: {self.peak / 2**30:.1f} GiB a device)"


def smallest_remedy(
    plan: SamplingPlan, plan_part: Callable[[Program], PartPlan], *, compilations: int = 2
) -> Remedy | None:
    """The first change that fits; None if none does.

    Only the parts that did not fit are planned again. The first `compilations` changes that arithmetic does not rule
    out are compiled. Arithmetic decides about the others.
    """
    failed = {name: part for name, part in plan.parts.items() if not part.fits}
    for options, request in candidates(plan.request):
        limit = chip_of(request.topology).hbm_bytes
        try:
            programs = {name: request.programs()[name] for name in failed}
            if any(program.case == failed[name].program.case for name, program in programs.items()):
                continue  # more of the same chips do not help a part that runs on one
            arguments = [sum(placement(program).arguments.values()) for program in programs.values()]
        except InputError:  # the mesh cannot shard the model
            continue
        estimates = [estimated_peak(failed[name], program) for name, program in programs.items()]
        known = [estimate for estimate in estimates if estimate is not None]
        if max(*arguments, *known) > limit:
            continue
        if compilations:
            compilations -= 1
            found = {name: plan_part(program) for name, program in programs.items()}
            if all(part.fits for part in found.values()):
                return Remedy(options, max(part.peak or 0 for part in found.values()), compiled=True)
            # Later estimates start from what the compiler said.
            failed |= {name: part for name, part in found.items() if part.peak is not None}
        elif len(known) == len(failed):
            return Remedy(options, max(known), compiled=False)
    return None


def candidates(request: SamplingRequest) -> Iterator[tuple[str, SamplingRequest]]:
    """(options, changed request), in the order in which to try them.

    Streaming gives the same video, more chips cost more, and a smaller or shorter video is another one.
    """
    if not request.stream and all(form.streams for form in request.wan.block_forms.of_block):
        yield "--stream", dataclasses.replace(request, stream=True, mesh=())
    without, larger = ", without --mesh" if request.mesh else "", larger_topology(request.topology)
    while larger is not None:
        topology, larger = larger, larger_topology(larger)
        yield f"--topology {topology}{without}", dataclasses.replace(request, topology=topology, mesh=())
    frames, height, width = request.video
    for name, smaller in sorted(SIZES.items(), key=lambda item: -math.prod(item[1])):
        if math.prod(smaller) < height * width:
            yield f"--size {name}", dataclasses.replace(request, video=(frames, *smaller))
    while frames > 5:
        frames = frames // 8 * 4 + 1
        yield f"--frames {frames}", dataclasses.replace(request, video=(frames, height, width))


def estimated_peak(plan: PartPlan, program: Program) -> int | None:
    """Estimated bytes on a device of another program of the same part; None if the plan does not know its own peak.

    Arguments are known exactly. Everything else is proportional to the latent pixels on a device.

    Raises:
      InputError: the mesh cannot shard the model.
    """
    if plan.peak is None:
        return None
    arguments = sum(placement(program).arguments.values())
    scale = _pixels_on_device(program) / _pixels_on_device(plan.program)
    return round(arguments + scale * max(plan.peak - sum(plan.arguments.values()), 0))


def _pixels_on_device(program: Program) -> float:
    """Latent pixels of one device, or prompts for the text encoder."""
    return math.prod(program.arguments.get("latents", (1,))) / math.prod(program.mesh.values())
