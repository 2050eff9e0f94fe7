"""Formats the results as one Markdown page."""

from collections.abc import Iterable, Sequence
from typing import Any

from rehyat_jax.benchmarks.gpu import data_sheet_tflops
from rehyat_jax.benchmarks.gpu_run.results import COMPLETE, RUNNING, first_row, rows_of
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS
from rehyat_jax.benchmarks.gpu_run.targets import Sections, targets


def render(sections: Sections, on_cpu: Sections) -> str:
    """The page.

    Args:
      sections: the sections of `results.Results`.
      on_cpu: the sections of a run on a CPU, for the demo's metrics; may be empty.
    """
    order = [*(name for name in SECTIONS if name in sections), *sorted(sections.keys() - SECTIONS.keys())]
    sections = {name: sections[name] for name in order}
    parts = [
        _opening(sections),
        _targets(sections),
        _correctness(sections),
        _attention(sections),
        _train_steps(sections),
        _sampling(sections),
        _student(sections),
        _demo(sections, on_cpu),
        _kernels(sections),
        _sections(sections),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else ""


def _gib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.1f}"


def _yes(right: bool) -> str:
    return "yes" if right else "**no**"


def _opening(sections: Sections) -> str:
    machine = first_row(sections, "machine")
    about = next((section for name, section in sections.items() if name in SECTIONS and not SECTIONS[name].beside), {})
    lines = ["# Measured on a GPU\n"]
    lines.append(f"Date: {about.get('date', 'unknown')}. Machine: {about.get('environment', 'unknown')}.")
    if machine:
        libraries = [f"{name} {version}" for name, version in machine["libraries"].items()]
        lines.append(f"{', '.join([machine['accelerator'], *libraries])}.")
        lines.append(
            f"A bfloat16 product of {machine['product_side']}^3 runs at **{machine['peak_tflops']:.0f} TFLOP/s**, a "
            f"copy at **{machine['copy_tb_s']:.2f} TB/s** (read and written). Shares in brackets are of that product."
        )
    return "\n".join(lines) + f"\n\n{_HOW_TO}"


_HOW_TO = """\
This command makes the page on a machine with an NVIDIA GPU. It stops after 8 minutes (`--budget`):

    python -m rehyat_jax.benchmarks.gpu_run --json docs/measurements/NAME.json --out docs/gpu.md

- `--only NAME ...` measures some sections again and keeps the file's others.
- `--cpu-results FILE` compares the demo with a run of `--only demo --device cpu`.
- `--device cpu --tiny` tries the command without a GPU.
- [launch/README.md](../launch/README.md) says how to get the packages onto a machine without network."""


def _targets(sections: Sections) -> str:
    found = targets(sections)
    if not found:
        return ""
    rows = [(name, bound, _number(value) or "failed", _yes(met)) for name, bound, value, met in found]
    return "## Targets\n\n" + _table(("target", "bound", "measured", "met"), rows)


def _correctness(sections: Sections) -> str:
    rows = [row for name in sections if name.startswith("correctness") for row in rows_of(sections, name)]
    if not rows:
        return ""
    cells = []
    for row in rows:
        linear = {True: "past", False: "past and future"}.get(row.get("causal"), "past, in two parts")
        errors = row["errors"] or {}
        worst = max(errors, key=errors.get) if errors else ""
        cells.append(
            (
                row["implementation"],
                row["stabilizer"],
                linear,
                _number(errors.get("output"), ".4f") or "failed",
                f"{errors[worst]:.4f} ({worst})" if errors else "",
                _yes(row["right"]),
            )
        )
    head = ("implementation", "stabilizer", "linear keys", "output", "largest of all", "right")
    return (
        "## Is it right?\n\nEach figure is the largest error divided by the largest reference value. Inputs are "
        "bfloat16; the reference is float64. A case is right if its output, all gradients and, for a video in two "
        "parts, its state are below 2^-6.\n\n" + _table(head, cells)
    )


