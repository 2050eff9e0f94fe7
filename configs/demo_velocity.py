"""After stage 1 of the demo: the feature maps again, through the complete model, against the teacher's velocity.

    python -m rehyat_jax.train --config configs/demo_velocity.py --workdir runs/demo/velocity

All other parameters are the teacher's and stay as they are.

Hardware: two CPU cores, 1.5 seconds a step (measured).

Expectation: the error of the velocity falls from 0.162 to 0.142 (one seed), while the mean error of attention, which
stage 1 minimised, rises from 0.233 to 0.273.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "velocity"
    config.init_from = "runs/demo/distill/model"
    config.steps = 200
    config.batch_size = 16
    config.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    config.ema_decay = 0.0
    config.flow_shift = 5.0
    config.checkpoint_every = 100
    config.timestep_sampling = "uniform"
    return config
