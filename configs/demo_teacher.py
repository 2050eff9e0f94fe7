"""The demo's softmax teacher: a Wan transformer of 1.8M parameters, pretrained on moving handwritten digits.

    python -m rehyat_jax.train --config configs/demo_teacher.py --workdir runs/demo_teacher
    python -m rehyat_jax.convert to-torch --layout diffusers runs/demo_teacher/model assets/demo_teacher

Hardware: two CPU cores that also did other work, 1.7 GB of memory, 0.9 seconds a step (measured).

Expectation: `assets/demo_teacher/README.md` reports the quality of the result.
"""

from rehyat_jax.training.config import default_config


def get_config():
    config = default_config()
    config.stage = "pretrain"
    config.preset = "tiny"
    config.steps = 2000
    config.batch_size = 16
    config.dtype = "float32"
    config.optimizer.name = "muon"
    config.optimizer.muon_learning_rate = 0.02
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.ema_decay = 0.997
    config.flow_shift = 5.0
    config.timestep_sampling = "uniform"
    config.checkpoint_every = 400
    return config
