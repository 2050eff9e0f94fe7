"""Measures the attention error of every block in one form: python -m rehyat_jax.selection.measure --config FILE ...

`rehyat_jax.surgery` runs this command for every candidate form, after its stage 1. It compares each block's attention
in the form with softmax attention, on the block's inputs in the softmax teacher. All candidates meet the same held-out
examples, the same noise and the same noise levels.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.sources import SOURCES, make_held_out
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.attention_error import attention_differences
from rehyat_jax.evaluation.bootstrap import Estimate, Resampling
from rehyat_jax.evaluation.draws import Draws, read_examples
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.generation.options import number
from rehyat_jax.models.student import make_student
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.training.command_line import read_config_file
from rehyat_jax.training.config import check_config
from rehyat_jax.training.continuation import code_version
from rehyat_jax.training.setup import check_examples, wanted_forms
from rehyat_jax.weights.load import load_wan, open_checkpoint
from rehyat_jax.weights.model_checkpoint import METADATA

ERRORS = {"hybrid": "error", "window_only": "error_window_only", "exact": "error_exact"}
"""The figure of each result of `attention_differences`."""

LEVELS = 10
"""Number of noise levels, see `evaluation.draws`."""

SEED = 0
"""Seed of the examples and their noise."""


def held_out_source(config: ml_collections.ConfigDict, data: str) -> Source:
    """The examples on which errors are measured.

    Args:
      config: configuration of stage 1.
      data: a kind of data that needs no folder, a folder of prepared examples, or "" for the held-out examples of the
        configuration's kind.

    Raises:
      InputError: the configuration's data are a folder and none is given; or the examples cannot be read or are not
        those of the model.
    """
    if not data and config.data.source == "prepared":
        raise InputError(
            "--data: expected a folder of examples that are not in config.data.path, found none; prepare some videos "
            "apart and give their folder"
        )
    data = data or config.data.source
    known = data in SOURCES and data != "prepared"
    source = make_held_out(data, "", SEED) if known else make_held_out("prepared", data, SEED)
    model = open_checkpoint(config.init_from)
    check_examples(source, model.config, *(model.metadata[name] for name in METADATA))
    return source


def student(config: ml_collections.ConfigDict, model: Path | None) -> WanTransformer:
    """The result of stage 1, or the teacher with the configured forms if they have nothing to train."""
    options = dict(dtype=jnp.dtype(config.dtype), attention_implementation=config.attention_implementation or None)
    if model is not None:
        return load_wan(model, **options)
    teacher = load_wan(config.init_from, **options)
    return make_student(teacher, dict(enumerate(wanted_forms(config, teacher.config.num_layers))))


def block_errors(model: WanTransformer, draws: Draws) -> dict[str, Estimate]:
    """Relative L1 errors of every block's attention, each with the shape [blocks], by the names in `ERRORS`.

    Args:
      model: a student whose blocks are all converted, and whose other parameters are the teacher's.
      draws: the inputs; every example is seen at one noise level.
    """
    model_def, params = nnx.split(model)
    measure = jax.jit(lambda params, inputs: attention_differences(nnx.merge(model_def, params), inputs))
    found = [
        jax.device_get(measure(params, (draw.latents, draw.timestep, draw.text)))
        for draw in tqdm(draws.one_level(), total=draws.batches, desc="attention error", unit="batch")
    ]
    # [blocks, examples]; the last batch repeats its last example.
    count = len(draws.examples.latents)
    joined = {name: np.concatenate([part[name] for part in found], axis=1)[:, :count].T for name in found[0]}
    resampling = Resampling(count)
    return {figure: resampling.ratio(joined[name], joined["softmax"]) for name, figure in ERRORS.items()}


def measure(config: ml_collections.ConfigDict, model: Path | None, data: str, examples: int) -> dict[str, Any]:
    """The errors of a candidate's blocks for JSON, with the hardware and the version of the code.

    Raises:
      InputError: a model or the examples cannot be read, or an error is not finite.
    """
    found = read_examples(held_out_source(config, data), examples, SEED)
    batch = config.batch_size // config.accumulation_steps
    with jax.set_mesh(make_mesh(config.mesh)):
        errors = block_errors(student(config, model), Draws(found, LEVELS, config.flow_shift, SEED, batch))
    if not np.isfinite(errors["error"].value).all():
        raise InputError(f"{model}: its attention error is not finite; look at the losses of its training run")
    return {
        **{name: error.to_json() for name, error in errors.items()},
        "examples": len(found.latents),
        "hardware": describe_environment(),
        "code": code_version(),
    }


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, measures and writes; returns the exit code, 2 if the user's input is wrong."""
    example = "--config runs/surgery/candidates/window_3_1_5fb9e9/config.py --out errors.json"
    parser = CommandParser("selection.measure", __doc__, example)
    parser.add_argument("--config", required=True, help="configuration of the candidate's stage 1")
    parser.add_argument("--model", type=Path, help="its result; none for a form without parameters to train")
    parser.add_argument("--data", default="", help="held-out examples: digits, or a folder of prepared ones")
    parser.add_argument("--examples", type=number(int, 2, 1_000_000), default=64, help="number of examples")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)

    def run() -> None:
        config = read_config_file(arguments.config)
        check_config(config)
        found = measure(config, arguments.model, arguments.data, arguments.examples)
        with reported_write_errors(arguments.out), written_whole(arguments.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        print_message(f"wrote {arguments.out}", result=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
