"""The plan of sampling one video on a topology: memory and time of the text encoder, the transformer and the VAE."""

import dataclasses
import functools
import importlib.metadata
import json
import math
from typing import Any, NamedTuple

import jax

from rehyat_jax.attention.hybrid.context_parallel import padded_frames
from rehyat_jax.cost_model.chips import chip_of, device_count, devices_of
from rehyat_jax.cost_model.traced_flops import traced_flops
from rehyat_jax.generation.codecs import WanVaeLatents
from rehyat_jax.models.umt5.config import UMT5_PRESETS, UMT5Config
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.flops import forward_flops
from rehyat_jax.models.wan.quantized import Numbers
from rehyat_jax.models.wan.streaming import check_streams
from rehyat_jax.models.wan_vae.config import WAN_VAE_PRESETS, WanVaeConfig
from rehyat_jax.parallel.mesh import AXES, resolve_sizes
from rehyat_jax.planning.compiled import HasOutcome, Outcome, Report, compiled_outcome, no_report
from rehyat_jax.planning.estimate import TpuCost
from rehyat_jax.planning.sampling import programs
from rehyat_jax.planning.train_step import bytes_on_device


@dataclasses.dataclass(frozen=True)
class Companions:
    """The models that sample together with a preset of the transformer."""

    text_encoder: UMT5Config
    vae: WanVaeConfig


_WAN = Companions(UMT5_PRESETS["umt5-xxl"], WAN_VAE_PRESETS["wan2.1"])

COMPANIONS = {
    "t2v-1.3B": _WAN,
    "t2v-14B": _WAN,
    # For tests: as the tiny transformer, of no published size.
    "tiny": Companions(
        UMT5Config(vocab_size=96, model_dim=64, num_heads=2, head_dim=32, ffn_dim=128, num_layers=2),
        WanVaeConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    ),
}
"""Presets of the transformer whose sampling can be planned."""


