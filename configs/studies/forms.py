"""Which form of attention is closest to softmax? Hybrid, linear only, window only, strided, or two separate branches.

    python -m rehyat_jax.study configs/studies/forms.py

Stage 1 alone, all six blocks of the digits teacher in one form; 27 runs. Windows alone have nothing to train: their
model is the teacher with windows, and their figures are the same with every seed. Strided attention and the
bidirectional forms see the complete video. All other forms are causal, which has an error of its own: compare each
group within itself.

Hardware: two CPU cores, 2 GB of memory. About 21 minutes, estimated from the processor time of a run.

Given up to fit half an hour: finetuning, samples, and mixtures of forms. Costs are no part of the study:
`rehyat_jax.evaluate` counts the FLOPs of a model by the length of its videos.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    form = lambda kind, **fields: Variant({"forms": ({"blocks": "all", "kind": kind, **fields},)})
    return Study(
        title="Forms of attention",
        question="How much attention error does each form of attention leave after stage 1?",
        published="VBench is 83.79 with 15 hybrid blocks (Tc 3, To 1) of 30 (ReHyAt, arXiv 2601.04342), and 83.21 with "
        "15 strided ones (R 2; Attention Surgery, arXiv 2509.24899). SANA-Video has linear attention alone, trained "
        "from scratch: 83.71. VDN-H3 normalises its two branches separately.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "hybrid": Variant(),
            "hybrid, bidirectional": Variant({"hybrid.causal": False}),
            "linear": form("linear"),
            "linear, bidirectional": form("linear", causal=False),
            "window": form("window"),
            "strided, R 2": form("strided", stride=2),
            "strided, R 4": form("strided", stride=4),
            "strided, R 8": form("strided", stride=8),
            "two branches": form("two_branch"),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
    )
