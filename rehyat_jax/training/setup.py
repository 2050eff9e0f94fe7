"""Builds the data and the initial model of a run from its configuration."""

import dataclasses
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx, traverse_util

from rehyat_jax.attention.form import MapStack
from rehyat_jax.attention.forms.base import Form
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.sources import make_source
from rehyat_jax.errors import InputError
from rehyat_jax.models.hybrid import make_feature_maps, map_stacks
from rehyat_jax.models.lora import is_adapter, joined, split_tree
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import check_causal
from rehyat_jax.parallel.mesh import check_heads
from rehyat_jax.parallel.sharding import abstract_arrays, check_divisible, param_specs, shardings
from rehyat_jax.training.config import hybrid_config
from rehyat_jax.training.keys import initialisation_key
from rehyat_jax.training.run_data import RunData
from rehyat_jax.training.stages import STAGES, lora_config
from rehyat_jax.training.trouble import next_batch
from rehyat_jax.weights.identity import weights_identity
from rehyat_jax.weights.load import abstract_module, load_sharded, open_checkpoint
from rehyat_jax.weights.model_checkpoint import METADATA
from rehyat_jax.weights.streamed import MODELS_PLACE, NOISE_LEVELS, SAMPLING


class InitialModel(NamedTuple):
    """Where a run starts.

    Attributes:
      model_def: graph definition of the `WanTransformer` with the run's compute dtype, remat policy and attention.
      config: its architecture.
      params: float32 parameters, a nested dict, sharded by `specs` along the mesh in use (`jax.set_mesh`).
      specs: the PartitionSpec of each parameter.
      fresh_feature_maps: whether the feature maps were just initialised and need calibration.
      codec, text_encoder: names of the models that compute its latents and text embeddings.
      models: the place of their weights, if the checkpoint says it.
    """

    model_def: nnx.GraphDef
    config: WanConfig
    params: dict[str, Any]
    specs: dict[str, Any]
    fresh_feature_maps: bool
    codec: str
    text_encoder: str
    models: str | None


def open_data(config: ml_collections.ConfigDict) -> Source:
    """The configured training examples. Raises InputError if they cannot be read."""
    return make_source(config.data.source, config.data.path, config.seed)


def wanted_forms(config: ml_collections.ConfigDict, num_layers: int) -> tuple[Form, ...]:
    """The configured form of every block.

    Raises:
      InputError: an entry names blocks that do not exist, or two entries share a block.
    """
    of_block: dict[int, Form] = {}
    for number, entry in enumerate(config.forms):
        form = hybrid_config(config, number)
        for block in _blocks(entry.get("blocks"), num_layers, f"config.forms[{number}].blocks"):
            if block in of_block:
                raise InputError(f"config.forms: block {block} is in two entries; leave it in one of them")
            of_block[block] = form
    if config.hybrid.blocks:
        blocks, form = _blocks(config.hybrid.blocks, num_layers, "config.hybrid.blocks"), hybrid_config(config)
        shared = sorted(of_block.keys() & set(blocks))
        if shared and config.hybrid.blocks != "all":
            raise InputError(f"config.forms: blocks {shared} are in config.hybrid.blocks too; leave them in one")
        of_block = dict.fromkeys(blocks, form) | of_block
    return tuple(of_block.get(block, SOFTMAX) for block in range(num_layers))


def _blocks(blocks: Any, num_layers: int, place: str) -> tuple[int, ...]:
    if blocks == "all":
        return tuple(range(num_layers))
    if not isinstance(blocks, tuple | list) or not all(type(block) is int for block in blocks):
        raise InputError(f'{place} must be "all" or indices as (1, 3), found {blocks!r}')
    if tuple(blocks) != tuple(sorted(set(blocks))) or any(not 0 <= block < num_layers for block in blocks):
        raise InputError(f"{place} must be increasing block indices below {num_layers}, found {blocks!r}")
    return tuple(blocks)


def student_config(loaded: WanConfig, config: ml_collections.ConfigDict) -> WanConfig:
    """The architecture to train: the loaded one, or the loaded one with the configured forms of attention.

    Raises:
      InputError: a configured block does not exist; the loaded model is already hybrid, in another form or in other
        blocks; or chunks have their own noise levels, and a block is not causal.
    """
    wan = _with_forms(loaded, config)
    if config.noise_by_chunk:
        check_causal(wan, "config.noise_by_chunk")
    return wan


