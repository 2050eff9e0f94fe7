"""Should linear attention read the frames of the softmax window too?

    python -m rehyat_jax.study configs/studies/linear_window.py

Stage 1 alone, all six blocks of the digits teacher; 15 runs. Linear attention alone, which also reads the frames of its
chunk, is the third causal variant.

Hardware: two CPU cores, 2 GB of memory. About 14 minutes, estimated from the processor time of a run.

Given up to fit half an hour: finetuning.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    linear_window = {"hybrid.linear_window": True}
    return Study(
        title="Linear attention to the window",
        question="In the form of the papers the keys of the window have no features. Is a causal student better if "
        "linear attention reads them too?",
        published="No paper has this form. ReHyAt (arXiv 2601.04342) and Attention Surgery (arXiv 2509.24899) divide "
        "the keys between softmax and linear attention.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "hybrid": Variant(),
            "hybrid, linear window": Variant(linear_window),
            "linear": Variant({"forms": ({"blocks": "all", "kind": "linear", "chunk_frames": 3},)}),
            "bidirectional": Variant({"hybrid.causal": False}),
            "bidirectional, linear window": Variant({"hybrid.causal": False, **linear_window}),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
