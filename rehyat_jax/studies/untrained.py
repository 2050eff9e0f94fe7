"""Writes the model that a training run would start from: python -m rehyat_jax.studies.untrained --config FILE.py ...

`rehyat_jax.study` runs this command in place of a stage 1 that has nothing to train, because no form of attention in it
has parameters: windows alone. The model is the teacher with these forms.

Options: --config, --config.field=value and --workdir, as for `rehyat_jax.train`. The model is `model/` in the workdir.

Example:

  python -m rehyat_jax.studies.untrained --config configs/demo_distill.py --workdir runs/window \\
      --config.init_from=assets/demo_teacher --config.forms="({'blocks': 'all', 'kind': 'window'},)"
"""

import sys
from pathlib import Path

import jax
import ml_collections

from rehyat_jax.cli import print_message, printed_help, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.train import parse_arguments
from rehyat_jax.training.setup import initial_model, wanted_forms
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights.load import open_checkpoint
from rehyat_jax.weights.model_checkpoint import save_model


def has_parameters_to_train(config: ml_collections.ConfigDict) -> bool:
    """False for a configuration of stage 1 whose forms of attention have no parameters.

    Raises:
      InputError: the initial model cannot be read, or an entry of the forms names blocks that it does not have.
    """
    if not STAGES[config.stage].converts:
        return True
    forms = wanted_forms(config, open_checkpoint(config.init_from).config.num_layers)
    return any(form.learned is not None for form in forms)


def write_untrained(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Writes `workdir/model`, the model that a run would start from, and returns its path.

    Raises:
      InputError: the run would train something, the initial model cannot be read, or the result cannot be written.
    """
    if has_parameters_to_train(config):
        raise InputError(
            "config.forms: expected forms of attention without parameters in all converted blocks, found others; "
            "use rehyat_jax.train"
        )
    with jax.set_mesh(make_mesh(config.mesh)):
        model = initial_model(config)
    place = workdir / "model"
    with reported_write_errors(place):
        save_model(
            place,
            model.config,
            model.params,
            codec=model.codec,
            text_encoder=model.text_encoder,
            models=model.models,
        )
    return place


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and writes; returns the exit code, 2 if the user's input is wrong."""
    argv = sys.argv if argv is None else ["untrained", *argv]
    if printed_help(argv, __doc__):
        return 0

    def run() -> None:
        arguments = parse_arguments(argv)
        print_message(f"wrote {write_untrained(arguments.config, arguments.workdir)}", result=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
