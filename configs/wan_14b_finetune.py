"""Stage 2 on Wan2.1 T2V 14B: as for 1.3B (wan_1_3b_finetune.py), all 40 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_finetune.py --workdir runs/wan_14b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video a chip; planned, not run (docs/plan.md):

    python -m rehyat_jax.plan --config configs/wan_14b_finetune.py --topology v5p:4x4x4

28.1 of 95.74 GiB a chip, 10.9 to 18.3 seconds a step, 194 to 325 chip-hours; on v6e 28.0 of 31.25 GiB, 8.1 to 14.2
seconds, 144 to 253 chip-hours. Where memory is left, as on v5p, --config.remat=attention spares the attention kernels'
second forward pass.
"""

from configs import wan_1_3b_finetune


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/distill/model"
    config.hybrid.blocks = "all"
    config.batch_size = 64
    config.accumulation_steps = 1
    config.remat = "attention"
    return config
