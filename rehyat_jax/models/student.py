"""Students: a softmax teacher's parameters with converted blocks, whose attention is compared with the teacher's."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.forms.base import AttentionInputs, Form
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.models.hybrid import by_form, make_feature_maps, map_stacks, rows_of_blocks
from rehyat_jax.models.wan.modeling import WanTransformer

Inputs = tuple[jax.Array, jax.Array, jax.Array]
"""A model's latents [B, T, H, W, C], timestep [B] and text [B, L, text_dim]."""


def teacher_scan(
    model: WanTransformer,
    inputs: Inputs,
    compare: Callable[[Form, AttentionInputs, jax.Array, Any], Any],
    rows: Any = None,
) -> Any:
    """Runs the softmax teacher, and `compare(form, inputs, target, rows)` in every converted block.

    Args:
      model: a transformer with converted blocks; their softmax attention is the teacher.
      inputs: of the model.
      compare: (form of the block, AttentionInputs, softmax attention [B, N, H, d], the block's slice of `rows`) -> tree
        of arrays, of the same shapes for every form.
      rows: arrays with a leading axis over all blocks; None for the model's "feature_maps".

    Returns:
      The trees, stacked on a leading axis over all blocks; zero for blocks that are not converted.
    """
    forms = model.config.block_forms

    def attend(inputs: AttentionInputs, per_block: Any) -> tuple[jax.Array, Any]:
        target = inputs.softmax()
        run = lambda form: compare(form, inputs, target, per_block.get("rows", per_block.get("feature_maps")))
        converted = next(form for form in forms.forms if form != SOFTMAX)
        skip = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: run(converted)))
        return target, by_form(forms, per_block, lambda form: skip if form == SOFTMAX else lambda: run(form))

    given = {} if rows is None else {"rows": rows}
    return model.forward(*inputs, attend, model.per_block_attention() | given)[1]


def softmax_velocity(model: WanTransformer, inputs: Inputs) -> jax.Array:
    """The velocity [B, T, H, W, C_out], float32, of a model with softmax attention in all blocks."""
    return model.forward(*inputs, lambda inputs, _: (inputs.softmax(), None), {})[0]


def converted_rows(model: WanTransformer, stacked_over_blocks: Any) -> Any:
    """The rows of the converted blocks."""
    forms = model.config.block_forms
    return rows_of_blocks(forms, stacked_over_blocks, forms.converted)


def rows_of_stacks(model: WanTransformer, feature_maps: Any) -> Any:
    """Each stack of "feature_maps" with the rows of its own blocks, from a tree with rows of all blocks."""
    forms = model.config.block_forms
    return map_stacks(forms, lambda stack, maps: rows_of_blocks(forms, maps, stack.blocks), feature_maps)


def calibrated_maps(model: WanTransformer, inputs: Inputs) -> Any:
    """The model's "feature_maps", whose linear branches carry the softmax mass that they stand for on these inputs.

    A correction of every head is split evenly between the log_scale of phi_query and phi_key, which keeps both well
    scaled. All kinds of feature maps have a log_scale.
    """
    forms = model.config.block_forms

    def log_scale(form: Form, inputs: AttentionInputs, target: jax.Array, feature_maps: Any) -> jax.Array:
        del target
        return form.log_scale(inputs, model.features(form, inputs, feature_maps))

    halves = teacher_scan(model, inputs, log_scale) / 2

    def corrected(stack: Any, maps: Any) -> Any:
        half = rows_of_blocks(forms, halves, stack.blocks)
        change = lambda tree: {**tree, "log_scale": tree["log_scale"] + half}
        return maps | {name: change(maps[name]) for name in ("query", "key")}

    return map_stacks(forms, corrected, nnx.to_pure_dict(nnx.state(model.feature_maps)))


def make_student(
    teacher: WanTransformer,
    forms: Form | Mapping[int, Form],
    *,
    seed: int = 0,
    calibrate_on: Inputs | None = None,
) -> WanTransformer:
    """A student that shares the teacher's arrays, with new feature maps in the converted blocks.

    Args:
      teacher: a transformer without converted blocks.
      forms: the form of all blocks, or of some by their index; the other blocks stay softmax.
      seed: of the feature maps' initialisation.
      calibrate_on: (latents [B, T, H, W, C], timestep [B] in 0..1000, text [B, L, text_dim]) to calibrate the maps'
        scale on, as stage 1 does before its first step; None leaves the scale alone.

    Raises:
      ValueError: the teacher has converted blocks, or there is no block of such an index.
    """
    if teacher.config.hybrid_blocks:
        raise ValueError(f"teacher: expected no converted blocks, found {teacher.config.hybrid_block_indices}")
    if isinstance(forms, Mapping):
        of_block = {block: form for block, form in sorted(forms.items()) if form != SOFTMAX}
        config = teacher.config.replace(hybrid_blocks=tuple(of_block), hybrid=tuple(of_block.values()))
    else:
        config = teacher.config.replace(hybrid_blocks="all", hybrid=forms)
    names = ("dtype", "param_dtype", "scan_layers", "remat", "attention_implementation")
    options = {name: getattr(teacher, name) for name in names}
    structure = nnx.graphdef(nnx.eval_shape(lambda: type(teacher)(config, rngs=nnx.Rngs(0), **options)))
    params = nnx.to_pure_dict(nnx.state(teacher))
    rngs = nnx.Rngs(params=seed)
    maps = make_feature_maps(config.block_forms, num_heads=config.num_heads, head_dim=config.head_dim, rngs=rngs)
    if maps is None:
        return nnx.merge(structure, params)
    params["feature_maps"] = nnx.to_pure_dict(nnx.state(maps))
    if calibrate_on is not None:
        calibrate = jax.jit(lambda params, inputs: calibrated_maps(nnx.merge(structure, params), inputs))
        params["feature_maps"] = calibrate(params, tuple(calibrate_on))
    return nnx.merge(structure, params)
