"""How many features does a head need? 64, 128, 256 and 512 for heads of width 64.

    python -m rehyat_jax.study configs/studies/feature_map_sizes.py

Stage 1 alone, all six blocks of the digits teacher, causal; 12 runs.

Hardware: two CPU cores, 2 GB of memory. About 13 minutes, estimated from the processor time of a run.

Given up: finetuning and samples.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    return Study(
        title="Feature maps: number of features",
        question="How does the attention error depend on the number of features of a head?",
        published="ReHyAt (arXiv 2601.04342) uses 256 features for heads of width 128: twice the width.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            f"{features} features": Variant({"hybrid.feature_map.features": features})
            for features in (64, 128, 256, 512)
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
