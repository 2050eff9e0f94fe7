"""Stores a few steps of a teacher's sampling trajectories, from which stage 1 can learn without any video."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.diffusion.samplers import Coefficients
from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.noise import initial_noise
from rehyat_jax.generation.options import SamplingOptions, open_model
from rehyat_jax.preparation.captions import LARGEST_LIST
from rehyat_jax.preparation.units import STORED, Hosts, Plan, UnitWriter, prepare
from rehyat_jax.weights.load import checkpoint_files


def prepare_trajectories(
    checkpoint: Path,
    destination: Path,
    sampling: SamplingOptions,
    *,
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
      prompts: a file with one prompt on each line.
      noises: number of trajectories for each prompt.
      keep: number of examples from each trajectory.
      dtype: a key of STORED.
      unit: number of trajectories in a unit.

    Raises:
      InputError: the checkpoint, the prompts, an option or the destination is wrong.
    """
    if keep > sampling.steps:
        raise InputError(f"--keep {keep}: expected at most as many as --steps {sampling.steps}; lower it")
    lines = read_prompts(prompts)
    opened = open_model(checkpoint, sampling)
    embeddings = {line: opened.text_encoder([line])[0] for line in lines}
    null_text = opened.text_encoder([""])[0]
    negative_text = opened.text_encoder([sampling.negative_prompt])[0]
    options = {
        **sampling.solver,
        **{"negative_prompt": sampling.negative_prompt, "seed": sampling.seed, "compute_dtype": sampling.dtype},
        **{"batch": sampling.batch, "keep": keep, "dtype": dtype, **fingerprints(checkpoint)},
        "latents_shape": opened.latent_shape,
    }
    inputs = lines * noises
    plan = Plan("trajectories", opened.codec_name, opened.text_encoder_name, options, inputs, unit)
    model = None

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        nonlocal model
        model = model or opened.load()
        for start in range(0, len(numbers), sampling.batch):
            batch = list(numbers[start : start + sampling.batch])
            # Padded, because a smaller batch would compile again.
            padded = batch + batch[-1:] * (sampling.batch - len(batch))
            text = np.stack([embeddings[inputs[number]] for number in padded])
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

            generate_latents(
                model,
                text,
                np.stack([negative_text] * len(padded)),
                initial_noise(sampling.seed, padded, opened.latent_shape),
                on_step=store,
                **sampling.solver,
            )
            progress.update(len(batch))

    with opened.on_mesh():
        return prepare(destination, plan, fill, lambda: null_text, hosts, item="sample")


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


def read_prompts(file: Path) -> list[str]:
    """The non-empty lines of a file. Raises InputError if there are none, or the file is not UTF-8 text."""
    if file.exists():
        check_regular_file(file, largest_bytes=LARGEST_LIST)
    try:
        lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a text file with one prompt a line, found: {error}; check it") from error
    if not any(lines):
        raise InputError(f"{file}: expected one prompt a line, found none; add some")
    return [line for line in lines if line]


def kept_steps(seed: int, trajectory: int, steps: int, keep: int) -> list[int]:
    """The steps to store of a trajectory of `steps` steps: one in each of `keep` equal intervals."""
    place = np.random.default_rng((seed, trajectory)).uniform()
    return [int((part + place) * steps / keep) for part in range(keep)]