def _with_forms(loaded: WanConfig, config: ml_collections.ConfigDict) -> WanConfig:
    if not config.hybrid.blocks and not config.forms:
        hybrid = hybrid_config(config)
        if hybrid not in (HybridConfig(), loaded.hybrid):
            raise InputError(
                f"config.hybrid asks for {hybrid}, but config.hybrid.blocks is unset, which keeps the attention of "
                f"{config.init_from or config.preset}; set config.hybrid.blocks, or leave all of config.hybrid unset"
            )
        return loaded
    forms = wanted_forms(config, loaded.num_layers)
    converted = {block: form for block, form in enumerate(forms) if form != SOFTMAX}
    if loaded.hybrid_blocks:
        for block, form in converted.items():
            found = loaded.block_forms.of_block[block]
            if found == SOFTMAX:
                raise InputError(
                    f"{config.init_from}: config.hybrid.blocks or config.forms asks for block {block}, which has no "
                    f"feature maps there; choose among {loaded.hybrid_block_indices}, or distil that block too"
                )
            if found != form:
                raise InputError(
                    f"{config.init_from}: block {block} is already hybrid as {found}, but the configuration asks for "
                    f"{form}; give the same form, or leave config.hybrid.blocks and config.forms unset to keep the "
                    f"checkpoint's"
                )
    is_whole = config.hybrid.blocks == "all" and not config.forms
    return loaded.replace(hybrid_blocks="all" if is_whole else tuple(converted), hybrid=tuple(converted.values()))


def _model_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configured dtype, remat policy, attention implementation and adapters, as `WanTransformer` takes them."""
    return dict(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        attention_implementation=config.attention_implementation or None,
        lora=lora_config(config),
    )


def abstract_model(
    wan: WanConfig, config: ml_collections.ConfigDict
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graph definition, shapes of the parameters, their PartitionSpecs); allocates no parameters."""
    model_def, abstract = nnx.split(abstract_module(wan, **_model_options(config)))
    return model_def, nnx.to_pure_dict(abstract), param_specs(abstract)


def initial_model(config: ml_collections.ConfigDict, *, with_values: bool = True) -> InitialModel:
    """Loads or initialises the model that a run starts from, sharded on the mesh in use from the beginning.

    Adapters are always fresh: the model starts as its base.

    Without values, parameters are `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      InputError: the checkpoint cannot be read, or does not fit the configuration.
    """
    checkpoint, models = None, None
    if STAGES[config.stage].starts_from_model:
        checkpoint = open_checkpoint(config.init_from)
        if SAMPLING in checkpoint.metadata:
            raise InputError(
                f"config.init_from: {config.init_from} is a model of few steps, which has learned guidance and "
                f"perhaps only the noise levels of its steps; give the model that it was made from"
            )
        if STAGES[config.stage].few_steps and config.noise_by_chunk and NOISE_LEVELS not in checkpoint.metadata:
            raise InputError(
                f"config.init_from: {config.init_from} knows one noise level for all frames, but with "
                f"config.noise_by_chunk = True it makes videos chunk by chunk; finetune it with that field first"
            )
        loaded, codec, text_encoder = checkpoint.config, *(checkpoint.metadata[name] for name in METADATA)
        models = checkpoint.metadata.get(MODELS_PLACE)
    else:
        loaded = WAN_PRESETS[config.preset]
        source = open_data(config)
        codec, text_encoder = source.codec, source.text_encoder
    wan = student_config(loaded, config)
    check_heads(jax.sharding.get_mesh(), wan.num_heads)
    model_def, abstract, specs = abstract_model(wan, config)
    check_divisible(abstract, specs, jax.sharding.get_mesh())
    placed, key = shardings(specs), initialisation_key(config.seed)
    fresh_feature_maps = bool(wan.block_forms.stacks) and not loaded.hybrid_blocks
    if not with_values:
        params = abstract_arrays(abstract, placed)
        return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder, models)
    create = lambda: nnx.to_pure_dict(
        nnx.state(WanTransformer(wan, rngs=nnx.Rngs(params=key), **_model_options(config)))
    )
    if checkpoint is None:
        params = jax.jit(create, out_shardings=placed)()
        return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder, models)

    _, _, loaded_specs = abstract_model(loaded, config)
    params = load_sharded(config.init_from, checkpoint, shardings(loaded_specs))
    loaded_maps = params.pop("feature_maps", None)
    if wan.block_forms.stacks:
        fresh = lambda _: nnx.to_pure_dict(nnx.state(_feature_maps(wan, key)))
        make = fresh if fresh_feature_maps else lambda maps: chosen_maps(wan, loaded, maps)
        params["feature_maps"] = jax.jit(make, out_shardings=placed["feature_maps"])(loaded_maps)
    if config.lora.rank:
        adapters_of = lambda tree: split_tree(tree, is_adapter)[0]
        params = joined(params, jax.jit(lambda: adapters_of(create()), out_shardings=adapters_of(placed))())
    return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder, models)


