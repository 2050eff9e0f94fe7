"""Which window does the attention need? Chunks of 1, 2, 3 and 5 frames, and overlaps of 0, 1 and 2.

    python -m rehyat_jax.study configs/studies/windows.py

Stage 1 alone, all six blocks of the digits teacher, causal; 18 runs.

Hardware: two CPU cores, 2 GB of memory. About 17 minutes, estimated from the processor time of a run.

Given up to fit half an hour: finetuning. The papers compare finetuned models by VBench; here it is the attention error
that stage 1 leaves.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant


def get_study():
    window = lambda chunk, overlap: Variant({"hybrid.chunk_frames": chunk, "hybrid.overlap_frames": overlap})
    return Study(
        title="Windows: chunks and overlaps",
        question="How does the attention error depend on the frames of a chunk (Tc) and of the overlap (To)?",
        published="VBench at low resolution rises with Tc, and from To 0 to To 1; To 2 and To 3 add little (ReHyAt, "
        "arXiv 2601.04342, ablations).",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "Tc 1, To 1": window(1, 1),
            "Tc 2, To 1": window(2, 1),
            "Tc 3, To 1": window(3, 1),
            "Tc 5, To 1": window(5, 1),
            "Tc 3, To 0": window(3, 0),
            "Tc 3, To 2": window(3, 2),
        },
        measures=("attention_error", "velocity_error"),
        headline="attention_error",
        trends=(
            Trend(
                "VBench by chunk",
                {"Tc 1, To 1": 80.97, "Tc 2, To 1": 82.08, "Tc 3, To 1": 82.17, "Tc 5, To 1": 82.48},
            ),
            Trend("VBench by overlap", {"Tc 3, To 0": 81.56, "Tc 3, To 1": 82.17}),
        ),
    )
