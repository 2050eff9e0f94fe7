"""How should stage 1 learn? Three losses, gradients clipped block by block, and two updates of a batch.

    python -m rehyat_jax.study configs/studies/distillation_loss.py

Stage 1 alone, all six blocks of the digits teacher, causal; 21 runs. docs/distillation.md explains the options.

Hardware: two CPU cores, 2 GB of memory. About 21 minutes, estimated from the processor time of a run.

Given up: finetuning, and a learning rate for each variant. The attention error is an L1 error, which `l1` minimises
itself; the velocity error favours none of the losses.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    options = lambda **fields: Variant({f"distill.{name}": value for name, value in fields.items()})
    return Study(
        title="Stage 1: loss, clipping and updates",
        question="How does the error after stage 1 depend on its loss, on clipping, and on the updates of a batch?",
        published="ReHyAt (arXiv 2601.04342) and Attention Surgery (arXiv 2509.24899) use L1; Attention Surgery makes "
        "several updates with a batch. Later projects, such as VDN-H3, divide the loss of a layer by the teacher's "
        "energy and clip gradients layer by layer, to 0.1. No comparison of these choices is known.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "l1": Variant(),
            "l2": options(loss="l2"),
            "energy_l2": options(loss="energy_l2"),
            "l1, clipped to 0.02": options(clip_norm=0.02),
            "energy_l2, clipped to 0.1": options(loss="energy_l2", clip_norm=0.1),
            "l1, 2 updates": options(updates_per_batch=2),
            "l1, 2 updates, half the steps": Variant({"distill.updates_per_batch": 2, "steps": 150}),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
