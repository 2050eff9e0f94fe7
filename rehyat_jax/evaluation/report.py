"""`evaluation.md`: the figures of an evaluation as tables, with its plots."""

import math
from collections.abc import Sequence

from rehyat_jax.evaluation.bootstrap import Estimate
from rehyat_jax.evaluation.results import Curve, Evaluation

SINGLE = {
    "velocity_error": "velocity error, mean \\|student - teacher\\| / mean \\|teacher\\|",
    "excess_vs_teacher": "student's flow-matching loss above the teacher's",
    "attention_error": "attention error of hybrid blocks, on the student's own queries and keys",
    "attention_error_window_only": "the same without the linear branch",
    "attention_error_exact": "the same with perfect feature maps",
    "attention_moved": "share of attention on other frames than the teacher's",
    "sample_difference": "mean \\|student - teacher\\| of pixels, samples from the same noise",
    "frechet_teacher_student": "Frechet distance, teacher's samples to student's",
    "frechet_teacher_data": "Frechet distance, teacher's samples to data",
    "frechet_student_data": "Frechet distance, student's samples to data",
}
"""Metrics of the pair, in the order of the report."""

OF_SIDES = {
    "loss": "flow-matching loss",
    "digit_accuracy": "asked-for digit, majority of frames",
    "frame_accuracy": "asked-for digit, every frame",
    "motion_accuracy": "asked-for axis of motion",
    "motion_amplitude": "distance that the digit moves, pixels",
    "frame_change": "change from frame to frame",
    "chunk_jump": "change at the student's chunk boundaries / within chunks",
    "sharpness": "sharpness",
    "diversity": "distance between samples of one prompt",
}
"""Metrics that each model has, in the order of the report; verdicts of other judges come last."""

SIDES = ("teacher", "student", "data", "difference")


def markdown(found: Evaluation, pictures: Sequence[str]) -> str:
    """The text of the report.

    Args:
      found: the evaluation.
      pictures: names of the files next to it.
    """
    about, metrics = found.about, found.metrics
    teacher, student = (about["models"][name] for name in SIDES[:2])
    data = about["data"]
    lines = [
        "# A student against its teacher",
        "",
        "| | teacher | student |",
        "|---|---|---|",
        *(f"| {name} | {_words(teacher, name)} | {_words(student, name)} |" for name in _MODEL_ROWS),
        "",
        f"{data['examples']} {data['kind']} with latents {data['latents_shape']}. Every figure has its 95% confidence "
        "interval, by the bootstrap over examples, videos or prompts. `evaluation.json` has all figures and curves.",
        "",
        *figure_tables(metrics),
        "",
    ]
    if "sampling" in about:
        lines += [
            f"Samples: {about['options']['samples']} of each model from the same noise, {about['prompts']} prompts. "
            f"Frechet distances and the distance between samples are in standardised {about['feature_space']}. Bias "
            "from the number of videos is removed from the former, so one near 0 may be negative.",
            "",
        ]
    for name in pictures:
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    for name in ("attention_error_by_block", "attention_moved_by_block", *_DURATIONS):
        if name in found.curves:
            lines += _curve_table(found.curves[name], with_intervals=name not in _DURATIONS)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += ["## How it was made", "", f"    {about['command']}", ""] if "command" in about else []
    return "\n".join([*lines, f"Seed {about['options']['sampling']['seed']}; {versions}; {about['device']}.", ""])


def figure_tables(metrics: dict[str, Estimate]) -> list[str]:
    """The lines of two markdown tables: figures of the pair, and figures of each model."""
    return [
        "| figure | value |",
        "|---|---|",
        *(f"| {words} | {shown(metrics[name])} |" for name, words in SINGLE.items() if name in metrics),
        "",
        "| figure | teacher | student | data | student - teacher |",
        "|---|---|---|---|---|",
        *_side_rows(metrics),
    ]


_MODEL_ROWS = ("path", "forms", "fingerprint")
_DURATIONS = ("flops_by_duration", "static_cycles_by_duration", "memory_by_duration")


def _words(model: dict, row: str) -> str:
    if row == "forms":
        return ", ".join(f"{model['forms'].count(form)} x {form}" for form in dict.fromkeys(model["forms"]))
    return str(model[row])[-16:] if row == "fingerprint" else f"`{model[row]}`"


def _side_rows(metrics: dict[str, Estimate]) -> list[str]:
    bases = [name.removesuffix("_student") for name in metrics if name.endswith("_student") and name not in SINGLE]
    ordered = [name for name in OF_SIDES if name in bases] + [name for name in bases if name not in OF_SIDES]
    rows = []
    for base in ordered:
        cells = [metrics.get(f"{base}_{side}") for side in SIDES]
        if base == "loss":
            cells[-1] = metrics["excess_vs_teacher"]
        shown_cells = (shown(cell) if cell is not None else "" for cell in cells)
        rows.append(f"| {OF_SIDES.get(base, base.replace('_', ' '))} | {' | '.join(shown_cells)} |")
    return rows


def _curve_table(curve: Curve, *, with_intervals: bool) -> list[str]:
    names = list(curve.series)
    rows = []
    for number, x in enumerate(curve.x):
        cells = []
        for estimate in curve.series.values():
            of_x = Estimate(estimate.value[number], estimate.low[number], estimate.high[number])
            cells.append(shown(of_x) if with_intervals else _number(float(of_x.value)))
        rows.append(f"| {x} | {' | '.join(cells)} |")
    columns = [f"{curve.title}: {name}" for name in names]
    header = [f"| {curve.x_label} | {' | '.join(columns)} |", "|---" * (len(names) + 1) + "|"]
    return [*header, *rows, ""]


def shown(estimate: Estimate) -> str:
    """A scalar estimate as "0.109 (0.104 to 0.114)"."""
    value, low, high = (float(end) for end in (estimate.value, estimate.low, estimate.high))
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    if abs(value) >= 1e4:
        return f"{value:.3e}"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:#.3g}"
