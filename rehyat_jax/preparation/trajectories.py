"""Stores a few steps of a teacher's sampling trajectories, from which stage 1 can learn without any video."""

import functools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.diffusion.samplers import Coefficients
from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.generation.codecs import Codec
from rehyat_jax.generation.noise import initial_noise
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.text_encoders import read_prompts
from rehyat_jax.preparation.units import STORED, Hosts, Plan, UnitWriter, prepare
from rehyat_jax.weights.identity import weights_identity
from rehyat_jax.weights.load import checkpoint_files, open_checkpoint
from rehyat_jax.weights.umt5.spec import UMT5


def prepare_trajectories(
    checkpoint: Path,
    destination: Path,
    sampling: SamplingOptions,
    *,
    models: str | None,
    prompts: Path,
    noises: int,
    keep: int,
    dtype: str,
    unit: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the inputs of a checkpoint's model while it samples; see `prepare`.

    Trajectory i starts from noise i, which depends only on the seed and i. Successive trajectories use successive
    prompts. The trajectory's steps are divided into `keep` equal intervals, and one step of each is stored, always at
    the same relative position. That position is drawn at random for every trajectory. An example is the model's input
    at a stored step: noisy latents, the timestep and the prompt's embedding.

    Args:
      checkpoint: the teacher, a model checkpoint or a PyTorch folder.
      sampling: options of sampling; `batch` trajectories are sampled at once.
      models: folder or Hub name of the pipeline with the text encoder, see `Pipeline.from_pretrained`.
      prompts: a file with one prompt on each line.
      noises: number of trajectories for each prompt.
      keep: number of examples from each trajectory.
      dtype: a key of STORED.
      unit: number of trajectories in a unit.

    Raises:
      InputError: the checkpoint, the prompts, an option or the destination is wrong.
    """
    lines = read_prompts(prompts)
    pipeline = Pipeline.from_pretrained(models, sampling, student=checkpoint)
    sampling = pipeline.options
    if keep > sampling.steps:
        raise InputError(f"--keep {keep}: expected at most as many as --steps {sampling.steps}; lower it")
    solver = {name: getattr(sampling, name) for name in ("steps", "guidance_scale", "flow_shift", "sampler")}
    options = {
        **solver,
        **{"negative_prompt": sampling.negative_prompt, "seed": sampling.seed, "compute_dtype": sampling.dtype},
        **{"batch": sampling.batch, "keep": keep, "dtype": dtype, **fingerprints(checkpoint)},
        **sampling.approximations,
        "latents_shape": pipeline.latent_shape,
    }
    if (encoder := pipeline.found_encoder) is not None:
        folder, files = checkpoint_files(encoder.source, UMT5.part)
        options["text_encoder_files"] = fingerprint(files, folder, blocks=BLOCKS)
        tokenizer = encoder.prompt_tokenizer().file
        options["tokenizer_file"] = fingerprint([tokenizer], tokenizer.parent)
    inputs = lines * noises
    teacher = weights_identity(open_checkpoint(checkpoint))
    plan = Plan("trajectories", pipeline.codec_name, pipeline.text_encoder_name, options, inputs, unit, teacher)

    @functools.cache
    def embeddings() -> dict[str, np.ndarray]:
        texts = list(dict.fromkeys([*lines, "", sampling.negative_prompt]))
        return dict(zip(texts, pipeline.embed(texts, progress=True), strict=True))

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        for start in range(0, len(numbers), sampling.batch):
            batch = list(numbers[start : start + sampling.batch])
            # Padded, because a smaller batch would compile again.
            padded = batch + batch[-1:] * (sampling.batch - len(batch))
            text = np.stack([embeddings()[inputs[number]] for number in padded])
            kept = [kept_steps(sampling.seed, number, sampling.steps, keep) for number in batch]

            def store(step: int, at: Coefficients, latents, batch=batch, kept=kept, text=text) -> None:
                rows = [row for row, steps in enumerate(kept) if step in steps]
                values = np.asarray(latents) if rows else None
                for row in rows:
                    example = {"latents": values[row].astype(STORED[dtype]), "text": text[row].astype(STORED[dtype])}
                    example["timestep"] = np.asarray(at.timestep, np.float32)
                    name = f"trajectory {batch[row]}, step {step}"
                    where = {"trajectory": batch[row], "step": step, "sigma": float(at.sigma)}
                    try:
                        writer.add(example, {"name": name, "caption": inputs[batch[row]], **where})
                    except CorruptRecord as error:
                        writer.reject(name, "not finite", str(error))

            noise = initial_noise(sampling.seed, padded, pipeline.latent_shape)
            negative_text = np.stack([embeddings()[sampling.negative_prompt]] * len(padded))
            pipeline.sample_latents(text, negative_text, noise, on_step=store)
            progress.update(len(batch))

    def codec() -> Codec:
        pipeline.free("transformer")
        return pipeline.codec(progress=True)

    return prepare(destination, plan, fill, lambda: embeddings()[""], hosts, item="sample", codec=codec)


def fingerprints(checkpoint: Path) -> dict[str, str]:
    """Identifies a model, wherever it is stored, from the names, sizes and parts of its files.

    Returns:
      Two fingerprints:

      - "model" covers the beginnings and ends of files. For a folder these are all files, as in earlier versions. For a
        file these are the files that are read.
      - "model_blocks" covers `BLOCKS` blocks, spread over the files that are read.

    Raises:
      InputError: a file cannot be read.
    """
    folder, files = checkpoint_files(checkpoint)
    everything = [path for path in checkpoint.rglob("*") if path.is_file()] if checkpoint.is_dir() else files
    return {
        "model": fingerprint(everything, checkpoint if checkpoint.is_dir() else folder),
        "model_blocks": fingerprint(files, folder, blocks=BLOCKS),
    }


def kept_steps(seed: int, trajectory: int, steps: int, keep: int) -> list[int]:
    """The steps to store of a trajectory of `steps` steps: one in each of `keep` equal intervals."""
    place = np.random.default_rng((seed, trajectory)).uniform()
    return [int((part + place) * steps / keep) for part in range(keep)]
