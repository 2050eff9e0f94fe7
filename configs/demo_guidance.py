"""A student of eight steps without guidance from the demo's student of many: guidance distillation.

    python -m rehyat_jax.train --config configs/demo_guidance.py --workdir runs/demo/guidance
    python -m rehyat_jax.sample --checkpoint runs/demo/guidance/model --prompt "a seven moves sideways" --out seven.mp4

`sample` reads the number of steps, the sampler and the guidance scale of 1 from the model.

Hardware: one CPU core, 3.8 seconds a step by chunk with teacher forcing (measured next to another program); as much
memory as stage 2 and a copy of the model.

Expectation, measured by chunk in the demo's recipe: 8 steps show the asked-for digit in 98.3% of the frames, where the
initial model has 97.1% with 50 steps and guidance (three seeds, 480 videos each; docs/recipe.md). With one noise level
in all frames, as here, it has not been run.
"""

from configs import demo_finetune


def get_config():
    config = demo_finetune.get_config()
    config.stage = "guidance"
    config.init_from = "runs/demo/finetune/model"
    config.few_step.steps = 8
    config.velocity.guidance_scale = 3.0
    config.steps = 150
    config.optimizer.muon_learning_rate = 2e-3
    config.optimizer.learning_rate = 2e-4
    config.ema_decay = 0.95
    config.checkpoint_every = 50
    return config
