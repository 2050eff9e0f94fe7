"""The demo's recipe: from the digits teacher to a causal student, all blocks hybrid, and to students of 8 and 4 steps.

    python -m rehyat_jax.recipe configs/recipes/demo.py

All students make a video chunk by chunk. An overlap of two frames shows how fast the digit moves, where one frame only
shows where it is. Of two further models only errors are measured: the student before it learned noise levels by chunk,
and exact softmax attention that is causal by chunks, with the same training as that student.

Hardware: CPU cores, one for each seed (docs/recipe.md has the times).
"""

from rehyat_jax.recipes.definition import Recipe, Step


def get_recipe():
    by_chunk = {"noise_by_chunk": True, "teacher_forcing": True}
    causal_softmax = {"forms": ({"blocks": "all", "kind": "causal_softmax"},)}
    return Recipe(
        title="The demo's recipe",
        teacher="assets/demo_teacher",
        steps=(
            Step(
                "distill", "configs/demo_distill.py", changes={"hybrid.linear_window": True, "hybrid.overlap_frames": 2}
            ),
            Step("finetune", "configs/demo_finetune.py"),
            Step("chunks", "configs/demo_chunks.py", changes=by_chunk),
            Step("guidance", "configs/demo_guidance.py", changes=by_chunk),
            Step("floor", "configs/demo_finetune.py", start="", changes=causal_softmax),
        ),
        results={
            "student": "chunks",
            "student_8_steps": "guidance",
            "student_4_steps": "guidance",
            "one_level": "finetune",
            "causal_softmax": "floor",
        },
        evaluation=("--data", "digits", "--samples", "480", "--batch", "40", "--guidance-scale", "3"),
        options={"student_4_steps": ("--student-steps", "4")},
        without_samples=("one_level", "causal_softmax"),
        seeds=(0, 1, 2),
    )
