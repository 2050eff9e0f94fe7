"""A plan of sampling as text for people, and as a row of docs/planned_sampling.md."""

import shlex
from pathlib import Path
from typing import Any

from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.planning.report import EARLIER, forms_of, gib
from rehyat_jax.planning.sampling.plan import PartPlan, SamplingPlan
from rehyat_jax.planning.table import PlanTable, memory_cell


def report(plan: SamplingPlan) -> str:
    """The plan as lines of text; sizes are of one device, seconds of one video."""
    request, chip = plan.request, chip_of(plan.request.topology)
    frames, height, width = request.video
    way = (
        f"in {request.parts_of_video} parts of {request.part_frames} latent frames" if request.stream else "in one pass"
    )
    guidance = "with guidance" if request.guided else "without guidance"
    latents = "x".join(map(str, request.latents))
    rows = [
        ("video", f"{frames} frames of {height}x{width}, latents of {latents}"),
        (
            "model",
            f"{request.preset}: {request.wan.num_layers} blocks of width {request.wan.width}, {forms_of(request.wan)}",
        ),
        ("sampling", f"{request.steps} steps {guidance}, {way}, products of {request.quantize or 'bfloat16'}"),
        ("topology", f"{request.topology}, {gib(chip.hbm_bytes)} a device"),
        *((name, _part(part)) for name, part in plan.parts.items()),
        ("fits", "yes" if plan.fits else "NO"),
    ]
    if plan.seconds is not None:
        rows.append(("a video, seconds", _span(*plan.seconds)))
    indent = max(len(name) for name, _ in rows)
    lines = [f"{name:<{indent}}  {value}" for name, value in rows]
    if all(part.outcome.is_earlier for part in plan.parts.values()):
        lines += ["", EARLIER]
    if costs := [part.cost for part in plan.parts.values() if part.cost is not None]:
        lines += ["", f"Nothing was run. The parts take turns in memory. Seconds, {costs[0].assumptions}."]
    return "\n".join(lines)


def _part(part: PartPlan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in part.program.mesh.items() if size > 1) or "one device"
    peak = gib(part.peak) if part.peak else "unknown"
    weights = f"{gib(part.arguments['weights'])} of weights"
    if part.seconds is None:
        return f"{peak}, {weights}: does not fit ({mesh})"
    return f"{peak}, {weights}; {part.program.executions} times, {_span(*part.seconds)} seconds ({mesh})"


def _span(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def planned_samplings() -> list[str]:
    """The command lines of docs/planned_sampling.md, the most useful ones first."""
    runs = []
    for preset, half, size in (
        ("t2v-1.3B", 15, "480p"),
        ("t2v-14B", 20, "720p"),
        ("t2v-1.3B", 15, "720p"),
        ("t2v-14B", 20, "480p"),
    ):
        for topology in ("v5e:1x1", "v5e:2x4", "v6e:2x4", "v5p:2x2x1", "tpu7x:2x2x1", "h100:1"):
            streams = [" --stream"] if topology.endswith((":1x1", ":1")) else []
            for blocks in ("none", str(half), "all", *(f"all{stream}" for stream in streams)):
                runs.append(f"--preset {preset} --size {size} --topology {topology} --hybrid-blocks {blocks}")
    return runs


_HEADER = """# Planned sampling

None of these videos has been sampled. Each row comes from `python -m rehyat_jax.plan --sample` with the options in the
row: 81 frames, 50 UniPC steps with guidance. [plan.md](plan.md#sampling) says how figures are formed, and compares them
with published ones. Memory is that of one device. The parts take turns in it. Seconds are those of one video, without
reading the weights and compilation. On GPUs the range of seconds is arithmetic only.

| topology | also called |
|---|---|
| `v5e:1x1` | v5e-1, the TPU that Colab lends |
| `v5e:2x4` | v5e-8 |
| `v6e:2x4` | v6e-8 |
| `v5p:2x2x1` | v5p-8: 4 chips of two cores, each chip one device |
| `tpu7x:2x2x1` | tpu7x-8: 4 chips of two devices |

This command writes the page. It plans only the rows that [the record](measurements/planned_sampling.json) does not
have. With texts, it plans again the rows whose command lines contain one of them, and no others:

    python -m rehyat_jax.plan --sample --table
    python -m rehyat_jax.plan --sample --table v5p:2x2x1 "v6e:2x4 --hybrid-blocks none"
"""

_PARTS = ("text_encoder", "transformer", "vae")


def _split(run: str) -> tuple[str, str]:
    _, preset, _, size, *options = shlex.split(run)
    return f"`--preset {preset} --size {size}`", " ".join(options)


def _cells(plan: dict[str, Any]) -> tuple[str, ...]:
    def cell(name: str) -> str:
        part = plan["parts"][name]
        memory = memory_cell(part["hbm_bytes_peak"], plan["hbm_bytes_limit"])
        return f"{memory}; {_seconds(part['seconds'])} s" if part["fits"] else f"{memory}: does not fit"

    total = {"low": plan["seconds_low"], "high": plan["seconds_high"]}
    return (*map(cell, _PARTS), _seconds(total) if plan["fits"] else "does not fit")


def _seconds(span: dict[str, float]) -> str:
    return f"{_rounded(span['low'])} to {_rounded(span['high'])}"


def _rounded(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


SAMPLING = PlanTable(
    records=Path("docs/measurements/planned_sampling.json"),
    page=Path("docs/planned_sampling.md"),
    header=_HEADER,
    columns=("options", "text encoder", "transformer", "VAE", "seconds a video"),
    split=_split,
    cells=_cells,
)
"""The runs of `planned_samplings`."""
