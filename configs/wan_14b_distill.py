"""Stage 1 on Wan2.1 T2V 14B: the same as for 1.3B (wan_1_3b_distill.py), 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_distill.py --workdir runs/wan_14b/distill \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video a chip; planned, not run (docs/plan.md):

    python -m rehyat_jax.plan --config configs/wan_14b_distill.py --topology v5p:4x4x4

Expectation:

    chip   GiB a chip      seconds a step   chip-hours
    v5p    4.3 of 95.74    4.9 to 7.9       175 to 279
    v6e    4.3 of 31.25    5.0 to 7.8       177 to 277
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
