"""After stage 1 on Wan2.1 T2V 14B: the same as for 1.3B (wan_1_3b_velocity.py), all 40 blocks, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_velocity.py --workdir runs/wan_14b/velocity \
        --config.data.path=FOLDER_OF_TRAJECTORIES

Hardware: 64 TPU v5p (`v5p:4x4x4`), one video a chip.

Expectation, planned and not run: 12 to 19 seconds a step (docs/planned_runs.md).
"""

from configs import wan_1_3b_velocity

PLANNED_RUNS = (
    "--topology v5p:4x4x4",
    "--topology v5p:2x2x1 --config.lora.rank=64 --config.batch_size=4",
)


def get_config():
    config = wan_1_3b_velocity.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/distill/model"
    config.batch_size = 64
    return config
