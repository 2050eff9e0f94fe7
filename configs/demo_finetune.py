"""Stage 2 of the demo: the complete transformer by flow matching, all six blocks hybrid and causal.

    python -m rehyat_jax.train --config configs/demo_finetune.py --workdir runs/demo/finetune

Hardware: two CPU cores, 0.75 seconds a step (measured). It takes as much memory as the teacher.

Expectation: samples show the asked-for digit in 97% of all frames. The teacher's samples show it in 99%.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "finetune"
    config.init_from = "runs/demo/distill/model"
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
