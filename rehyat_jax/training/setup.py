"""From a configuration to the things a run is made of: data, and the model it starts from."""

from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.attention import FeatureMapConfig
from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.sources import make_source
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS, HybridConfig, WanConfig
from rehyat_jax.models.wan.modeling import FeatureMaps, WanTransformer, stacked
from rehyat_jax.parallel.mesh import check_heads
from rehyat_jax.parallel.sharding import abstract_arrays, check_divisible, param_specs, shardings
from rehyat_jax.training.keys import initialisation_key
from rehyat_jax.training.run_data import RunData
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.trouble import next_batch
from rehyat_jax.weights.load import load_sharded, open_checkpoint
from rehyat_jax.weights.model_checkpoint import METADATA


class InitialModel(NamedTuple):
    """Where a run starts.

    Attributes:
      model_def: graph definition of the `WanTransformer` with the run's compute dtype, remat policy and attention.
      config: its architecture.
      params: float32 parameters, a nested dict, cut as `specs` says along the mesh in use (`jax.set_mesh`).
      specs: the PartitionSpec of each.
      fresh_feature_maps: whether the feature maps were just initialised and need calibration.
      codec, text_encoder: names of what makes its latents and text embeddings.
    """

    model_def: nnx.GraphDef
    config: WanConfig
    params: dict[str, Any]
    specs: dict[str, Any]
    fresh_feature_maps: bool
    codec: str
    text_encoder: str


def open_data(config: ml_collections.ConfigDict) -> Source:
    """The configured training examples. Raises InputError if they cannot be read."""
    return make_source(config.data.source, config.data.path, config.seed)


def hybrid_config(config: ml_collections.ConfigDict) -> HybridConfig:
    """The hybrid attention that the configuration describes. Raises InputError if it describes none."""
    fields = config.hybrid.to_dict()
    del fields["blocks"]
    try:
        return HybridConfig(**{**fields, "feature_map": FeatureMapConfig(**fields["feature_map"])})
    except ValueError as error:
        raise InputError(f"config.hybrid: {error}") from error


def student_config(loaded: WanConfig, config: ml_collections.ConfigDict) -> WanConfig:
    """The architecture to train: as loaded, or with the configured blocks hybrid.

    Raises:
      InputError: there are no such blocks; or the loaded model is hybrid already, in another form or in other blocks.
    """
    blocks, hybrid = config.hybrid.blocks, hybrid_config(config)
    if not blocks:
        if hybrid not in (HybridConfig(), loaded.hybrid):
            raise InputError(
                f"config.hybrid asks for {hybrid}, but config.hybrid.blocks is unset, which keeps the attention of "
                f"{config.init_from or config.preset}; set config.hybrid.blocks, or leave all of config.hybrid alone"
            )
        return loaded
    try:
        wanted = loaded.replace(hybrid_blocks=blocks, hybrid=hybrid)
    except (ValueError, TypeError) as error:
        raise InputError(f"config.hybrid.blocks: {error}") from error
    if loaded.hybrid_blocks and loaded.hybrid != hybrid:
        raise InputError(
            f"{config.init_from}: already hybrid as {loaded.hybrid}, but config.hybrid is {hybrid}; give the same "
            f"form, or leave config.hybrid.blocks unset to keep the checkpoint's"
        )
    untrained = set(wanted.hybrid_block_indices) - set(loaded.hybrid_block_indices)
    if loaded.hybrid_blocks and untrained:
        raise InputError(
            f"{config.init_from}: config.hybrid.blocks asks for blocks {sorted(untrained)}, which have no feature maps "
            f"there; choose among {loaded.hybrid_block_indices}, or distil those blocks too"
        )
    return wanted


