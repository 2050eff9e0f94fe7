"""Is stage 1 worth its time? The same short finetuning, with and without distilled feature maps.

    python -m rehyat_jax.study configs/studies/distillation.py

All six blocks of the digits teacher, causal; 6 runs. Without stage 1, finetuning starts from fresh feature maps whose
scale is calibrated.

Hardware: two CPU cores, 2 GB of memory. About 17 minutes, estimated from the processor time of a run.

Given up to fit half an hour: 100 steps of finetuning in place of 480. With more steps, finetuning makes up for more.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant


def get_study():
    return Study(
        title="Stage 1 on or off",
        question="How much better are samples after a short finetuning, if stage 1 came before it?",
        published="For 15 linear blocks of Wan2.1 1.3B, distillation raises VBench from 59.7 to 78.9 (Attention "
        "Surgery, arXiv 2509.24899).",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py"),
            TrainingStage("finetune", "configs/demo_finetune.py", {"steps": 100}),
        ),
        variants={
            "with stage 1": Variant(),
            "without stage 1": Variant(
                {"hybrid.blocks": "all", "hybrid.feature_map.features": 128}, stages=("finetune",)
            ),
        },
        measures=("samples", "velocity_error"),
        headline="frame_accuracy",
        trends=(Trend("VBench", {"without stage 1": 59.7, "with stage 1": 78.9}),),
        videos=80,
    )
