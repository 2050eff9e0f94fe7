"""From a configuration to the things a run is made of: data, and the model it starts from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.attention import FeatureMapConfig
from rehyat_jax.data.digits import DigitVideos
from rehyat_jax.data.latent_files import LatentFiles
from rehyat_jax.data.pipeline import Source, batches
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS, HybridConfig, WanConfig
from rehyat_jax.models.wan.modeling import FeatureMaps, WanTransformer, stacked
from rehyat_jax.parallel.mesh import check_heads, part_of_process
from rehyat_jax.parallel.sharding import abstract_arrays, check_divisible, global_batches, param_specs, shardings
from rehyat_jax.training.keys import initialisation_key
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


def make_source(config: ml_collections.ConfigDict) -> Source:
    """The configured training examples. Raises InputError if they cannot be read."""
    if config.data.source == "latent_files" and not config.data.path:
        raise InputError('config.data.path is empty; source "latent_files" reads a folder of encoded videos: give it')
    if config.data.source == "digits":
        return DigitVideos(split="train", seed=config.seed)
    return LatentFiles(config.data.path)


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
    codec, text_encoder, checkpoint = "wan_vae", "umt5", None
    if config.stage != "pretrain":
        checkpoint = open_checkpoint(config.init_from)
        loaded, codec, text_encoder = checkpoint.config, *(checkpoint.metadata[name] for name in METADATA)
    else:
        loaded = WAN_PRESETS[config.preset]
        if config.data.source == "digits":
            codec, text_encoder = "space_to_depth", "word_vectors"
    wan = student_config(loaded, config)
    check_heads(jax.sharding.get_mesh(), wan)
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


def check_data(source: Source, model: InitialModel) -> None:
    """Raises InputError, naming the axis, if the model cannot take the source's examples."""
    example, config = source[0], model.config
    found = {"latent channels": example["latents"].shape[-1], "text width": example["text"].shape[-1]}
    expected = {"latent channels": config.in_channels, "text width": config.text_dim}
    for axis in expected:
        if found[axis] != expected[axis]:
            raise InputError(
                f"the training examples have {axis} {found[axis]}, but the model expects {expected[axis]}; encode them "
                f"with the model's codec {model.codec!r} and text encoder {model.text_encoder!r}"
            )
    if example["text"].shape[0] > config.text_length:
        raise InputError(
            f"the training examples have {example['text'].shape[0]} text tokens, but the model takes at most "
            f"{config.text_length}; cut them"
        )


def calibration_batch(source: Source, config: ml_collections.ConfigDict) -> dict[str, jax.Array]:
    """As many examples as go through the model at once, drawn apart from the run's own batches; [1, B, ...]."""
    part, parts = part_of_process(jax.sharding.get_mesh())
    size = config.batch_size // config.accumulation_steps
    data = batches(source, batch_size=size, seed=config.seed + 1, accumulation_steps=1, part=part, parts=parts)
    batch = global_batches(next(data), parts)
    data.close()
    return batch
