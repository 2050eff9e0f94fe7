"""How many blocks can be converted? A third, a half, two thirds or all of the six blocks, evenly spread.

    python -m rehyat_jax.study configs/studies/blocks.py

Both stages, causal; 12 runs. All variants have the same number of steps.

Hardware: two CPU cores, 2 GB of memory. About 25 minutes, estimated from the processor time of a run.

Given up to fit half an hour: 150 steps of stage 1 in place of 300, 60 steps of finetuning in place of 480, and a choice
of the blocks that are easiest to convert.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant


def get_study():
    blocks = lambda chosen: Variant({"hybrid.blocks": chosen})
    return Study(
        title="Number of converted blocks",
        question="How much quality do further converted blocks cost, after the same short finetuning?",
        published="VBench is 83.79 with 15 of 30 blocks converted (Tc 3, To 1) and 83.4 with 20; Wan2.1 1.3B itself "
        "has 83.10 (ReHyAt, arXiv 2601.04342). With all 30 blocks, motion suffers: dynamic degree 42 in place of 65 "
        "(SQuad, a later paper of the same group, Wan2.2 5B).",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py", {"steps": 150}),
            TrainingStage("finetune", "configs/demo_finetune.py", {"steps": 60}),
        ),
        variants={
            "1/3 of the blocks": blocks((1, 4)),
            "1/2 of the blocks": blocks((1, 3, 5)),
            "2/3 of the blocks": blocks((0, 2, 3, 5)),
            "all blocks": blocks("all"),
        },
        measures=("samples", "velocity_error"),
        headline="frame_accuracy",
        trends=(Trend("VBench", {"1/2 of the blocks": 83.79, "2/3 of the blocks": 83.4}),),
        videos=80,
    )
