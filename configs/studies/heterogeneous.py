"""Is a form chosen for every block better than one form for all, at the same cost?

    python -m rehyat_jax.study configs/studies/heterogeneous.py

Stage 1 alone, on the digits teacher; 12 runs. `rehyat_jax.surgery` made the choices, see
docs/measurements/surgery_demo.json, for budgets of 0.4 and 0.6 of the FLOPs of softmax attention to latents of
21x24x24: the best choice of any forms, and the best one with a single form next to softmax. At the lower budget, the
choice by block costs 0.38 and the single form 0.40; at the higher one, both cost 0.60. The figure is the velocity error
of the complete model, while surgery only adds up the errors of blocks.

Hardware: two CPU cores, 2 GB of memory. About 11 minutes, estimated from the processor time of a run.

Given up to fit half an hour: finetuning, and other budgets.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant


def get_study():
    strided = lambda stride, *blocks: {"blocks": blocks, "kind": "strided", "stride": stride}
    # The demo's own configuration makes all other blocks hybrid.
    forms = lambda *entries: Variant({"forms": entries, "hybrid.blocks": None})
    return Study(
        title="One form for all blocks, or one for each",
        question="Does the choice by block leave less error of the complete model at the same cost?",
        published="With the cost of 15 strided blocks of R 4 in Wan2.1 1.3B, VBench is 81.0 for one rate and 81.9 for "
        "a rate by block; with that of 25 such blocks, which is lower, 79.9 and 80.2 (Attention Surgery, arXiv "
        "2509.24899).",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "one form, budget 0.4": forms(strided(4, 0, 1, 2, 3, 4, 5)),
            "by block, budget 0.4": forms(strided(8, 0, 1, 2, 4), {"blocks": (3,), "kind": "linear"}),
            "one form, budget 0.6": forms(strided(4, 0, 1, 2, 4)),
            "by block, budget 0.6": forms(strided(8, 0, 2), strided(4, 1), strided(2, 4)),
        },
        measures=("velocity_error",),
        headline="velocity_error",
        trends=(
            Trend("VBench, cost of 25 blocks of R 4", {"one form, budget 0.4": 79.9, "by block, budget 0.4": 80.2}),
            Trend("VBench, cost of 15 blocks of R 4", {"one form, budget 0.6": 81.0, "by block, budget 0.6": 81.9}),
        ),
    )
