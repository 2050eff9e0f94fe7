"""Stage 1 on Wan2.1 T2V 14B: the same as for 1.3B (wan_1_3b_distill.py), 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_distill.py --workdir runs/wan_14b/distill \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video a chip.

Expectation, planned and not run: 5 to 8 seconds a step on either (docs/planned_runs.md).
"""

from configs import wan_1_3b_distill

PLANNED_RUNS = (
    "--topology v5p:4x4x4",
    "--topology v6e:8x8",
)


def get_config():
    config = wan_1_3b_distill.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/teacher"
    config.batch_size = 64
    return config
