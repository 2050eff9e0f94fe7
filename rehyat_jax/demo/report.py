"""The demo's last step: python -m rehyat_jax.demo.report --runs runs/demo.

Compares the softmax teacher with the hybrid student that the recipe made from it, streams videos from the student that
are six times as long as those of training, and writes `report.md`, `metrics.json`, pictures, `teacher.mp4`,
`student.mp4` and `long.mp4` into the folder of runs.
"""

import json
import sys
from pathlib import Path

from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.demo import measure
from rehyat_jax.demo.digits import NUM_FRAMES
from rehyat_jax.demo.judge import Judge
from rehyat_jax.demo.long_video import SEGMENTS, Segment, by_position, sample_long
from rehyat_jax.demo.plots import SHOWN_CAPTIONS, save_block_errors, save_losses, save_samples, save_sheet
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.files.write import written_whole
from rehyat_jax.generation.streaming import PART_CHUNKS
from rehyat_jax.training.config import load_config
from rehyat_jax.weights import load_wan

NUM_VIDEOS = 160


def report(runs: Path) -> dict[str, float]:
    """Measures, writes the report and returns the metrics.

    Args:
      runs: folder with `teacher` (a model checkpoint), `distill`, `distill_bidirectional` and `finetune` (workdirs of
        training runs) and `student_pytorch` (the finetuned student's export).
    """
    metrics, pictures = {}, runs / "pictures"
    config = load_config(runs / "distill")
    teacher = load_wan(runs / "teacher")
    student = load_wan(runs / "finetune" / "model")

    # ----------------------------------------------------------------------------------------------------- attention
    print("measuring attention errors", flush=True)
    panels = {}
    for suffix, name in (("", "distill"), ("_bidirectional", "distill_bidirectional")):
        run_config = load_config(runs / name)
        before = measure.block_errors(measure.undistilled(run_config), run_config)
        after = measure.block_errors(load_wan(runs / name / "model"), run_config)
        panels["bidirectional" if suffix else "causal"] = {
            "window only": after["window_only"],
            "before distillation": before["hybrid"],
            "after distillation": after["hybrid"],
            **({} if suffix else {"exact causal softmax": after["exact"]}),
        }
        metrics[f"attention_error_initial{suffix}"] = before["hybrid"].mean()
        metrics[f"attention_error_distilled{suffix}"] = after["hybrid"].mean()
        if not suffix:
            metrics["attention_error_window_only"] = after["window_only"].mean()
            metrics["attention_error_exact_causal"] = after["exact"].mean()
    save_block_errors(pictures / "attention_error.png", panels)

    # ------------------------------------------------------------------------------------------------------ velocity
    metrics["velocity_error_distilled"] = measure.velocity_error(load_wan(runs / "distill" / "model"), teacher, config)
    metrics["velocity_error_finetuned"] = measure.velocity_error(student, teacher, config)

    # ------------------------------------------------------------------------------------------------------- samples
    judge, videos = Judge.fit(), {}
    for name, model in (("teacher", teacher), ("student", student)):
        videos[name], captions = measure.sample_captions(model, NUM_VIDEOS, f"sampling the {name}")
        score = judge.score(videos[name], captions)
        metrics |= {f"{field}_{name}": value for field, value in score._asdict().items()}
        save_sheet(runs / f"{name}.mp4", videos[name])
    save_samples(pictures / "samples.png", videos, captions)
    save_losses(
        pictures / "losses.png",
        {
            "distillation, causal": runs / "distill",
            "distillation, bidirectional": runs / "distill_bidirectional",
            "finetuning": runs / "finetune",
        },
    )

    # --------------------------------------------------------------------------------------------------- long videos
    print(f"streaming videos of {SEGMENTS * NUM_FRAMES} frames", flush=True)
    videos["long"], captions = sample_long(student)
    chunk_frames = student.config.block_forms.chunk_frames
    for index, segment in enumerate(by_position(judge, videos["long"], captions, chunk_frames)):
        metrics |= {f"long_{field}_{index}": value for field, value in segment._asdict().items()}
    save_sheet(runs / "long.mp4", videos["long"])
    rows = {captions[i]: videos["long"][i] for i in SHOWN_CAPTIONS}
    save_frames(pictures / "long_video.png", rows, frames=range(4, SEGMENTS * NUM_FRAMES, 10))

    # -------------------------------------------------------------------------------------------------------- export
    metrics["export_max_abs_diff"] = measure.export_difference(student, runs / "student_pytorch")

    metrics = {name: float(value) for name, value in metrics.items()}
    with written_whole(runs / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    with written_whole(runs / "report.md") as temporary:
        temporary.write_text(markdown(metrics))
    return metrics


def expectations(metrics: dict[str, float]) -> list[tuple[str, float, str, bool]]:
    """The expected results of the demo: (claim, figure, bound, whether it holds)."""
    m = metrics
    points = lambda name: 100 * (m[f"{name}_teacher"] - m[f"{name}_student"])
    rows: list[tuple[str, float, str, bool]] = []

    def at_most(claim: str, figure: float, bound: float) -> None:
        rows.append((claim, figure, f"at most {bound:g}", figure <= bound))

    def at_least(claim: str, figure: float, bound: float) -> None:
        rows.append((claim, figure, f"at least {bound:g}", figure >= bound))

    at_most(
        "distilled error / exact causal softmax's",
        m["attention_error_distilled"] / m["attention_error_exact_causal"],
        1.05,
    )
    at_least(
        "bidirectional error, before / after distillation",
        m["attention_error_initial_bidirectional"] / m["attention_error_distilled_bidirectional"],
        4,
    )
    at_least("teacher's digit accuracy, %", 100 * m["digit_accuracy_teacher"], 95)
    at_least("teacher's motion accuracy, %", 100 * m["motion_accuracy_teacher"], 95)
    at_most("digit accuracy lost by the student, points", points("digit_accuracy"), 5)
    at_most("motion accuracy lost by the student, points", points("motion_accuracy"), 5)
    at_most("frame accuracy lost by the student, points", points("frame_accuracy"), 8)
    at_most("largest difference of the export in PyTorch", m["export_max_abs_diff"], 5e-5)
    return rows


def markdown(metrics: dict[str, float]) -> str:
    """The report's text."""
    verdicts = [
        f"| {claim} | {figure:.3g} | {bound} | {'yes' if holds else '**no**'} |"
        for claim, figure, bound, holds in expectations(metrics)
    ]
    accuracy = [
        f"| {label} | {metrics[f'{name}_teacher']:.3f} | {metrics[f'{name}_student']:.3f} |"
        for label, name in (
            ("digit, majority of frames", "digit_accuracy"),
            ("digit, every frame", "frame_accuracy"),
            ("axis of motion", "motion_accuracy"),
        )
    ]
    return "\n".join(
        [
            "# A softmax video transformer made recurrent",
            "",
            "The teacher is a Wan transformer with full softmax attention. The student is the same transformer with "
            "causal hybrid attention in **all** blocks (chunks of three latent frames, one frame of overlap), "
            "distilled block by block and then finetuned.",
            "",
            "![samples](pictures/samples.png)",
            "",
            "All captions: [teacher.mp4](teacher.mp4), [student.mp4](student.mp4), from the same noise.",
            "",
            "## Does it hold?",
            "",
            "| claim | measured | expected | holds |",
            "|---|---|---|---|",
            *verdicts,
            "",
            f"## Samples ({NUM_VIDEOS} videos, two noise seeds, read by a classifier trained on other scans)",
            "",
            "| accuracy | teacher | student |",
            "|---|---|---|",
            *accuracy,
            "",
            f"## Videos of {SEGMENTS * NUM_FRAMES} frames",
            "",
            f"The student was trained on {NUM_FRAMES} frames. Streaming holds {PART_CHUNKS} chunks of a video on the "
            "device. In the training videos, the digit crosses the picture once. Nothing there "
            "shows what comes next: the student's digits stop there.",
            "",
            "![long videos](pictures/long_video.png)",
            "",
            "All captions: [long.mp4](long.mp4).",
            "",
            "| frames | digit, every frame | axis of motion | jump from chunk to chunk | from part to part |",
            "|---|---|---|---|---|",
            *(
                f"| {index * NUM_FRAMES + 1} to {(index + 1) * NUM_FRAMES} | "
                + " | ".join(f"{metrics[f'long_{field}_{index}']:.3f}" for field in Segment._fields)
                + " |"
                for index in range(SEGMENTS)
            ),
            "",
            "A jump is the mean change of pixels there, divided by that from frame to frame within chunks. It is 1 if "
            "the boundary cannot be seen. A part has "
            f"{PART_CHUNKS} chunks; where positions are limited, the next part has another origin of positions.",
            "",
            "## Attention error of each block",
            "",
            "Mean relative L1 on held-out digits. Window only: no linear branch. Exact causal softmax: perfect feature "
            "maps; what is left is the price of causality.",
            "",
            "![attention error](pictures/attention_error.png)",
            "",
            "## Training",
            "",
            "![losses](pictures/losses.png)",
            "",
            "## All metrics",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| `{name}` | {value:.4g} |" for name, value in metrics.items() if not name.startswith("long_")),
            "",
        ]
    )


def report_misses(runs: Path) -> list[str]:
    """Writes the report as `report` does, and prints every expected result; returns the claims that do not hold."""
    missed = []
    for claim, figure, bound, holds in expectations(report(runs)):
        print(f"{'ok  ' if holds else 'MISS'} {claim}: {figure:.4g} ({bound})")
        missed.extend([] if holds else [claim])
    print(f"see {runs / 'report.md'}")
    return missed


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and reports; returns the exit code, 1 if an expectation is missed."""
    parser = CommandParser("demo.report", __doc__, "--runs runs/demo")
    parser.add_argument("--runs", type=Path, required=True, help="folder with the demo's runs")
    arguments = parser.parse_args(argv)

    missed: list[str] = []
    return report_input_errors(lambda: missed.extend(report_misses(arguments.runs))) or int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
