"""Does the stabilizer matter after finetuning? Both stages, with row_max and with joint.

    python -m rehyat_jax.study configs/studies/stabilizer_finetuned.py

All six blocks of the digits teacher, causal; 6 runs. `stabilizer.py` compares the two after stage 1.

Hardware: two CPU cores, 2 GB of memory. About 17 minutes, estimated from the processor time of a run.

Given up to fit half an hour: 100 steps of finetuning in place of 480. With more steps, finetuning makes up for more.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    return Study(
        title="Stabilizer after finetuning",
        question="Is the difference between row_max and joint still there after a short finetuning?",
        published="ReHyAt (arXiv 2601.04342) prints row_max. No paper compares the two.",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py"),
            TrainingStage("finetune", "configs/demo_finetune.py", {"steps": 100}),
        ),
        variants={"row_max": Variant(), "joint": Variant({"hybrid.stabilizer": "joint"})},
        measures=("samples", "velocity_error"),
        headline="velocity_error",
        videos=80,
    )
