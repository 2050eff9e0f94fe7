"""Several forms of attention in one scan over depth, for any backbone: feature maps, and the choice of a block's form.

Every layer of a scan has the same inputs. So each layer gets, as its slice of `per_block`, its number, the index of its
form, and a row of every stack of feature maps. `jax.lax.switch` runs the form: compile time grows with the number of
different forms, not with depth.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.features.maps import LinearBranch
from rehyat_jax.attention.form import BlockForms, MapStack
from rehyat_jax.attention.forms.base import AttentionInputs, BlockFeatures, Features, Form

T = TypeVar("T")

FORM_SWITCH = "attention_form"
"""The name scope of the choice of a form; the cost model finds it in compiled programs."""


def stacked(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` independently initialised modules as one, parameters stacked on a new leading axis."""
    return nnx.vmap(create, in_axes=0, out_axes=0)(rngs.split(count))


def make_feature_maps(
    forms: BlockForms,
    *,
    num_heads: int,
    head_dim: int,
    param_dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module | None:
    """A model's "feature_maps": every stack under its key, or the only stack itself; None if no form has maps."""

    def make(stack: MapStack) -> nnx.Module:
        learned = stack.config
        create = lambda rngs: LinearBranch(
            learned.feature_map,
            decay=learned.decay,
            branch_gate=learned.branch_gate,
            heads=num_heads,
            head_dim=head_dim,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        return stacked(create, len(stack.blocks), rngs)

    modules = {stack.key: make(stack) for stack in forms.stacks}
    return nnx.Dict({str(key): module for key, module in modules.items()}) if len(modules) > 1 else modules.get(None)


def rows_of_blocks(forms: BlockForms, stacked_over_blocks: Any, blocks: tuple[int, ...]) -> Any:
    """The rows of some blocks from a tree stacked over all blocks."""
    if blocks == tuple(range(len(forms.of_block))):
        return stacked_over_blocks
    return jax.tree.map(lambda leaf: leaf[jnp.array(blocks)], stacked_over_blocks)


def map_stacks(forms: BlockForms, change: Callable[..., Any], *feature_maps: Any) -> Any:
    """A tree like "feature_maps" whose stacks are change(stack, *the same stack of `feature_maps`)."""
    changed = {stack.key: change(stack, *map(stack.of, feature_maps)) for stack in forms.stacks}
    return changed.get(None, changed)


def rows_over_blocks(forms: BlockForms, feature_maps: Any) -> Any:
    """A tree like "feature_maps" with rows of all blocks; the inverse of taking each stack's own rows.

    A block without maps of a stack is given the row of the stack's first block, which it does not use.
    """
    count = len(forms.of_block)

    def spread(stack: MapStack, maps: Any) -> Any:
        if len(stack.blocks) == count:
            return maps
        rows = jnp.array([stack.blocks.index(block) if block in stack.blocks else 0 for block in range(count)])
        return jax.tree.map(lambda leaf: leaf[rows], maps)

    return map_stacks(forms, spread, feature_maps)


def per_block_arguments(forms: BlockForms, feature_maps: nnx.Module | None) -> dict[str, Any]:
    """What the layers of a scan are given: arrays with a leading axis over all blocks.

    Returns: "block", its number; "form", the index of its form; and "feature_maps", its rows, if there are any.
    """
    arguments = {"block": jnp.arange(len(forms.of_block)), "form": jnp.array(forms.indices)}
    if feature_maps is None:
        return arguments
    return arguments | {"feature_maps": rows_over_blocks(forms, nnx.to_pure_dict(nnx.state(feature_maps)))}


def by_form(forms: BlockForms, per_block: dict[str, Any], branch: Callable[[Form], Callable[[], T]]) -> T:
    """Runs branch(form)() of the block's form.

    Args:
      per_block: one block's slice of `per_block_arguments`.
      branch: of every form in the model; all branches return arrays of the same shapes.
    """
    branches = [branch(form) for form in forms.forms]
    if len(branches) == 1:
        return branches[0]()
    with jax.named_scope(FORM_SWITCH):
        return jax.lax.switch(per_block["form"], branches)


def block_features(
    forms: BlockForms, form: Form, feature_maps: nnx.Module | None, rows: Any, inputs: AttentionInputs
) -> Features:
    """What one block's learned parameters make of its inputs; None for a form without any.

    Args:
      feature_maps: the model's module, for its structure.
      rows: one block's slice of its parameters, as `per_block_arguments` gives.
      inputs: of the block's attention.
    """
    if form.learned is None:
        return None
    stack = forms.stack_of(form)
    branch = nnx.merge(nnx.graphdef(stack.of(feature_maps)), stack.of(rows))
    source = form.learned.feature_map.input
    prefix = "" if source == "rotated" else f"{source}_"
    query, key = (
        getattr(branch, name).inline(getattr(inputs, prefix + name), of_own_tokens=not prefix)
        for name in ("query", "key")
    )
    return BlockFeatures(query, key, branch.log_decay(), branch.gate())
