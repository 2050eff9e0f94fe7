"""Targets for the figures on an H100 or H200."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rehyat_jax.benchmarks.gpu import data_sheet_tflops
from rehyat_jax.benchmarks.gpu_run.results import COMPLETE, first_row, is_right, rows_of

Sections = dict[str, Any]


class Target(NamedTuple):
    """One target; `value` is None if it was not measured."""

    name: str
    bound: str
    value: float | None
    met: bool


def targets(sections: Sections) -> list[Target]:
    """The targets of the sections that were run."""
    return [*_correctness(sections), *_layers(sections), *_steps(sections), *_memory(sections), *_others(sections)]


def _correctness(sections: Sections) -> Iterator[Target]:
    checked = [section for name, section in sections.items() if name.startswith("correctness")]
    if rows := [row for section in checked for row in section["rows"]]:
        right = sum(row["right"] for row in rows)
        met = right == len(rows) and all(section["status"] == COMPLETE for section in checked)
        yield Target("share of the cases of attention that are right", "1, all sections", right / len(rows), met)


def _layers(sections: Sections) -> Iterator[Target]:
    ran = [section["rows"] for name, section in sections.items() if name.startswith("attention_1.3b")]
    # A run at tiny sizes has no targets. A target of a real run that was cut off is missed.
    if not any(row["frames"] in (21, 81) for rows in ran for row in rows):
        return
    for frames, direction, bound in ((21, "forward", 3.5), (21, "both", 3.3), (81, "forward", 12), (81, "both", 12)):
        speedups = [speedup for rows in ran if (speedup := _layer_speedup(rows, frames, direction))]
        what = {"forward": "forward", "both": "forward + backward"}[direction]
        name = f"full attention's time / hybrid layer's, {frames} latent frames, {what}"
        yield _at_least(name, bound, max(speedups, default=None))


def _layer_speedup(rows: list[dict[str, Any]], frames: int, direction: str) -> float | None:
    """Full attention's time divided by the fastest hybrid layer's time."""
    times = {row["attention"]: row[f"{direction}_ms"] for row in rows if row["frames"] == frames}
    full = next((time for name, time in times.items() if name.startswith("full") and "PyTorch" not in name), None)
    layers = [time for name, time in times.items() if name.startswith("layer") and time]
    return full / min(layers) if full and layers else None


def _steps(sections: Sections) -> Iterator[Target]:
    softmax, hybrid = (first_row(sections, name) for name in ("train_softmax", "train_all_hybrid"))
    if softmax and hybrid:
        speedup = softmax["milliseconds"] / hybrid["milliseconds"]
        yield _at_least("softmax step's time / all-hybrid step's, stage 2", 2, speedup)
    for name, what in (("train_softmax", "softmax"), ("train_all_hybrid", "all hybrid")):
        row = first_row(sections, name)
        peak = data_sheet_tflops(sections.get(name, {}).get("environment", ""))
        if row and peak:
            yield _at_least(f"MFU of stage 2, {what}", 0.4, row["model_tflop"] / row["milliseconds"] * 1e3 / peak)


def _memory(sections: Sections) -> Iterator[Target]:
    for plan in rows_of(sections, "plan"):
        measured = first_row(sections, plan["section"]).get("peak_bytes")
        if measured and plan["peak_bytes"]:
            off = abs(plan["peak_bytes"] / measured - 1)
            name = f"planned memory's distance from the measured peak, {plan['section']}"
            yield Target(name, "at most 0.1", off, off <= 0.1)


def _others(sections: Sections) -> Iterator[Target]:
    for name in ("student", "demo"):
        if sections.get(name, {}).get("rows"):
            right = is_right(sections[name])
            yield Target(f"section {name} is complete and right", "1", float(right), right)


def _at_least(name: str, bound: float, value: float | None) -> Target:
    return Target(name, f"at least {bound:g}", value, value is not None and value >= bound)