def build_model(wan: WanConfig, config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> WanTransformer:
    """A transformer that computes as the configuration says."""
    return WanTransformer(
        wan,
        rngs=rngs,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        attention_implementation=config.attention_implementation or None,
    )


def abstract_model(
    wan: WanConfig, config: ml_collections.ConfigDict
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """(graph definition, shapes of the parameters, their PartitionSpecs); no parameter is made."""
    model_def, abstract = nnx.split(nnx.eval_shape(lambda: build_model(wan, config, nnx.Rngs(0))))
    return model_def, nnx.to_pure_dict(abstract), param_specs(abstract)


def initial_model(config: ml_collections.ConfigDict, *, with_values: bool = True) -> InitialModel:
    """Loads or initialises the model that a run starts from, on the mesh in use; nothing is ever there in one piece.

    Without values, parameters are `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      InputError: the checkpoint cannot be read, or does not fit the configuration.
    """
    checkpoint = None
    if STAGES[config.stage].starts_from_model:
        checkpoint = open_checkpoint(config.init_from)
        loaded, codec, text_encoder = checkpoint.config, *(checkpoint.metadata[name] for name in METADATA)
    else:
        loaded = WAN_PRESETS[config.preset]
        source = open_data(config)
        codec, text_encoder = source.codec, source.text_encoder
    wan = student_config(loaded, config)
    check_heads(jax.sharding.get_mesh(), wan.num_heads)
    model_def, abstract, specs = abstract_model(wan, config)
    check_divisible(abstract, specs, jax.sharding.get_mesh())
    placed, key = shardings(specs), initialisation_key(config.seed)
    fresh_feature_maps = bool(wan.hybrid_blocks) and not loaded.hybrid_blocks
    if not with_values:
        params = abstract_arrays(abstract, placed)
        return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder)
    if checkpoint is None:
        create = lambda: nnx.to_pure_dict(nnx.state(build_model(wan, config, nnx.Rngs(params=key))))
        params = jax.jit(create, out_shardings=placed)()
        return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder)

    params = load_sharded(config.init_from, checkpoint, placed)
    if fresh_feature_maps:
        count = len(wan.hybrid_block_indices)
        maps = lambda: stacked(lambda rngs: FeatureMaps(wan, rngs=rngs), count, nnx.Rngs(params=key))
        create = lambda: nnx.to_pure_dict(nnx.state(maps()))
        params["feature_maps"] = jax.jit(create, out_shardings=placed["feature_maps"])()
    elif wan.hybrid_block_indices != loaded.hybrid_block_indices and wan.hybrid_blocks:
        kept = [loaded.hybrid_block_indices.index(block) for block in wan.hybrid_block_indices]
        keep = lambda maps: jax.tree.map(lambda leaf: leaf[jnp.array(kept)], maps)
        params["feature_maps"] = jax.jit(keep, out_shardings=placed["feature_maps"])(params["feature_maps"])
    return InitialModel(model_def, wan, params, specs, fresh_feature_maps, codec, text_encoder)


def check_data(source: Source, model: InitialModel, config: ml_collections.ConfigDict) -> None:
    """Raises InputError, naming the axis or field, if the model or the stage cannot take the source's examples."""
    text_tokens, text_width = source.null_text.shape
    expected = {"latent channels": model.config.in_channels, "text width": model.config.text_dim}
    for bucket in source.buckets:
        found = {"latent channels": bucket.latents_shape[-1], "text width": text_width}
        for axis in expected:
            if found[axis] != expected[axis]:
                raise InputError(
                    f"the training examples have {axis} {found[axis]}, but the model expects {expected[axis]}; encode "
                    f"them with the model's codec {model.codec!r} and text encoder {model.text_encoder!r}"
                )
        for axis, size, patch in zip(
            ("frames", "rows", "columns"), bucket.latents_shape, model.config.patch_size, strict=False
        ):
            if size % patch:
                raise InputError(
                    f"the training examples have {size} latent {axis}, but the model's patches have {patch}; "
                    f"prepare them with another --size"
                )
    if text_tokens > model.config.text_length:
        raise InputError(
            f"the training examples have {text_tokens} text tokens, but the model takes at most "
            f"{model.config.text_length}; cut them"
        )
    for name in METADATA:
        if getattr(source, name) != getattr(model, name):
            raise InputError(
                f"the training examples are of {name} {getattr(source, name)!r}, but the model is of "
                f"{getattr(model, name)!r}; prepare them with the model's"
            )
    if source.kind not in STAGES[config.stage].data_kinds:
        able = " or ".join(f'"{name}"' for name, stage in STAGES.items() if source.kind in stage.data_kinds)
        raise InputError(
            f"config.data.path: {config.data.path} holds {source.kind} of a teacher, which only stage {able} can "
            f"learn from, but config.stage is {config.stage!r}; prepare videos for it"
        )


def calibration_batch(source: Source, config: ml_collections.ConfigDict) -> dict[str, jax.Array]:
    """As many examples as go through the model at once, drawn apart from the run's own batches; [1, B, ...]."""
    with closing(RunData(source, config, seed=config.seed + 1, accumulation_steps=1)) as data:
        return data.on_mesh(next_batch(data, 1))
