"""Why do chunks jump where they meet: because of the frames that they read, or of how they were trained?

    python -m rehyat_jax.study configs/studies/by_chunk.py

All six blocks of the digits teacher: stage 1, then 300 steps of stage 2 with a noise level for every chunk; 12 runs.
A chunk reads one or two frames of the past by softmax. It is trained after noisy chunks (diffusion forcing) or after
clean ones (teacher forcing).

Hardware: one or two CPU cores; not run.

Given up: the steps of stage 2 with one noise level, from which the demo's students by chunk start.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    by_chunk = {"steps": 300, "noise_by_chunk": True}
    two_frames = {"hybrid.overlap_frames": 2}
    return Study(
        title="Joining chunks",
        question="Why do chunks jump where they meet, although each one sees the finished chunk before it?",
        published="Self Forcing (arXiv 2506.08009) compares teacher forcing, diffusion forcing and its own method for "
        "softmax students. ReHyAt (arXiv 2601.04342) finds little use in overlaps of more than one frame.",
        stages=(
            TrainingStage("distill", "configs/demo_distill.py", {"hybrid.linear_window": True}),
            TrainingStage("diffusion_forcing", "configs/demo_finetune.py", by_chunk),
            TrainingStage("teacher_forcing", "configs/demo_finetune.py", {**by_chunk, "teacher_forcing": True}),
        ),
        variants={
            "overlap 1, diffusion forcing": Variant(stages=("distill", "diffusion_forcing")),
            "overlap 1, teacher forcing": Variant(stages=("distill", "teacher_forcing")),
            "overlap 2, diffusion forcing": Variant(two_frames, stages=("distill", "diffusion_forcing")),
            "overlap 2, teacher forcing": Variant(two_frames, stages=("distill", "teacher_forcing")),
        },
        measures=("samples",),
        headline="chunk_jump",
        videos=160,
    )
