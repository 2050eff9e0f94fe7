"""After stage 1: which loss of the complete model brings the student closest to the teacher?

    python -m rehyat_jax.study configs/studies/velocity.py

All six blocks of the digits teacher, causal; 15 runs. Every variant has stage 1, and all but the first 100 further
steps, or twice 100. "velocity" trains the feature maps alone. The two others train everything.

Hardware: two CPU cores, 3 GB of memory. About 30 minutes, estimated from the processor time of a run.

Given up to fit half an hour: 100 steps of each stage in place of 480, and mixtures of both losses.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    finetune = lambda name, **changes: TrainingStage(name, "configs/demo_finetune.py", {"steps": 100, **changes})
    of_teacher = {"velocity.teacher": "assets/demo_teacher", "velocity.teacher_weight": 1.0}
    return Study(
        title="After stage 1: videos or the teacher's velocity",
        question="Is the teacher's velocity a better target than videos, for feature maps and for all parameters?",
        published="VDN-H3 distils the teacher's velocity for 500 steps into the new parameters, then finetunes with "
        "LoRA. TurboDiffusion and ARL2 learn the teacher's velocity, ReHyAt (arXiv 2601.04342) videos. No paper "
        "compares the two on one model.",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py"),
            TrainingStage("velocity", "configs/demo_velocity.py", {"steps": 100}),
            finetune("finetune"),
            finetune("finetune_velocity", **of_teacher),
        ),
        variants={
            "stage 1": Variant(stages=("distill",)),
            "velocity": Variant(stages=("distill", "velocity")),
            "videos": Variant(stages=("distill", "finetune")),
            "velocity, then videos": Variant(stages=("distill", "velocity", "finetune")),
            "velocity of the teacher, all parameters": Variant(stages=("distill", "finetune_velocity")),
        },
        measures=("samples", "velocity_error"),
        headline="frame_accuracy",
        videos=80,
    )
