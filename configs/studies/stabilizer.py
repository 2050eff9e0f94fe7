"""Which constant stabilises the softmax branch? The row maximum as printed, or one that changes nothing.

    python -m rehyat_jax.study configs/studies/stabilizer.py

Stage 1 of the demo, all six blocks of the digits teacher, causal; 6 runs.

Hardware: two CPU cores, 2 GB of memory. About 6 minutes, estimated from the processor time of a run.

Given up: finetuning and samples.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    return Study(
        title="Stabilizer: row_max or joint",
        question="With row_max, as the paper prints it, linear weights are relative to the largest score in the "
        "window. With joint they are relative to the true exponentials. Which of the two functions is learned better?",
        published="ReHyAt (arXiv 2601.04342) prints row_max. No paper compares the two.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={"row_max": Variant(), "joint": Variant({"hybrid.stabilizer": "joint"})},
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
