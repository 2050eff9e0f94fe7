"""The demo's recipe: from the digits teacher to a causal student, all blocks hybrid, and to students of 8 and 4 steps.

    python -m rehyat_jax.recipe configs/recipes/demo.py

All students make a video chunk by chunk. Of two further models only errors are measured: the student before it learned
noise levels by chunk, and exact softmax attention that is causal by chunks, with the same training as that student.

Hardware: CPU cores, one for each seed; about 105 minutes a seed (measured for seed 0, docs/recipe.md).
"""

from rehyat_jax.recipes.definition import Recipe, Step


def get_recipe():
    few_steps = lambda steps: {"few_step.steps": steps, "steps": 100, "noise_by_chunk": True}
    causal_softmax = {"forms": ({"blocks": "all", "kind": "causal_softmax"},)}
    return Recipe(
        title="The demo's recipe",
        teacher="assets/demo_teacher",
        steps=(
            Step("distill", "configs/demo_distill.py", changes={"hybrid.linear_window": True}),
            Step("finetune", "configs/demo_finetune.py"),
            Step("chunks", "configs/demo_chunks.py"),
            Step("dmd_8", "configs/demo_dmd.py", changes=few_steps(8)),
            Step("dmd_4", "configs/demo_dmd.py", start="chunks", changes=few_steps(4)),
            Step("floor", "configs/demo_finetune.py", start="", changes=causal_softmax),
        ),
        results={
            "student": "chunks",
            "student_8_steps": "dmd_8",
            "student_4_steps": "dmd_4",
            "one_level": "finetune",
            "causal_softmax": "floor",
        },
        evaluation=("--data", "digits", "--samples", "480", "--batch", "40", "--guidance-scale", "3"),
        without_samples=("one_level", "causal_softmax"),
        seeds=(0, 1, 2),
    )
