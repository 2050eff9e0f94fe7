"""Stage 2 on Wan2.1 T2V 1.3B: the whole transformer by flow matching, 15 of its 30 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_1_3b_finetune.py --workdir runs/wan_1_3b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS
    python -m rehyat_jax.convert to-torch runs/wan_1_3b/finetune/model student --layout diffusers

Which 15 blocks: every other one, as long as no better choice is made; `relative_error` in stage 1's metrics ranks them.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip; all of this planned, none of it run:

    python -m rehyat_jax.plan --config configs/wan_1_3b_finetune.py --topology v5e:4x4

8.0 of 15.75 GiB a chip; 5.2 to 9.3 seconds a step, 23 to 41 chip-hours.
With all blocks hybrid (--config.hybrid.blocks=all) 8.0 of 15.75 GiB a chip, 3.0 to 5.0 seconds a step, 13 to 22
chip-hours; with --config.remat=attention too 11.2 GiB, 2.8 to 4.7 seconds, 12 to 21 chip-hours.
On v5p-8 (`v5p:2x2x1`) 28.9 of 95.74 GiB, 13.0 to 21.2 seconds (all hybrid: 5.2 to 8.4); on 8 H100 or H200 (`h100:8`)
28.1 GiB of the 59 that JAX takes of an H100, 2.2 to 5.6 seconds (all hybrid: 1.4 to 3.5).
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
