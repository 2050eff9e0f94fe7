"""Stage 1 on Wan2.1 T2V 14B (wan_14b_distill.py) at 720x1280, 81 frames, every video sharded in two along time.

    python -m rehyat_jax.train --config configs/wan_14b_distill_720p.py --workdir runs/wan_14b/distill_720p \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video on two chips.

Expectation, planned and not run: 11 to 18 seconds a step on v5p, 12 to 21 on v6e (docs/planned_runs.md).
"""

from configs import wan_14b_distill

PLANNED_RUNS = (
    "--topology v5p:4x4x4 --height 720 --width 1280",
    "--topology v6e:8x8 --height 720 --width 1280",
)


def get_config():
    config = wan_14b_distill.get_config()
    config.batch_size = 32
    config.mesh.context = 2
    return config
