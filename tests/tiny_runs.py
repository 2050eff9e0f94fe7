"""The smallest transformers, batches and training runs that tests use."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.training.config import default_config
from rehyat_jax.weights import save_model

TINY = WanConfig(
    num_heads=2, head_dim=12, ffn_dim=32, num_layers=3, in_channels=4, out_channels=4, text_dim=8, text_length=4
)


@functools.cache
def abstract_model(config, **options):
    """(graph definition, shapes of the parameters)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), **options)))
    return graphdef, nnx.to_pure_dict(state)


def tiny_model(config=TINY, **options):
    """(graph definition, parameters), with gates, norms and head away from zero so that every path matters."""
    graphdef, shapes = abstract_model(config, **options)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return noise / np.sqrt(leaf.shape[-2])
        return (path[-1].key == "scale") + 0.1 * noise

    return graphdef, jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def tiny_batch(batch=2, frames=5, config=TINY):
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((batch, frames, 4, 6, config.in_channels), np.float32),
        "text": rng.standard_normal((batch, config.text_length, config.text_dim), np.float32),
    }


def one_at_a_time(batch):
    """As steps take it: [1, B, ...]."""
    return jax.tree.map(lambda x: x[None], batch)


def tiny_config(stage, **changes):
    """Without a moving average of the parameters, which makes programs larger: tests of one ask for it."""
    config = default_config()
    config.stage, config.dtype = stage, "float32"
    config.steps, config.batch_size, config.optimizer.warmup_steps = 6, 4, 2
    config.log_every, config.checkpoint_every, config.ema_decay = 1, 3, 0.0
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def saved_once(num_layers):
    """The checkpoint of `pretrained` in a folder that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="rehyat_jax_teacher_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = WAN_PRESETS["tiny"].replace(num_layers=num_layers, ffn_dim=64, num_heads=1, head_dim=24)
    _, params = tiny_model(config)
    save_model(folder / "teacher", config, params, codec="space_to_depth", text_encoder="word_vectors")
    return folder / "teacher"


def pretrained(tmp_path, num_layers=2):
    """A model checkpoint for the digits: the tiny preset with random weights."""
    shutil.rmtree(tmp_path / "teacher", ignore_errors=True)
    shutil.copytree(saved_once(num_layers), tmp_path / "teacher")
    return str(tmp_path / "teacher")


def digits_config(tmp_path, stage, **changes):
    changes = {"init_from": pretrained(tmp_path)} | changes
    config = tiny_config(stage, **changes)
    if stage == "distill":
        config.hybrid.blocks, config.hybrid.chunk_frames, config.hybrid.feature_map.features = "all", 2, 16
    return config


def write_config(path, config):
    """A configuration as a file for `--config`."""
    lines = [
        "import json",
        "from rehyat_jax.training.config import default_config",
        "def get_config():",
        "    config = default_config()",
        f"    config.update(json.loads({config.to_json()!r}))",
        "    return config",
    ]
    path.write_text("\n".join(lines))


def killed_after(checkpoint, finished, workdir):
    """A copy of a finished run, as a kill leaves it a step after one of its checkpoints."""
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("model", "adapter"))
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > checkpoint:
            shutil.rmtree(path)
    assert (workdir / "checkpoints" / str(checkpoint)).is_dir()
    log = workdir / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[: checkpoint + 1]))


def interrupt_at(last_step, write):
    def interrupted(self, step, *more):
        result = write(self, step, *more)
        if step == last_step:
            raise KeyboardInterrupt
        return result

    return interrupted
