"""A student of 4 steps from the finetuned student of Wan2.1 T2V 1.3B, all blocks hybrid: distribution matching (DMD2).

    python -m rehyat_jax.train --config configs/wan_1_3b_dmd.py --workdir runs/wan_1_3b/dmd \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Only the captions of the videos are used, and their size. Guidance 5 is distilled in.

Hardware: TPU v5e-16 (`v5e:4x4`), one video a chip. docs/planned_runs.md has its planned memory and cost.
"""

from rehyat_jax.training.config import default_config

PLANNED_RUNS = ("--topology v5e:4x4 --config.hybrid.blocks=all",)


def get_config():
    config = default_config()
    config.stage = "dmd"
    config.preset = "t2v-1.3B"
    config.init_from = "runs/wan_1_3b/finetune/model"
    config.data.source = "prepared"
    config.data.workers = 2
    config.velocity.guidance_scale = 5.0
    config.few_step.steps = 4
    config.steps = 1000
    config.batch_size = 16
    config.remat = "attention"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = "constant"
    config.optimizer.weight_decay = 0.01
    config.timestep_sampling = "uniform"
    return config
