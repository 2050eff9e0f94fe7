"""Stage 2 on Wan2.1 T2V 1.3B (wan_1_3b_finetune.py) for long videos: 641 frames at 480x832, all blocks hybrid.

    python -m rehyat_jax.train --config configs/wan_1_3b_long.py --workdir runs/wan_1_3b/long \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

641 frames are 161 latent frames or 251,160 tokens. They are sharded along time over 4 devices.

Hardware: 16 TPU v6e (`v6e:4x4`), one video on four chips.

Expectation, planned and not run: 2.5 to 4.3 seconds a step (docs/planned_runs.md).
"""

from configs import wan_1_3b_finetune

PLANNED_RUNS = ("--topology v6e:4x4 --frames 641",)


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.hybrid.blocks = "all"
    config.batch_size = 4
    config.mesh.context = 4
    return config
