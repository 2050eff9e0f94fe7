"""Evaluates a student against its teacher, from the same data, the same noise and the same prompts."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rehyat_jax.data.pipeline import Source
from rehyat_jax.evaluation.attention import compare_attention
from rehyat_jax.evaluation.cost import check_topology, flops_by_duration, static_by_duration
from rehyat_jax.evaluation.draws import Draws, Examples, read_examples
from rehyat_jax.evaluation.options import EvaluationOptions, check_counts, open_examples
from rehyat_jax.evaluation.pair import STUDENT, TEACHER, Side, open_pair
from rehyat_jax.evaluation.results import Evaluation
from rehyat_jax.evaluation.sampled import PICTURE, Sampler
from rehyat_jax.evaluation.velocity import compare_velocities
from rehyat_jax.files.write import check_place
from rehyat_jax.generation.codecs import LATENT_SIZES
from rehyat_jax.generation.options import DEFAULT_SHIFT
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.parallel.mesh import AXES, check_batch, check_heads, make_mesh
from rehyat_jax.training.setup import check_examples
from rehyat_jax.weights.load import load_wan
from rehyat_jax.weights.model_checkpoint import METADATA


def evaluate_models(
    teacher: Path,
    student: Path,
    options: EvaluationOptions,
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures a student against its teacher. docs/evaluation.md explains every figure.

    Args:
      teacher, student: model checkpoints or PyTorch folders.
      options: what to measure.
      folder: place of the samples, which a repeated call reuses, and of their picture. None writes nothing.
      progress: show rates and remaining times.

    Raises:
      InputError: the models are no pair, the data are not theirs, an option is wrong, the folder has other samples, or
        it cannot be written. All of this is found before anything is measured.
    """
    # --------------------------------------------------------------------------------------------------------- checks
    sides = open_pair(teacher, student)
    check_counts(options)
    if options.topology is not None:
        check_topology(options.topology)
    source = open_examples(options)
    first = sides[STUDENT]
    check_examples(source, first.config, *(first.metadata[name] for name in METADATA))
    examples = read_examples(source, options.examples, options.sampling.seed)
    if folder is not None:
        check_place(folder / PICTURE)
    mesh = _mesh(options, first.config)
    sampler = Sampler.open(sides, options, source, folder) if options.samples else None

    # --------------------------------------------------------------------------------------------- velocity, attention
    found = Evaluation(about=_about(sides, options, examples, source))
    found.add(_compare_loaded(sides, options, examples, mesh, progress))

    # --------------------------------------------------------------------------------------------------------- samples
    if sampler is not None:
        found.add(sampler.compare(progress=progress))

    # ------------------------------------------------------------------------------------------------------------ cost
    # Last, because compiling for other chips hides this machine's own TPU.
    frames, *size, _ = examples.latents.shape[1:]
    models = {name: side.config for name, side in sides.items()}
    where = [frames * multiple for multiple in options.durations], (size[0], size[1])
    found.curves["flops_by_duration"] = flops_by_duration(models, *where)
    if options.topology is not None:
        found.add(static_by_duration(models, *where, options.topology))
    return found


def _mesh(options: EvaluationOptions, config: WanConfig) -> Mesh | None:
    """The mesh of all devices; None for one device. Raises InputError if it cannot shard a batch or the heads."""
    if not options.sampling.mesh:
        return None
    mesh = make_mesh(dict.fromkeys(AXES, 1) | dict(options.sampling.mesh))
    check_batch(mesh, options.sampling.batch)
    check_heads(mesh, config.num_heads)
    return mesh


def _compare_loaded(
    sides: dict[str, Side], options: EvaluationOptions, examples: Examples, mesh: Mesh | None, progress: bool
) -> Evaluation:
    """The comparisons for which both models are in memory."""
    sampling = options.sampling
    dtype = jnp.dtype(sampling.dtype or LATENT_SIZES[sides[STUDENT].metadata["codec"]].default_dtype)
    draws = Draws(
        examples,
        options.levels,
        sampling.flow_shift or DEFAULT_SHIFT,
        sampling.seed,
        sampling.batch if mesh is not None else min(sampling.batch, len(examples.latents)),
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        models = {name: load_wan(side.path, dtype=dtype, param_dtype=dtype) for name, side in sides.items()}
        found = compare_velocities(_applied(models[TEACHER]), _applied(models[STUDENT]), draws, progress=progress)
        found.add(compare_attention(models[TEACHER], models[STUDENT], draws, progress=progress))
    return found


def _applied(model: WanTransformer) -> tuple[Any, Any]:
    graphdef, params = nnx.split(model)
    return apply_model(graphdef), params


def _about(sides: dict[str, Side], options: EvaluationOptions, examples: Examples, source: Source) -> dict[str, Any]:
    packages = ("rehyat_jax", "jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0]
    kept = dataclasses.asdict(options)
    return {
        "models": {
            name: {
                "path": str(side.path),
                "fingerprint": side.fingerprint,
                "forms": [form.label for form in side.config.block_forms.of_block],
                **side.metadata,
            }
            for name, side in sides.items()
        },
        "options": kept | {"prompts": options.prompts and str(options.prompts)},
        "data": {
            "kind": source.kind,
            "examples": len(examples.latents),
            "latents_shape": list(examples.latents.shape[1:]),
        },
        "versions": {"python": platform.python_version(), **versions},
        "device": device.device_kind if device.platform != "cpu" else f"cpu ({platform.machine()})",
        "intervals": "95%, percentile bootstrap over examples or videos; Frechet distances: basic bootstrap",
    }
