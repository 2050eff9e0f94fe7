"""Stage 2 on Wan2.1 T2V 1.3B: the whole transformer by flow matching, 15 of its 30 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_1_3b_finetune.py --workdir runs/wan_1_3b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS
    python -m rehyat_jax.convert to-torch runs/wan_1_3b/finetune/model student --layout diffusers

Which 15 blocks: every other one, as long as no better choice is made; `relative_error` in stage 1's metrics ranks them.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip; all of this planned, none of it run:

    python -m rehyat_jax.plan --config configs/wan_1_3b_finetune.py --topology v5e:4x4

7.9 of 15.75 GiB a chip; 7.1 to 10.8 seconds a step, 32 to 48 chip-hours.
With all blocks hybrid (--config.hybrid.blocks=all) 7.8 of 15.75 GiB a chip, 4.2 to 6.5 seconds a step, 19 to 29
chip-hours; with --config.remat=attention too 13.7 GiB, 4.1 to 6.4 seconds, 18 to 28 chip-hours.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "finetune"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/distill/model"
    config.hybrid.blocks = tuple(range(1, 30, 2))
    config.data.source = "prepared"
    config.data.workers = 2
    config.steps = 1000
    config.batch_size = 16
    config.remat = "block"
    config.optimizer.learning_rate = 1e-5
    config.ema_decay = 0.99
    return config
