"""Do anchors help? 0, 1 and 3 first frames as softmax keys of every chunk, with and without linear attention.

    python -m rehyat_jax.study configs/studies/anchors.py

Stage 1 alone, all six blocks of the digits teacher, causal, Tc 3, To 1; 18 runs. The 9 runs of windows alone have
nothing to train, and their figures are the same with every seed.

Hardware: two CPU cores, 2 GB of memory. About 11 minutes, estimated from the processor time of a run.

Given up: finetuning, and long videos. Anchors are made for streams that are far longer than a window. The demo's videos
have 21 latent frames, which are 7 chunks.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    hybrid = lambda anchors: Variant({"hybrid.anchor_frames": anchors})
    window = lambda anchors: Variant({"forms": ({"blocks": "all", "kind": "window", "anchor_frames": anchors},)})
    return Study(
        title="Anchors",
        question="How much attention error do anchors remove, and how much of what linear attention removes?",
        published="Hybrid Forcing streams with 3 anchors, a window of 9 frames and a linear state. VDN-H3 lets all "
        "frames attend to the first and the last one exactly. A window with anchors is called the baseline that "
        "linear attention has to beat (NVIDIA/flashdreams #571). No comparison with models without anchors is known.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "hybrid, no anchors": Variant(),
            "hybrid, 1 anchor": hybrid(1),
            "hybrid, 3 anchors": hybrid(3),
            "window, no anchors": window(0),
            "window, 1 anchor": window(1),
            "window, 3 anchors": window(3),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
