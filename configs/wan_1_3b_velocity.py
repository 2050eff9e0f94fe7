"""After stage 1 on Wan2.1 T2V 1.3B: all 30 blocks' feature maps, through the complete model, at 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_1_3b_velocity.py --workdir runs/wan_1_3b/velocity \
        --config.data.path=FOLDER_OF_TRAJECTORIES

The examples may be prepared videos, or trajectories of the teacher (`prepare teacher-trajectories`). 500 steps are what
VDN-H3 gives to its new parameters.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip.

Expectation, planned and not run: 4 to 7 seconds a step (docs/planned_runs.md).
"""

from rehyat_jax.training.config import default_config

PLANNED_RUNS = ("--topology v5e:4x4",)


def get_config():
    config = default_config()
    config.stage = "velocity"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/distill/model"
    config.hybrid.blocks = "all"
    config.data.source = "prepared"
    config.data.workers = 2
    config.steps = 500
    config.batch_size = 16
    config.remat = "attention"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.0
    config.ema_decay = 0.0
    return config
