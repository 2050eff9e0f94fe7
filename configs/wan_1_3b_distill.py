"""Stage 1 on Wan2.1 T2V 1.3B: feature maps for all 30 blocks at 480x832, 81 frames.

    python -m rehyat_jax.convert from-torch Wan2.1-T2V-1.3B runs/wan_1_3b/teacher
    python -m rehyat_jax.train --config configs/wan_1_3b_distill.py --workdir runs/wan_1_3b/distill \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Every block's maps are trained on their own. One run therefore serves any choice of blocks in stage 2.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip. All figures are planned; none of these runs has been made:

    python -m rehyat_jax.plan --config configs/wan_1_3b_distill.py --topology v5e:4x4

Expectation: a step takes 1.2 times the teacher's forward pass.

    hardware                    GiB a chip      seconds a step   chip-hours
    v5e-16 (`v5e:4x4`)          1.4 of 15.75    2.0 to 3.2       18 to 28
    v5p-8 (`v5p:2x2x1`)         5.4 of 95.74    3.7 to 5.6
    8 H100 or H200 (`h100:8`)   9.1 of 59       0.9 to 2.3

JAX takes 59 GiB of an H100.
"""

from rehyat_jax.training.config import default_config

PLANNED_RUNS = (
    "--topology v5e:4x4",
    "--topology v5p:2x2x1",
    "--topology h100:8",
)


def get_config():
    config = default_config()
    config.stage = "distill"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/teacher"
    config.hybrid.blocks = "all"
    config.data.source = "prepared"
    config.data.workers = 2
    config.steps = 2000
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0
    # One block's gradient must not scale another's.
    config.optimizer.clip_norm = 0.0
    config.ema_decay = 0.0
    return config
