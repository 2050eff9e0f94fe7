"""The sections of a run, in order of value, and the sizes of their measurements."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
"""One result of a section, JSON-ready."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements; `REAL` is Wan2.1, `TINY` tries the program on a CPU.

    Attributes:
      device: JAX's platform, "gpu" or "cpu".
      preset: a key of `WAN_PRESETS`.
      latents: frames, height and width of a video's latents.
      long_frames: latent frames of the long video of section "sampling".
      frames: latent frames of the attention's videos, in order of value.
      tokens_per_frame: tokens per latent frame of the attention's videos.
      small_heads, large_heads: numbers of heads of 1.3B's and 14B's attention.
      implementations: implementations of hybrid attention to time.
      checked: implementations of hybrid attention to compare with the reference.
      kernels: this project's own GPU kernels, timed and compared in separate sections, because a kernel may hang.
      repeats: number of timed calls of each function; the median counts.
      topology: topology of the plans, with one video on each of its devices; None for one GPU of the type in use.
      planned: the sections that are planned; None for all train steps.
      demo_steps: number of steps of each of the demo's runs; None for the numbers in its configurations.
      demo_samples: whether the demo's report samples videos.
    """

    device: str
    preset: str
    latents: tuple[int, int, int]
    long_frames: int
    frames: tuple[int, ...]
    tokens_per_frame: int
    small_heads: int
    large_heads: int
    implementations: tuple[str, ...]
    checked: tuple[str, ...]
    kernels: tuple[str, ...]
    repeats: int
    topology: str | None = None
    planned: tuple[str, ...] | None = None
    demo_steps: int | None = None
    demo_samples: bool = True


REAL = Sizes(
    device="gpu",
    preset="t2v-1.3B",
    latents=(21, 60, 104),
    long_frames=81,
    frames=(21, 81, 42),
    tokens_per_frame=1560,
    small_heads=12,
    large_heads=40,
    implementations=("cudnn",),
    checked=("cudnn", "xla", "scan"),
    kernels=("pallas_gpu",),
    repeats=5,
)

_ON_CPU = dict(device="cpu", implementations=("scan",), checked=("scan",), kernels=("xla",))

TINY = Sizes(
    preset="tiny",
    latents=(4, 4, 4),
    long_frames=7,
    frames=(4,),
    tokens_per_frame=2,
    small_heads=1,
    large_heads=2,
    **_ON_CPU,
    repeats=1,
    topology="v5e:2x2",
    planned=("train_distill",),
    demo_steps=2,
    demo_samples=False,
)


def sizes_for(device: str, *, tiny: bool) -> Sizes:
    """The sizes for a device, "gpu" or "cpu"."""
    sizes = TINY if tiny else REAL
    return dataclasses.replace(sizes, **_ON_CPU) if device == "cpu" else sizes


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the run, in a separate process.

    Attributes:
      module: module of this package whose `rows(sizes, **arguments)` yields the results, most important first.
      seconds: time limit; a section that exceeds it is killed, and the rows that it has yielded are kept.
      arguments: arguments of `rows`.
      memory_fraction: the share of the GPU's memory that JAX takes; PyTorch needs the rest.
      beside: whether it needs no GPU, so that it runs next to the others from the start.
      requires: this section is skipped if that section has run and is not right.
    """

    module: str
    seconds: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory_fraction: float = 0.9
    beside: bool = False
    requires: str | None = None

    def rows(self, sizes: Sizes) -> Iterator[Row]:
        """Measures, and yields the results."""
        run: Callable[..., Iterator[Row]] = importlib.import_module(f"{__package__}.{self.module}").rows
        return run(sizes, **self.arguments)


_KERNELS_CHECK = "correctness_kernels"


def _train(stage: str, hybrid: float, seconds: float = 80, remat: str = "block", implementation: str = "") -> Section:
    arguments = {"stage": stage, "hybrid": hybrid, "remat": remat, "implementation": implementation}
    return Section("train_step", seconds, arguments, requires=_KERNELS_CHECK if implementation else None)


def _attention(heads: str, implementations: str, seconds: float) -> Section:
    arguments = {"heads": heads, "implementations": implementations}
    requires = _KERNELS_CHECK if implementations == "kernels" else None
    return Section("attention", seconds, arguments, memory_fraction=0.75, requires=requires)


SECTIONS: dict[str, Section] = {
    "machine": Section("machine", 60),
    "plan": Section("plan", 400, beside=True),
    "correctness": Section("correctness", 120, {"implementations": "checked"}),
    _KERNELS_CHECK: Section("correctness", 60, {"implementations": "kernels"}),
    "attention_1.3b": _attention("small_heads", "implementations", 100),
    "attention_1.3b_kernels": _attention("small_heads", "kernels", 80),
    "train_all_hybrid": _train("finetune", 1.0),
    "train_softmax": _train("finetune", 0.0),
    "train_distill": _train("distill", 1.0),
    "train_15_of_30": _train("finetune", 15 / 30),
    "train_20_of_30": _train("finetune", 20 / 30),
    "sampling": Section("sampling", 150, memory_fraction=0.6),
    "student": Section("student", 60, memory_fraction=0.5),
    "demo": Section("demo", 150, memory_fraction=0.5),
    "attention_14b": _attention("large_heads", "implementations", 90),
    "train_all_hybrid_kept": _train("finetune", 1.0, remat="attention"),
    "train_all_hybrid_kernels": _train("finetune", 1.0, implementation="kernels"),
}
