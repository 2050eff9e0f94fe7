"""The train step of a configuration, as `train.py` makes it, with shapes and shardings in place of arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import PartitionSpec

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.parallel.mesh import BATCH, check_batch, check_heads, make_mesh
from rehyat_jax.parallel.sharding import BATCHES, abstract_arrays, check_divisible, shardings
from rehyat_jax.training.compiler_options import compiler_options
from rehyat_jax.training.config import config_from_json
from rehyat_jax.training.setup import abstract_model, abstract_teacher
from rehyat_jax.training.stages import STAGES, assemble


class AbstractStep(NamedTuple):
    """A jitted step and its abstract arguments, sharded along the mesh in use."""

    step: Any
    state: dict[str, Any]
    context: dict[str, Any]
    batch: dict[str, Any]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on one device of the step's arguments, by kind, without the compiler's padding."""
        kinds = {
            "parameters": self.state["params"],
            "optimizer state": self.state["opt_state"],
            "average (EMA)": self.state["ema"],
            "frozen teacher": [self.context.get(name, {}) for name in ("frozen", "teacher")],
            "batch": (self.batch, self.context["null_text"]),
        }
        return {kind: bytes_on_device(tree) for kind, tree in kinds.items()}


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    part = lambda leaf: jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return sum(part(leaf).size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_step(config: ml_collections.ConfigDict, wan: WanConfig, latents: Sequence[int]) -> AbstractStep:
    """The step on the mesh in use (`jax.set_mesh`).

    Args:
      config: the training configuration.
      wan: the architecture to train.
      latents: frames, height and width of a video's latents.

    Raises:
      InputError: the mesh cannot shard the model or the batch.
    """
    mesh = jax.sharding.get_mesh()
    examples = config.batch_size // config.accumulation_steps
    check_batch(mesh, examples)
    check_heads(mesh, wan.num_heads)
    model_def, params, specs = abstract_model(wan, config)
    check_divisible(params, specs, mesh)

    params = abstract_arrays(params, shardings(specs))
    array = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings(spec))
    text = (wan.text_length, wan.text_dim)
    context = {"null_text": array(text, PartitionSpec())}
    if STAGES[config.stage].teacher_path(config):
        context["teacher"], _ = abstract_teacher(wan, config)
    (step, initial_state, state_shardings), params, context = assemble(model_def, params, specs, context, config)
    state = abstract_arrays(jax.eval_shape(initial_state, params, context), state_shardings)
    shapes = {"latents": (*latents, wan.in_channels), "text": text}
    steps = (config.accumulation_steps, examples)
    batch = {name: array((*steps, *shape), BATCHES) for name, shape in shapes.items()}
    return AbstractStep(step, state, context, batch)


def lowered(
    devices: Sequence[jax.Device], *, config: dict[str, Any], model: dict[str, Any], latents: Sequence[int]
) -> jax.stages.Lowered:
    """The step for a mesh of these devices, from JSON-ready descriptions; `cost_model.tpu_compile` compiles it."""
    config = config_from_json(config)
    with jax.set_mesh(make_mesh(config.mesh, devices)):
        step, *arguments = abstract_step(config, WanConfig.from_dict(model), latents)
        return step.lower(*arguments)


def lowered_teacher(
    devices: Sequence[jax.Device], *, config: dict[str, Any], model: dict[str, Any], latents: Sequence[int]
) -> jax.stages.Lowered:
    """The same model's forward pass with only softmax attention, on the same examples. Stage 1 adds to this."""
    config = config_from_json(config)
    wan = WanConfig.from_dict(model).replace(hybrid_blocks=())
    with jax.set_mesh(make_mesh(config.mesh, devices)):
        model_def, params, specs = abstract_model(wan, config)
        params = abstract_arrays(params, shardings(specs))
        examples = config.batch_size // config.accumulation_steps
        array = lambda *shape: jax.ShapeDtypeStruct(
            (examples, *shape), jnp.float32, sharding=shardings(PartitionSpec(BATCH))
        )
        arguments = (array(*latents, wan.in_channels), array(), array(wan.text_length, wan.text_dim))
        return jax.jit(apply_model(model_def), compiler_options=compiler_options()).lower(params, *arguments)
