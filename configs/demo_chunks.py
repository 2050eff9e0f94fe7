"""The demo's student with a noise level for every chunk, so that it can finish a chunk before the next one begins.

    python -m rehyat_jax.train --config configs/demo_chunks.py --workdir runs/demo/chunks
    python -m rehyat_jax.sample --checkpoint runs/demo/chunks/model --order chunks --prompt "a seven moves sideways" \
        --guidance-scale 3 --steps 25 --frames 210 --longest 21 --out seven.mp4
    python -m rehyat_jax.demo.drift --checkpoint runs/demo/finetune/model runs/demo/chunks/model --out runs/demo/drift

It starts from stage 2, which knows the digits with one level in all frames.

Hardware: two CPU cores, as much memory as stage 2. The planned cost is that of stage 2, 0.75 seconds a step. It has not
been run to its end.
"""

from configs import demo_finetune


def get_config():
    config = demo_finetune.get_config()
    config.init_from = "runs/demo/finetune/model"
    config.noise_by_chunk = True
    return config
