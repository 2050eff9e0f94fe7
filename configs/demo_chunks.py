"""The demo's student with a noise level for every chunk, so that it can finish a chunk before the next one begins.

    python -m rehyat_jax.train --config configs/demo_chunks.py --workdir runs/demo/chunks
    python -m rehyat_jax.sample --checkpoint runs/demo/chunks/model --prompt "a seven moves sideways" \
        --guidance-scale 3 --steps 25 --frames 210 --longest 21 --out seven.mp4
    python -m rehyat_jax.demo.drift --checkpoint runs/demo/finetune/model runs/demo/chunks/model --out runs/demo/drift

It starts from stage 2, which knows the digits with one level in all frames.

Hardware: one CPU core, 1.7 seconds a step (measured next to other programs); as much memory as stage 2.

Expectation: all of 40 samples move as asked, where 92.5% did before, and jump less at the boundaries of chunks
(docs/chunks.md).
"""

from configs import demo_finetune


def get_config():
    config = demo_finetune.get_config()
    config.init_from = "runs/demo/finetune/model"
    config.noise_by_chunk = True
    return config