def _attention(sections: Sections) -> str:
    names = [name for name in sections if name.startswith("attention") and rows_of(sections, name)]
    if not names:
        return ""
    peak = first_row(sections, "machine").get("peak_tflops")
    cells = []
    for name in names:
        rows = rows_of(sections, name)
        for row in rows:
            same = [other for other in rows if other["frames"] == row["frames"]]
            cell = [row["heads"], row["frames"], row["attention"]]
            for direction in ("forward", "both"):
                took = row[f"{direction}_ms"]
                rate = row[f"{direction}_tflop"] / took * 1e3 if took else None
                full = next((other[f"{direction}_ms"] for other in same if other["attention"].startswith("full")), None)
                torch = next((x[f"{direction}_ms"] for x in same if x["attention"] == "full, PyTorch"), None)
                share = f" ({rate / peak:.0%})" if rate and peak else ""
                if not row["attention"].startswith(("full", "layer", "hybrid")):
                    full = torch = None  # a part of a layer
                cell += [
                    _number(took) or "failed",
                    _ratio(full, took),
                    _ratio(torch, took),
                    _number(rate, ".0f") + share,
                ]
            cells.append(cell)
    directions = [
        f"{direction}{of}"
        for direction in ("forward", "forward + backward")
        for of in (", ms", ": full / this", ": PyTorch full / this", ", TFLOP/s")
    ]
    tokens = rows_of(sections, names[0])[0]["tokens_per_frame"]
    return (
        f"## One attention layer\n\nBfloat16, {tokens} tokens a frame, chunks of 3 latent frames, 1 of "
        'overlap, 256 features. A "layer" computes its feature maps, and their gradients; "hybrid" is given the '
        "features.\n\n" + _table(("heads", "latent frames", "attention", *directions), cells)
    )


def _train_steps(sections: Sections) -> str:
    steps = {name: first_row(sections, name) for name in sections if name.startswith("train_")}
    steps = {name: row for name, row in steps.items() if row}
    if not steps:
        return ""
    product = first_row(sections, "machine").get("peak_tflops")
    plans = {row["section"]: row for row in rows_of(sections, "plan")}
    softmax = steps.get("train_softmax", {}).get("milliseconds")
    cells = []
    for name, row in steps.items():
        plan, took = plans.get(name, {}), row["milliseconds"]
        rate = row["model_tflop"] / took * 1e3
        done = (row["model_tflop"] + row["recomputed_tflop"]) / took * 1e3
        peak = data_sheet_tflops(sections[name].get("environment", ""))
        low, high = plan.get("seconds_low"), plan.get("seconds_high")
        cells.append(
            (
                step_name(row),
                f"{took:.0f}",
                "" if row["stage"] == "distill" else _ratio(softmax, took),
                f"{rate:.0f}",
                f"{rate / peak:.0%}" if peak else "",
                f"{done / product:.0%}" if product else "",
                _gib(row["peak_bytes"]),
                _gib(plan.get("peak_bytes")),
                f"{1e3 * low:.0f} to {1e3 * high:.0f}" if low else "",
                f"{row['compile_seconds']:.0f}",
            )
        )
    head = (
        "step",
        "ms",
        "softmax / this",
        "model TFLOP/s",
        "MFU",
        "all FLOPs / measured product",
        "peak GiB",
        "planned GiB",
        "planned ms",
        "compiled in s",
    )
    row = next(iter(steps.values()))
    return (
        f"## One train step of {row['model']}\n\nOne video with latents of {'x'.join(map(str, row['latents']))}, "
        "random weights. Parameters are float32, the optimizer is AdamW, and stage 2 keeps an average of the "
        "parameters. MFU is model FLOPs over the data sheet's peak. All FLOPs include recomputation. Planned: "
        "`rehyat_jax.plan` for the same step on one such GPU.\n\n" + _table(head, cells)
    )


def step_name(row: dict[str, Any]) -> str:
    """The name of a train step in tables."""
    if row["stage"] == "distill":
        return "stage 1"
    by = f", {row['implementation']}" if row["implementation"] else ""
    return f"stage 2, {row['hybrid_blocks']} of {row['blocks']} blocks hybrid, remat {row['remat']}{by}"


