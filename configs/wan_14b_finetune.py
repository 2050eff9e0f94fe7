"""Stage 2 on Wan2.1 T2V 14B: the same as for 1.3B (wan_1_3b_finetune.py), all 40 blocks hybrid, 480x832, 81 frames.

    python -m rehyat_jax.train --config configs/wan_14b_finetune.py --workdir runs/wan_14b/finetune \
        --config.data.path=FOLDER_OF_PREPARED_VIDEOS

Hardware: 64 TPU v5p (`v5p:4x4x4`), one video a chip. On 64 v6e (`v6e:8x8`), add `--config.remat=attention_offload`: a
v6e has no room for both the blocks' inputs and what remat "attention" keeps, and the inputs go to the host's memory,
12.5 GiB for every chip. `--config.remat=block` needs neither kind of memory, and computes attention twice.

Expectation, planned and not run: 9 to 15 seconds a step on v5p, 6 to 11 on v6e (docs/planned_runs.md).
"""

from configs import wan_1_3b_finetune

PLANNED_RUNS = (
    "--topology v5p:4x4x4",
    "--topology v6e:8x8 --config.remat=attention_offload",
)


def get_config():
    config = wan_1_3b_finetune.get_config()
    config.preset = "t2v-14B"
    config.init_from = "runs/wan_14b/distill/model"
    config.hybrid.blocks = "all"
    config.batch_size = 64
    config.accumulation_steps = 1
    config.remat = "attention"
    return config
