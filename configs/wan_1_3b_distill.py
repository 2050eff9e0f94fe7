"""Stage 1 on Wan2.1 T2V 1.3B: feature maps for all 30 blocks at 480x832, 81 frames.

    python -m rehyat_jax.convert from-torch Wan2.1-T2V-1.3B runs/wan_1_3b/teacher
    python -m rehyat_jax.train --config configs/wan_1_3b_distill.py --workdir runs/wan_1_3b/distill \
        --config.data.path=FOLDER_OF_ENCODED_VIDEOS

Every block's maps are trained on their own, so one run serves any choice of blocks: stage 2 picks its own.

Hardware: one TPU with 16 GB or more (planned, not yet run). Memory (planned): 5.7 GB of float32 teacher weights, 1.1 GB
of feature maps with gradients and Adam moments, and 4.6 GB of temporaries (the gradient compiled for a TPU v5p with jax
0.10.2 and libtpu 0.0.42.1). Step (planned): 283 TFLOP for the teacher's forward pass of one video and a quarter more
for the hybrid attention and its feature maps' gradients.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "distill"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/teacher"
    config.hybrid.blocks = "all"
    config.data.source = "latent_files"
    config.data.workers = 2
    config.steps = 2000
    config.batch_size = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    # One block's gradient must not scale another's.
    config.optimizer.clip_norm = 0.0
    config.ema_decay = 0.0
    return config
