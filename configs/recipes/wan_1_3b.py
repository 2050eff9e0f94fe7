"""Wan2.1 T2V 1.3B: from the converted teacher to a causal student, all blocks hybrid, and to a student of 4 steps.

    python -m rehyat_jax.convert from-torch --models wan wan runs/wan_1_3b/teacher
    python -m rehyat_jax.recipe configs/recipes/wan_1_3b.py --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Put other prepared videos into data/held_out and prompts into data/prompts.txt for the evaluation.

Hardware: TPU v5e-16 (`v5e:4x4`).

The students make a video chunk by chunk.

Expectation, not run: each stage as in docs/planned_runs.md, and chunks as in docs/chunks.md. The last step, by chunk,
does not fit yet: it is planned with 18.5 GiB a chip, of 15.75 (docs/few_steps.md).
"""

from rehyat_jax.recipes.definition import TEACHER, Recipe, Step


def get_recipe():
    hybrid = {"hybrid.blocks": "all", "hybrid.linear_window": True, "hybrid.overlap_frames": 2}
    by_chunk = {"noise_by_chunk": True, "teacher_forcing": True}
    return Recipe(
        title="A causal student of Wan2.1 1.3B",
        teacher="runs/wan_1_3b/teacher",
        steps=(
            Step("distill", "configs/wan_1_3b_distill.py", changes=hybrid),
            Step("velocity", "configs/wan_1_3b_velocity.py", changes={"hybrid.blocks": None}),
            Step(
                "finetune",
                "configs/wan_1_3b_finetune.py",
                changes={"hybrid.blocks": None, "velocity.teacher": TEACHER, "velocity.teacher_weight": 0.5},
            ),
            Step("chunks", "configs/wan_1_3b_finetune.py", changes={"hybrid.blocks": None, **by_chunk}),
            Step("dmd", "configs/wan_1_3b_dmd.py", changes={"noise_by_chunk": True}),
        ),
        results={"student": "chunks", "student_4_steps": "dmd"},
        evaluation=(
            *("--data", "data/held_out", "--samples", "64", "--prompts", "data/prompts.txt"),
            *("--models", "wan", "--mesh", "fsdp=16", "--batch", "16"),
        ),
    )
