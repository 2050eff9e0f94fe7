"""Stage 2 on Wan2.1 T2V 14B: the same as for 1.3B (wan_1_3b_finetune.py), all 40 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_finetune.py --workdir runs/wan_14b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video a chip; planned, not run (docs/plan.md):

    python -m rehyat_jax.plan --config configs/wan_14b_finetune.py --topology v5p:4x4x4
    python -m rehyat_jax.plan --config configs/wan_14b_finetune.py --topology v6e:8x8 --config.remat=attention_offload

Expectation:

    chip                                    GiB a chip      seconds a step   chip-hours
    v5p                                     42.0 of 95.74   9.0 to 14.9      160 to 266
    v6e, --config.remat=attention_offload   28.4 of 31.25   6.3 to 11.1      113 to 197

A v6e has no room for both the blocks' inputs and what remat "attention" keeps. "attention_offload" moves the inputs to
the host's memory, 12.5 GiB for every chip. The v6e figures assume that these go there and back during the arithmetic.
`--config.remat=block` needs neither kind of memory, and computes attention twice.
"""

from configs import wan_1_3b_finetune

PLANNED_RUNS = (
    "--topology v5p:4x4x4",
    "--topology v6e:8x8 --config.remat=attention_offload",
)


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/distill/model"
    config.hybrid.blocks = "all"
    config.batch_size = 64
    config.accumulation_steps = 1
    config.remat = "attention"
    return config
