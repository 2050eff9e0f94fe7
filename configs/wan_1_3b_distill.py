"""Stage 1 on Wan2.1 T2V 1.3B: feature maps for all 30 blocks at 480x832, 81 frames.

    python -m rehyat_jax.convert from-torch Wan2.1-T2V-1.3B runs/wan_1_3b/teacher
    python -m rehyat_jax.train --config configs/wan_1_3b_distill.py --workdir runs/wan_1_3b/distill \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Every block's maps are trained on their own. One run therefore serves any choice of blocks in stage 2.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip. A single v5e chip trains with one video a step.

Expectation, planned and not run: 2 to 3 seconds a step, 1.2 times the teacher's forward pass (docs/planned_runs.md).
"""

from rehyat_jax.training.config import default_config

PLANNED_RUNS = (
    "--topology v5e:4x4",
    "--topology v5e:1x1 --config.batch_size=1",
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