def _sampling(sections: Sections) -> str:
    rows = rows_of(sections, "sampling")
    if not rows:
        return ""
    peak = first_row(sections, "machine").get("peak_tflops")
    cells = []
    for row in rows:
        by = {other["model"]: other["milliseconds"] for other in rows if other["frames"] == row["frames"]}
        rate, took = row["tflop"] / row["milliseconds"] * 1e3, row["milliseconds"]
        cells.append(
            (
                row["frames"],
                row["model"],
                f"{took:.0f}",
                _ratio(by.get("softmax"), took),
                _ratio(by.get("diffusers"), took),
                f"{rate:.0f}" + (f" ({rate / peak:.0%})" if peak else ""),
                _gib(row.get("temporary_bytes")),
            )
        )
    head = ("latent frames", "model", "ms", "softmax / this", "diffusers / this", "TFLOP/s", "temporary GiB")
    text = (
        "## One sampling step\n\nOne evaluation with guidance (batch 2) in bfloat16, with random weights. PyTorch runs "
        "without `torch.compile`."
    )
    if difference := next((row[key] for row in rows if (key := "rms_difference_from_ours") in row), None):
        text += (
            f" diffusers' `WanTransformer3DModel` has the same weights; its velocity differs from ours by "
            f"{difference:.2%} (RMS, both in bfloat16)."
        )
    return f"{text}\n\n{_table(head, cells)}"


def _student(sections: Sections) -> str:
    rows = rows_of(sections, "student")
    if not rows:
        return ""
    cells = [
        (row["dtype"], ", ".join(f"{k} {row[k]:.1e}" for k in row if k not in ("dtype", "right")), _yes(row["right"]))
        for row in rows
    ]
    return (
        "## A student in PyTorch on this device\n\n`rehyat_torch.py` against the JAX model: the largest difference of "
        "velocities in float32, and each one's RMS error in bfloat16.\n\n" + _table(("dtype", "found", "right"), cells)
    )


def _demo(sections: Sections, on_cpu: Sections) -> str:
    rows = rows_of(sections, "demo")
    if not rows:
        return ""
    of = lambda rows, key: next((row[key] for row in rows if key in row), {})
    seconds = lambda rows: {row["part"]: row for row in rows if "part" in row}
    here, there = seconds(rows), seconds(rows_of(on_cpu, "demo"))
    parts = [
        (name, row.get("steps", ""), f"{row['seconds']:.0f}", _number(there.get(name, {}).get("seconds"), ".0f"))
        for name, row in here.items()
    ]
    found, expected = of(rows, "metrics"), of(rows_of(on_cpu, "demo"), "metrics")
    metrics = [(f"`{name}`", f"{value:.4g}", _number(expected.get(name), ".4g")) for name, value in found.items()]
    claims = [
        (row["claim"], f"{row['figure']:.3g}", row["bound"], _yes(row["right"])) for row in rows if "claim" in row
    ]
    text = ["## The demo", "", _table(("part", "steps", "seconds", "seconds on a CPU"), parts)]
    if metrics:
        text += ["", _table(("metric", "here", "on a CPU"), metrics)]
    if claims:
        text += ["", _table(("claim", "figure", "bound", "holds"), claims)]
    return "\n".join(text)


def _kernels(sections: Sections) -> str:
    text = []
    for name in sections:
        kernels = [row for row in rows_of(sections, name) if "kernel" in row]
        if not kernels:
            continue
        total = sum(row["milliseconds"] for row in kernels)
        cells = [
            (
                f"{row['milliseconds']:.1f}",
                f"{row['milliseconds'] / total:.0%}",
                row["calls"],
                f"`{row['kernel'][:60]}`",
                row["source"][-90:].replace("|", ","),
            )
            for row in kernels
        ]
        table = _table(("ms", "share", "calls", "kernel", "operation"), cells)
        title = f"{step_name(first_row(sections, name))}: {total:.0f} ms in kernels"
        text.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return (
        "\n\n".join(
            ["## Where the time of a train step goes\n\nFrom JAX's profiler, one step each, copies included.", *text]
        )
        if text
        else ""
    )


def _sections(sections: Sections) -> str:
    cells = []
    for name, section in sections.items():
        status = "cut off with the run" if section["status"] == RUNNING else section["status"]
        last = (section.get("error") or "").strip().splitlines()[-1:] if section["status"] != COMPLETE else []
        note = section.get("note") or "".join(last)[:200].replace("|", ",")
        cells.append((name, status, section.get("seconds", ""), section.get("date", ""), note))
    return "## Sections\n\n" + _table(("section", "status", "seconds", "date", "note, or last words"), cells)
