"""Should the linear state forget, or choose its tokens? A learned decay of every head, and a gate of every token.

    python -m rehyat_jax.study configs/studies/decay.py

Stage 1 alone, all six blocks of the digits teacher, causal; 12 runs. Decay begins at 0.98 a frame. A gate begins at
one, which changes nothing.

Hardware: two CPU cores, 2 GB of memory. About 13 minutes, estimated from the processor time of a run.

Given up: finetuning, the gated delta rule, and long videos. With 21 latent frames, little has to be forgotten.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    decay, gate = {"hybrid.decay": True}, {"hybrid.feature_map.gate": True}
    return Study(
        title="Decay and gates",
        question="How much attention error do a learned decay and gates of tokens remove?",
        published="ReHyAt (arXiv 2601.04342) has neither. The states of VDN-H3 and ARL2 follow the gated delta rule. "
        "SALAD (arXiv 2601.16515) has a gate of its linear branch that depends on the input and begins at zero. No "
        "comparison with models that lack them is known.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "neither": Variant(),
            "decay": Variant(decay),
            "gate": Variant(gate),
            "decay and gate": Variant({**decay, **gate}),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
