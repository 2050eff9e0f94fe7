"""What does causality cost? Linear attention to the past only, or to the past and the future.

    python -m rehyat_jax.study configs/studies/causality.py

Stage 1 of the demo, all six blocks of the digits teacher; 6 runs.

Hardware: two CPU cores, 2 GB of memory. About 6 minutes, estimated from the processor time of a run.

Given up: finetuning. The papers compare finetuned models, whose other parameters can make up for frames that the causal
form does not see. The attention error of stage 1 cannot show that.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant


def get_study():
    return Study(
        title="Causal or bidirectional",
        question="How much attention error do the frames cost that causal linear attention leaves out?",
        published="After finetuning, VBench hardly differs: 82.35 causal, 82.27 bidirectional (ReHyAt, arXiv "
        "2601.04342, ablations).",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={"causal": Variant(), "bidirectional": Variant({"hybrid.causal": False})},
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
        trends=(Trend("VBench", {"bidirectional": 82.27, "causal": 82.35}),),
    )
