"""The demo's student with a noise level for every chunk, so that it can finish a chunk before the next one begins.

    python -m rehyat_jax.train --config configs/demo_chunks.py --workdir runs/demo/chunks
    python -m rehyat_jax.sample --checkpoint runs/demo/chunks/model --order chunks --prompt "a seven moves sideways" \
        --guidance-scale 3 --steps 25 --frames 210 --longest 21 --out seven.mp4
    python -m rehyat_jax.demo.drift --checkpoint runs/demo/finetune/model runs/demo/chunks/model --out runs/demo/drift

It starts from stage 2, which knows the digits with one level in all frames.

Hardware: two CPU cores, as much memory as stage 2. The planned cost is that of stage 2, 0.75 seconds a step. It has not
been run to its end.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "finetune"
    config.init_from = "runs/demo/finetune/model"
    config.noise_by_chunk = True
    config.steps = 480
    config.batch_size = 16
    config.dtype = "float32"
    config.optimizer.name = "muon"
    config.optimizer.muon_learning_rate = 5e-3
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    config.ema_decay = 0.99
    config.flow_shift = 5.0
    config.checkpoint_every = 100
    config.timestep_sampling = "uniform"
    return config
