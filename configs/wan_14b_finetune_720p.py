"""Stage 2 on Wan2.1 T2V 14B (wan_14b_finetune.py) at 720x1280, 81 frames, every video sharded in four along time.

    python -m rehyat_jax.train --config configs/wan_14b_finetune_720p.py --workdir runs/wan_14b/finetune_720p \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`) or v6e (`v6e:8x8`), one video on four chips, 16 videos at a time.

Expectation, planned and not run: 16 to 28 seconds a step on v5p, 13 to 23 on v6e (docs/planned_runs.md).
"""

from configs import wan_14b_finetune

PLANNED_RUNS = (
    "--topology v5p:4x4x4 --height 720 --width 1280",
    "--topology v6e:8x8 --height 720 --width 1280",
)


def get_config():
    config = wan_14b_finetune.get_config()
    config.init_from = "runs/wan_14b/distill_720p/model"
    config.batch_size = 32
    config.accumulation_steps = 2
    config.mesh.context = 4
    config.remat = "block"
    return config
