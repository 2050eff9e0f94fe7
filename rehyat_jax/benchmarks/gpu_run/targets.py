"""What the figures on an H100 or H200 should be."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rehyat_jax.benchmarks.gpu_run.results import is_right

DATA_SHEET_TFLOPS = 989
"""Dense bfloat16 of an H100 or H200 (SXM), by NVIDIA's data sheet."""


class Target(NamedTuple):
    """One target; `value` is None where it was not measured."""

    name: str
    bound: float
    value: float | None
    met: bool


def targets(sections: dict[str, Any]) -> list[Target]:
    """The targets whose sections were run."""
    return [target for target in _all(sections) if target.value is not None]


def _all(sections: dict[str, Any]) -> Iterator[Target]:
    if checks := [row for name in sections if name.startswith("correctness") for row in sections[name]["rows"]]:
        right = sum(row["right"] for row in checks)
        yield Target("cases of attention that are right, share", 1, right / len(checks), right == len(checks))
    rows = [row for name in sections if name.startswith("attention_1.3b") for row in sections[name]["rows"]]
    for frames, direction, bound in ((21, "forward", 3.5), (21, "both", 3.3), (81, "forward", 12), (81, "both", 12)):
        name = f"full attention's time / whole hybrid layer's, {frames} frames, {_DIRECTIONS[direction]}"
        yield at_least(name, bound, _layer_speedup(rows, frames, direction))
    step = lambda name: next(iter(sections.get(name, {}).get("rows", [])), {})
    softmax, hybrid = step("train_softmax"), step("train_all_hybrid")
    took = lambda row: row.get("milliseconds")
    speedup = took(softmax) / took(hybrid) if took(softmax) and took(hybrid) else None
    yield at_least("softmax step's time / all-hybrid step's, stage 2", 2, speedup)
    measured = step("machine").get("peak_tflops")
    whose = "the measured peak" if measured else f"the data sheet's {DATA_SHEET_TFLOPS} TFLOP/s"
    for name, row in (("softmax", softmax), ("all hybrid", hybrid)):
        use = row["model_tflop"] / took(row) * 1e3 / (measured or DATA_SHEET_TFLOPS) if row else None
        yield at_least(f"model FLOPs use of {whose}, {name}", 0.4, use)
    for plan in sections.get("plan", {}).get("rows", []):
        measured = step(plan["section"]).get("peak_bytes")
        if measured and plan["peak_bytes"]:
            off = abs(plan["peak_bytes"] / measured - 1)
            yield Target(f"planned memory's distance from the measured peak, {plan['section']}", 0.1, off, off <= 0.1)
    for name in ("student", "demo"):
        if sections.get(name, {}).get("rows"):
            right = is_right(sections[name])
            yield Target(f"section {name} is complete and right", 1, float(right), right)


_DIRECTIONS = {"forward": "forward", "both": "forward + backward"}


def at_least(name: str, bound: float, value: float | None) -> Target:
    return Target(name, bound, value, value is not None and value >= bound)


def _layer_speedup(rows: list[dict[str, Any]], frames: int, direction: str) -> float | None:
    """Of the fastest whole layer over this project's full attention."""
    times = {row["attention"]: row[f"{direction}_ms"] for row in rows if row["frames"] == frames}
    full = next((time for name, time in times.items() if name.startswith("full") and "PyTorch" not in name), None)
    layers = [time for name, time in times.items() if name.startswith("layer") and time]
    return full / min(layers) if full and layers else None