@dataclasses.dataclass(frozen=True)
class SamplingRequest:
    """The sampling to plan: one video of one prompt.

    Attributes:
      preset: key in `COMPANIONS`.
      wan: the transformer, with its hybrid blocks.
      video: its frames, height and width in pixels.
      topology: the chips.
      steps: steps of the solver.
      guided: evaluate the prompt and the negative prompt.
      stream: sample part by part.
      mesh: sizes of mesh axes for the transformer, -1 for all devices that others leave; empty to choose them.
      quantize: numbers of 8 bits in the transformer's products, see `models.wan.quantized`; None for bfloat16.
    """

    preset: str
    wan: WanConfig
    video: tuple[int, int, int]
    topology: str
    steps: int = 50
    guided: bool = True
    stream: bool = False
    mesh: tuple[tuple[str, int], ...] = ()
    quantize: Numbers | None = None

    @property
    def videos(self) -> int:
        """Videos that the model evaluates in a step."""
        return 2 if self.guided else 1

    @functools.cached_property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of the video's latents. Raises InputError for a size that the VAE cannot encode."""
        return WanVaeLatents().latent_shape(*self.video)[:3]

    @property
    def parts_of_video(self) -> int:
        """Parts of a streamed video."""
        frames = self.latents[0]
        return math.ceil(frames / programs.part_frames(self.wan, frames)) if self.stream else 1

    def programs(self) -> "dict[str, Program]":
        """The program of every part, in the order in which they run.

        Raises:
          InputError: the VAE cannot represent the video, the model cannot be streamed, or the topology is unknown.
        """
        if self.stream:
            check_streams(self.wan)
        devices, companions = len(devices_of(self.topology)), COMPANIONS[self.preset]
        # All heads of umT5 on one device take 11 GB; sharded by heads, no weight has to be gathered.
        tensor = math.gcd(devices, companions.text_encoder.num_heads)
        # The VAE's frames are sharded by rows, of which every device needs some.
        rows = max(n for n in range(1, devices + 1) if devices % n == 0 and n <= self.latents[1])
        mesh = dict.fromkeys(AXES, 1)
        make = functools.partial(Program.of, topology=self.topology)
        return {
            "text_encoder": make(
                "text_encoder",
                companions.text_encoder,
                mesh | {"tensor": tensor, "fsdp": devices // tensor},
                executions=self.videos,
                tokens=self.wan.text_length,
            ),
            "transformer": make(
                "transformer",
                self.wan,
                resolve_sizes(mesh | (dict(self.mesh) or chosen_mesh(self, devices)), devices),
                executions=self.steps * self.parts_of_video,
                # A streamed program does not depend on the video's length.
                latents=[self.part_frames, *self.latents[1:]],
                guided=self.guided,
                stream=self.stream,
                # Recorded plans have programs without this option.
                **({} if self.quantize is None else {"quantize": self.quantize}),
            ),
            "vae": make(
                "vae",
                companions.vae,
                mesh | {"context": rows},
                executions=self.latents[0],
                latents=[1, *self.latents[1:]],
            ),
        }

    @property
    def part_frames(self) -> int:
        """Latent frames that the transformer sees at once."""
        frames = self.latents[0]
        return programs.part_frames(self.wan, frames) if self.stream else frames


def chosen_mesh(request: SamplingRequest, devices: int) -> dict[str, int]:
    """The mesh for the transformer: first the two evaluations of guidance, then frames, then heads.

    Frames cost the least communication. They are sharded among as many devices as add the least padding; a streamed
    video is not sharded along time at all.
    """
    data = 2 if request.guided and devices % 2 == 0 else 1
    left = devices // data
    divisors = [n for n in range(1, left + 1) if left % n == 0]
    if request.stream:
        context = 1
    else:
        frames, chunk = request.latents[0] // request.wan.patch_size[0], request.wan.block_forms.chunk_frames
        on_device = lambda n: padded_frames(frames, chunk, n) // n
        # A device has whole chunks. More devices help as long as each has fewer of them.
        useful = [n for n in divisors if n == 1 or on_device(n) < on_device(max(d for d in divisors if d < n))]
        able = [n for n in useful if request.wan.num_heads % (left // n) == 0]
        context = max(able or useful)
    return {"data": data, "context": context, "tensor": left // context}


@dataclasses.dataclass(frozen=True)
class Program:
    """A part's program on a topology.

    Attributes:
      part: key in `programs.PARTS`.
      topology: the chips.
      case: arguments of `programs.lowered`, as JSON.
      executions: how often sampling runs it. Equal programs are planned once.
    """

    part: str
    topology: str
    case: str
    executions: int = dataclasses.field(compare=False)

    @classmethod
    def of(
        cls, part: str, model: Any, mesh: dict[str, int], *, topology: str, executions: int, **sizes: Any
    ) -> "Program":
        case = {"part": part, "model": model.to_dict(), "mesh": mesh, **sizes}
        return cls(part, topology, json.dumps(case), executions)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `programs.lowered`."""
        return json.loads(self.case)

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of all axes."""
        return self.arguments["mesh"]


@dataclasses.dataclass(frozen=True)
class PartPlan(HasOutcome):
    """Memory and cost of one part on one device.

    Attributes:
      arguments: bytes of its program's arguments, by kind.
      outcome: the compiled program. If the arguments alone do not fit, nothing is compiled.
    """

    program: Program
    arguments: dict[str, int]
    outcome: Outcome

    @property
    def seconds(self) -> tuple[float, float] | None:
        """(low, high) of all executions; None if the part does not fit."""
        if self.cost is None:
            return None
        low, high = self.cost.step_seconds
        return low * self.program.executions, high * self.program.executions

    def to_json(self) -> dict[str, Any]:
        """The part as --json writes it."""
        tpu = self.cost if isinstance(self.cost, TpuCost) else None
        return {
            "fits": self.fits,
            "hbm_bytes_peak": self.peak,
            "seconds": self.seconds and dict(zip(("low", "high"), self.seconds, strict=True)),
            "executions": self.program.executions,
            "mesh": self.program.mesh,
            "memory": self.memory or self.arguments,
            "static_cycles": tpu and tpu.cycles,
            "least_cycles": tpu and tpu.least_cycles,
            "collective_bytes": self.cost.collective_bytes if self.cost else None,
            "hbm_traffic_bytes": self.cost.hbm_traffic if self.cost else None,
            "compile_seconds": round(self.outcome.compile_seconds, 1),
        }


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The plan of sampling one video: a plan for every part, by name."""

    request: SamplingRequest
    parts: dict[str, PartPlan]

    @property
    def fits(self) -> bool:
        """True if every part fits by itself; they take turns in memory."""
        return all(part.fits for part in self.parts.values())

    @property
    def peak(self) -> int | None:
        """The largest peak of a part; None if it is not known."""
        peaks = [part.peak for part in self.parts.values() if part.peak is not None]
        return max(peaks) if len(peaks) == len(self.parts) else None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """(low, high) of a video; None if a part does not fit."""
        if not self.fits:
            return None
        low, high = (sum(ends) for ends in zip(*(part.seconds for part in self.parts.values()), strict=True))
        return low, high

    def to_json(self) -> dict[str, Any]:
        """The plan as --json writes it."""
        request, chip = self.request, chip_of(self.request.topology)
        low, high = self.seconds or (None, None)
        compiler = "jaxlib" if chip.is_gpu else "libtpu"
        return {
            "topology": request.topology,
            "devices": device_count(request.topology),
            "chips": device_count(request.topology) // chip.devices_per_chip,
            "preset": request.preset,
            "hybrid_blocks": len(request.wan.hybrid_block_indices),
            "stream": request.stream,
            **({} if request.quantize is None else {"quantize": request.quantize}),
            "frames": request.video[0],
            "height": request.video[1],
            "width": request.video[2],
            "steps": request.steps,
            "evaluations_per_step": request.videos,
            "fits": self.fits,
            "seconds_low": low,
            "seconds_high": high,
            "hbm_bytes_limit": chip.hbm_bytes,
            "hbm_bytes_peak": self.peak,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "versions": {name: importlib.metadata.version(name) for name in ("jax", compiler)},
        }


def check_request(request: SamplingRequest) -> None:
    """Finds out what is wrong before anything is compiled.

    Raises:
      InputError: the VAE or the transformer cannot represent the video, the model cannot be streamed, the compiler is
        missing, the topology is unknown, or the mesh cannot shard a part.
    """
    for program in request.programs().values():
        placement(program)


class Placement(NamedTuple):
    """A program before anything is compiled.

    Attributes:
      arguments: bytes on a device by kind.
      flops: FLOPs on a device, counted only for GPUs.
    """

    arguments: dict[str, int]
    flops: float


@functools.cache
def placement(program: Program) -> Placement:
    """The placement of a program. The VAE's takes seconds, because its caches are found by tracing it.

    Raises:
      InputError: the compiler is missing or does not know the topology, or the mesh cannot shard the model.
    """
    case, devices = program.arguments, devices_of(program.topology)
    with jax.set_mesh(programs.mesh_of(devices, case.pop("mesh"))):
        abstract = programs.abstract_program(**case)
        flops = _flops(case, abstract) if chip_of(program.topology).is_gpu else 0
        size = jax.sharding.get_mesh().size
    return Placement({kind: bytes_on_device(tree) for kind, tree in abstract.arguments.items()}, flops / size)


def _flops(case: dict[str, Any], abstract: programs.AbstractProgram) -> int:
    """FLOPs of a program on all devices."""
    if case["part"] != "transformer":
        return traced_flops(abstract.trace().jaxpr)
    # Kernels cannot be traced. A later part of a streamed video reads sums, which the first part has none of.
    wan, (frames, *size) = WanConfig.from_dict(case["model"]), case["latents"]

    def of_frames(frames: int) -> int:
        count = forward_flops(wan, (frames, *size))
        return count.outside + count.blocks

    videos = 2 if case["guided"] else 1
    return videos * (of_frames(2 * frames) - of_frames(frames) if case["stream"] else of_frames(frames))


def part_plan(program: Program, report: Report = no_report) -> PartPlan:
    """The plan of a program. `report`: see `compiled_outcome`.

    Raises:
      InputError: see `placement`; or a kernel needs more VMEM than the chip has.
    """
    placed, chip, case = placement(program), chip_of(program.topology), program.arguments
    if sum(placed.arguments.values()) > chip.hbm_bytes:
        return PartPlan(program, placed.arguments, Outcome({}, None, None, 0.0))
    outcome = compiled_outcome(
        programs.__name__,
        case,
        program.topology,
        arguments=placed.arguments,
        devices=math.prod(program.mesh.values()),
        wan=WanConfig.from_dict(case["model"]) if program.part == "transformer" else None,
        flops=placed.flops,
        vmem_remedy="choose another --topology or --size",
        report=report,
    )
    return PartPlan(program, placed.arguments, outcome)
