"""Stage 2 on Wan2.1 T2V 14B: as for 1.3B (wan_1_3b_finetune.py), all 40 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_finetune.py --workdir runs/wan_14b/finetune \
        --config.data.path=FOLDER_OF_ENCODED_VIDEOS
"""

from configs import wan_1_3b_finetune


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/distill/model"
    config.hybrid.blocks = "all"
    config.batch_size = 64
    config.accumulation_steps = 1
    return config