def teacher_config(wan: WanConfig, config: ml_collections.ConfigDict) -> WanConfig:
    """The architecture of a student's teacher: the student's, mostly with softmax attention in all blocks."""
    is_own = STAGES[config.stage].own_teacher and not config.velocity.teacher
    return wan if is_own else wan.replace(hybrid_blocks=())


def abstract_teacher(wan: WanConfig, config: ml_collections.ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the teacher of a student, as shapes with shardings, and their shardings.

    The parameters have the compute dtype where the model allows it, because they are frozen.
    """
    dtype, teacher = jnp.dtype(config.dtype), teacher_config(wan, config)
    create = lambda: WanTransformer(teacher, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    state = nnx.state(nnx.eval_shape(create))
    placed = shardings(param_specs(state))
    return abstract_arrays(nnx.to_pure_dict(state), placed), placed


def load_teacher(model: InitialModel, config: ml_collections.ConfigDict, path: str) -> dict[str, Any]:
    """Parameters of the teacher whose velocity is learned, sharded on the mesh in use.

    Raises:
      InputError: the checkpoint cannot be read, or it is no softmax model of the student's architecture, codec and text
        encoder.
    """
    checkpoint = open_checkpoint(path)
    wanted = teacher_config(model.config, config)
    if checkpoint.config.hybrid_blocks and not wanted.hybrid_blocks:
        raise InputError(
            f"config.velocity.teacher: {path} has hybrid blocks, {checkpoint.config.hybrid_block_indices}; give the "
            f"softmax model that the student was made from"
        )
    found, expected = (
        {**dataclasses.asdict(wan), **names}
        for wan, names in (
            (checkpoint.config, {name: checkpoint.metadata[name] for name in METADATA}),
            (wanted, {"codec": model.codec, "text_encoder": model.text_encoder}),
        )
    )
    if different := [name for name in expected if found[name] != expected[name]]:
        name = different[0]
        raise InputError(
            f"config.velocity.teacher: expected the student's {name}, {expected[name]!r}, found {found[name]!r} in "
            f"{path}; give the softmax model that the student was made from"
        )
    shapes, placed = abstract_teacher(model.config, config)
    dtypes = {name: leaf.dtype for name, leaf in traverse_util.flatten_dict(shapes, sep=".").items()}
    return load_sharded(path, checkpoint, placed, dtypes)


def _feature_maps(wan: WanConfig, key: jax.Array) -> nnx.Module:
    sizes = dict(num_heads=wan.num_heads, head_dim=wan.head_dim)
    return make_feature_maps(wan.block_forms, **sizes, rngs=nnx.Rngs(params=key))


def chosen_maps(wan: WanConfig, loaded: WanConfig, feature_maps: Any) -> Any:
    """The "feature_maps" of a model that keeps some of the converted blocks of a loaded model."""

    def rows(stack: MapStack) -> Any:
        source = next(found for found in loaded.block_forms.stacks if found.config == stack.config)
        if source.blocks == stack.blocks:
            return source.of(feature_maps)
        kept = jnp.array([source.blocks.index(block) for block in stack.blocks])
        return jax.tree.map(lambda leaf: leaf[kept], source.of(feature_maps))

    return map_stacks(wan.block_forms, rows)


def check_data(source: Source, model: InitialModel, config: ml_collections.ConfigDict) -> None:
    """Raises InputError, naming the axis or field, if the model or the stage cannot use the source's examples."""
    check_examples(source, model.config, model.codec, model.text_encoder)
    if STAGES[config.stage].trains is not None and not config.lora.rank:
        _check_learns(source, model.config, config.stage)
    if source.kind not in STAGES[config.stage].data_kinds(config):
        able = ", ".join(f'"{name}"' for name, stage in STAGES.items() if source.kind in stage.data_kinds(config))
        raise InputError(
            f"config.data.path: {config.data.path} holds {source.kind} of a teacher, from which stages {able} can "
            f'learn, and "finetune" with config.velocity.teacher_weight = 1, but config.stage is {config.stage!r}; '
            f"prepare videos for it"
        )


def check_trajectories(source: Source, config: ml_collections.ConfigDict) -> None:
    """Raises InputError if trajectories are of another teacher than that of stage 1 or of the velocity's loss.

    Other stages may learn from any noisy latents. Biases and norms of the teacher are read for this.
    """
    stage, known = STAGES[config.stage], getattr(source, "teacher", None)
    if known is None or stage.own_teacher:
        return
    field = "velocity.teacher" if stage.teacher_path(config) else "init_from"
    path = stage.teacher_path(config) or config.init_from
    if (found := weights_identity(open_checkpoint(path))) != known:
        raise InputError(
            f"config.data.path: {config.data.path} has trajectories of a teacher with weights {known[:12]}, but the "
            f"teacher, config.{field} = {path}, has weights {found[:12]}; give the teacher that sampled them, or "
            f"prepare trajectories of this one"
        )


def check_examples(source: Source, wan: WanConfig, codec: str, text_encoder: str) -> None:
    """Raises InputError, naming the axis or field, if a model with this codec and text encoder cannot use the examples.

    Training and evaluation share this check.
    """
    text_tokens, text_width = source.null_text.shape
    expected = {"latent channels": wan.in_channels, "text width": wan.text_dim}
    for bucket in source.buckets:
        found = {"latent channels": bucket.latents_shape[-1], "text width": text_width}
        for axis in expected:
            if found[axis] != expected[axis]:
                raise InputError(
                    f"the examples have {axis} {found[axis]}, but the model expects {expected[axis]}; encode "
                    f"them with the model's codec {codec!r} and text encoder {text_encoder!r}"
                )
        for axis, size, patch in zip(("frames", "rows", "columns"), bucket.latents_shape, wan.patch_size, strict=False):
            if size % patch:
                raise InputError(
                    f"the examples have {size} latent {axis}, but the model's patches have {patch}; "
                    f"prepare them with another --size"
                )
    if text_tokens > wan.text_length:
        raise InputError(
            f"the examples have {text_tokens} text tokens, but the model takes at most {wan.text_length}; truncate them"
        )
    for name, expected_name in zip(METADATA, (codec, text_encoder), strict=True):
        if getattr(source, name) != expected_name:
            raise InputError(
                f"the examples are of {name} {getattr(source, name)!r}, but the model is of "
                f"{expected_name!r}; prepare them with the model's"
            )


def _check_learns(source: Source, wan: WanConfig, stage: str) -> None:
    """Raises InputError if there are no feature maps, or if those of some block would have no gradient."""
    forms = wan.block_forms
    if not forms.stacks:
        raise InputError(
            f"config.hybrid and config.forms: no block has feature maps, so stage {stage!r} has nothing to train; give "
            f"blocks a form with feature maps"
        )
    longest = max(bucket.latents_shape[0] // wan.patch_size[0] for bucket in source.buckets)
    for block in forms.converted:
        form = forms.of_block[block]
        if form.learned is not None and not form.keys(longest)[1].any():
            raise InputError(
                f"block {block}: its chunks of {form.chunk_frames} frames hold all {longest} latent "
                f"frames of the longest training examples, so no token attends linearly and its feature maps would "
                f"learn nothing; lower chunk_frames, or prepare longer videos"
            )


def calibration_batch(source: Source, config: ml_collections.ConfigDict) -> dict[str, jax.Array]:
    """One batch [1, B, ...] of as many examples as one forward pass takes, independent of the run's own batches."""
    with closing(RunData(source, config, seed=config.seed + 1, accumulation_steps=1)) as data:
        return data.on_mesh(next_batch(data, 1))
