"""What holds a causal student back: causality itself, or the features of linear attention?

    python -m rehyat_jax.study configs/studies/causal_student.py

All six blocks of the digits teacher, stage 1 and 200 steps of stage 2; 15 runs. Exact softmax attention that is causal
by chunks has nothing to learn in stage 1. It is the floor of all causal students: none of them can imitate the teacher
better, except by other weights. The bidirectional student shows what the feature maps cost without causality.

Hardware: two CPU cores. About three hours on one of them, estimated from the first five runs: longer than the half
hour of other studies, because the samples need more of stage 2.

Given up: 280 of the 480 steps of the demo's stage 2.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    linear_window = {"hybrid.linear_window": True}
    causal_softmax = {"forms": ({"blocks": "all", "kind": "causal_softmax"},)}
    return Study(
        title="What holds a causal student back",
        question="How much of a causal student's error is the price of causality, and how much that of feature maps?",
        published="CausVid (arXiv 2412.07772) and Self Forcing (arXiv 2506.08009) make a bidirectional teacher causal "
        "by chunks with exact softmax attention. No paper compares a causal linear student with this floor.",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py"),
            TrainingStage("finetune", "configs/demo_finetune.py", {"steps": 200}),
        ),
        variants={
            "causal softmax": Variant(causal_softmax, stages=("finetune",)),
            "causal hybrid": Variant(),
            "causal hybrid, linear window": Variant(linear_window),
            "causal hybrid, linear window, Tc 5": Variant({**linear_window, "hybrid.chunk_frames": 5}),
            "bidirectional hybrid": Variant({"hybrid.causal": False}),
        },
        measures=("samples", "velocity_error"),
        headline="velocity_error",
        videos=160,
    )
