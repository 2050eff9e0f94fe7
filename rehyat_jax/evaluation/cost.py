"""The cost of one evaluation of each model by the length of the video: FLOPs, and cycles and memory on a TPU."""

from collections.abc import Mapping, Sequence

from rehyat_jax.cli import progress as announced
from rehyat_jax.cost_model.chips import chip_of, device_count
from rehyat_jax.cost_model.tpu_target import check_libtpu
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.bootstrap import Estimate
from rehyat_jax.evaluation.results import Curve, Evaluation
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.flops import forward_flops
from rehyat_jax.parallel.mesh import AXES
from rehyat_jax.planning.estimate import TpuCost
from rehyat_jax.planning.sampling.plan import Program, part_plan

X_LABEL = "latent frames"


def flops_by_duration(models: Mapping[str, WanConfig], lengths: Sequence[int], size: tuple[int, int]) -> Curve:
    """FLOPs of one forward pass of each model, see `models.wan.flops`; counted, so there are no intervals.

    Args:
      models: architectures by name.
      lengths: latent frames of the videos.
      size: height and width of the latents.
    """

    def flops(config: WanConfig, frames: int) -> float:
        count = forward_flops(config, (frames, *size))
        return float(count.outside + count.blocks)

    series = {name: Estimate.exact([flops(config, frames) for frames in lengths]) for name, config in models.items()}
    return Curve("FLOPs of a forward pass", X_LABEL, "FLOPs", list(lengths), series)


def check_topology(topology: str) -> None:
    """Raises InputError for a topology that is unknown or not of TPUs, or if the TPU compiler is missing."""
    device_count(topology)
    check_libtpu()
    if chip_of(topology).is_gpu:
        raise InputError(f"--topology {topology}: expected a slice of TPUs, found GPUs, which have no static cycles")


def static_by_duration(
    models: Mapping[str, WanConfig], lengths: Sequence[int], size: tuple[int, int], topology: str
) -> Evaluation:
    """Static cycles and peak memory of a step of the solver without guidance, in bfloat16 on one chip, one video.

    Every program is compiled, which takes minutes; docs/static_cycles.md explains the cycles.

    Args:
      models, lengths, size: see `flops_by_duration`.
      topology: whose first chip to compile for.

    Returns:
      Two curves: static_cycles_by_duration, and memory_by_duration in bytes. NaN for videos that do not fit.

    Raises:
      InputError: libtpu is missing or does not know the topology.
    """
    cycles: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for name, config in models.items():
        for frames in lengths:
            program = Program.of(
                "transformer",
                config,
                dict.fromkeys(AXES, 1),
                topology=topology,
                executions=1,
                latents=[frames, *size],
                guided=False,
                stream=False,
            )
            with announced(f"compiling the {name} with {frames} latent frames for {topology}; this takes minutes"):
                plan = part_plan(program)
            found = plan.cost.cycles if isinstance(plan.cost, TpuCost) else float("nan")
            cycles.setdefault(name, []).append(found)
            memory.setdefault(name, []).append(float("nan") if plan.peak is None else plan.peak)
    words = f"on one chip of {topology}"
    series = lambda found: {name: Estimate.exact(values) for name, values in found.items()}
    return Evaluation(
        curves={
            "static_cycles_by_duration": Curve(
                f"static cycles {words}", X_LABEL, "cycles", list(lengths), series(cycles)
            ),
            "memory_by_duration": Curve(f"peak memory {words}", X_LABEL, "bytes", list(lengths), series(memory)),
        }
    )
