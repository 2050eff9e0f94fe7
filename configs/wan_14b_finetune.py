"""Stage 2 on Wan2.1 T2V 14B: as for 1.3B (wan_1_3b_finetune.py), all 40 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_finetune.py --workdir runs/wan_14b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video a chip; planned, not run (docs/plan.md):

    python -m rehyat_jax.plan --config configs/wan_14b_finetune.py --topology v5p:4x4x4

42.0 of 95.74 GiB a chip, 9.0 to 14.9 seconds a step, 160 to 266 chip-hours. A v6e has no room for what remat
"attention" keeps beside the blocks' inputs, unless these go to the host's memory:

    python -m rehyat_jax.plan --config configs/wan_14b_finetune.py --topology v6e:8x8 --config.remat=attention_offload

28.4 of 31.25 GiB, and 12.5 of the host's for every chip; 6.3 to 11.1 seconds, 113 to 197 chip-hours, if 12.5 GiB go
there and back beside the arithmetic. --config.remat=block needs neither, and computes attention twice.
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
