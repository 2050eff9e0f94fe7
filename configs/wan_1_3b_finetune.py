"""Stage 2 on Wan2.1 T2V 1.3B: the complete transformer by flow matching, 15 of 30 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_1_3b_finetune.py --workdir runs/wan_1_3b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS
    python -m rehyat_jax.convert to-torch runs/wan_1_3b/finetune/model student --layout diffusers

The 15 blocks are every other one, as long as no better choice is made. `relative_error` in stage 1's metrics ranks
the blocks.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip. `--config.hybrid.blocks=all` makes all blocks hybrid.

Expectation, planned and not run: 5 to 9 seconds a step, or 3 to 5 with all blocks hybrid (docs/planned_runs.md).
"""

from rehyat_jax.training.config import default_config

PLANNED_RUNS = (
    "--topology v5e:4x4",
    "--topology v5p:2x2x1",
    "--topology h100:8",
    "--topology v5e:4x4 --config.hybrid.blocks=all",
    "--topology v5e:4x4 --config.hybrid.blocks=all --config.remat=attention",
    "--topology v5p:2x2x1 --config.hybrid.blocks=all",
    "--topology h100:8 --config.hybrid.blocks=all",
)


def get_config():
    config = default_config()
    config.stage = "finetune"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/distill/model"
    config.hybrid.blocks = tuple(range(1, 30, 2))
    config.data.source = "prepared"
    config.data.workers = 2
    config.steps = 1000
    config.batch_size = 16
    config.remat = "block"
    config.optimizer.learning_rate = 1e-5
    config.ema_decay = 0.99
    return config
