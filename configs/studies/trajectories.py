"""Which inputs should stage 1 see? Noised videos, or the latents that the teacher meets while it samples.

The trajectories are prepared first. With all 20 captions, this takes about two minutes:

    mkdir -p runs/demo
    python -c "from rehyat_jax.demo.digits import CAPTIONS; print(*CAPTIONS, sep='\\n')" > runs/demo/prompts.txt
    python -m rehyat_jax.prepare teacher-trajectories assets/demo_teacher runs/demo/trajectories \\
        --prompts runs/demo/prompts.txt --noises 12 --keep 8 --steps 24 --guidance-scale 3 --flow-shift 5 --batch 16
    python -m rehyat_jax.study configs/studies/trajectories.py

Stage 1 alone, all six blocks of the digits teacher, causal; 6 runs. A run of 300 steps sees 1,800 of the 1,920 examples
of the trajectories. Both variants are measured on noised videos, which are the inputs of one of them. Samples
favour neither, so they are the headline.

Hardware: two CPU cores, 2 GB of memory. About 10 minutes, estimated from the processor time of a run.

Given up: finetuning, which would hide most of the difference, and more trajectories.
"""

from rehyat_jax.studies.definition import Study, TrainingStage, Variant


def get_study():
    return Study(
        title="Noised videos or the teacher's trajectories",
        question="Does stage 1 need videos, or can it learn from the latents that the teacher meets while it samples?",
        published="Stage 1 of ReHyAt (arXiv 2601.04342) needs no paired data: prompts, noises and denoising steps. "
        "Attention Surgery (arXiv 2509.24899) caches trajectories of the teacher. No comparison with noised "
        "videos is known.",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={
            "noised videos": Variant(),
            "trajectories": Variant({"data.source": "prepared", "data.path": "runs/demo/trajectories"}),
        },
        measures=("samples", "attention_error", "velocity_error"),
        headline="frame_accuracy",
        videos=80,
    )
