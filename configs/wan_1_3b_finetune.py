"""Stage 2 on Wan2.1 T2V 1.3B: the whole transformer by flow matching, 15 of its 30 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_1_3b_finetune.py --workdir runs/wan_1_3b/finetune \
        --config.data.path=FOLDER_OF_ENCODED_VIDEOS
    python -m rehyat_jax.convert to-torch runs/wan_1_3b/finetune/model student --layout diffusers

Which 15 blocks: every other one, as long as no better choice is made; `relative_error` in stage 1's metrics ranks them.

Hardware: one TPU v5p, 95 GB (planned, not yet run). Memory (planned): 35 GB of float32 weights, two sets of gradients,
Adam moments and average, and 16.2 GB of temporaries (13.2 GB with all blocks hybrid; the gradient of one video compiled
for a TPU v5p with jax 0.10.2 and libtpu 0.0.42.1). Step (planned): about 0.8 PFLOP a video, three times the forward
pass and one more for the rematerialised blocks.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "finetune"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/distill/model"
    config.hybrid.blocks = tuple(range(1, 30, 2))
    config.data.source = "latent_files"
    config.data.workers = 2
    config.steps = 1000
    config.batch_size = 8
    config.accumulation_steps = 8
    config.remat = "block"
    config.optimizer.learning_rate = 1e-5
    config.ema_decay = 0.99
    return config
