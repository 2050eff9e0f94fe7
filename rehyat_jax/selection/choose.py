"""Attention Surgery from end to end: candidates, their costs and errors, the choice, and the files that show it."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from rehyat_jax.cli import print_message
from rehyat_jax.errors import InputError
from rehyat_jax.files.lock import locked
from rehyat_jax.files.write import check_place, reported_write_errors
from rehyat_jax.selection.candidate_runs import check_definition, read_figures, run_candidates
from rehyat_jax.selection.candidates import Candidate, make_candidates, with_forms
from rehyat_jax.selection.config_file import write_config
from rehyat_jax.selection.costs import COSTS, attention_sizes, check_cost, form_costs
from rehyat_jax.selection.measure import held_out_source
from rehyat_jax.selection.page import write_page
from rehyat_jax.selection.record import Result, solve, write_json
from rehyat_jax.selection.solve import Problem, check_budget
from rehyat_jax.training.setup import open_data
from rehyat_jax.weights.load import open_checkpoint

JSON_FILE, PAGE, PICTURE, CONFIG = "surgery.json", "surgery.md", "surgery.png", "config.py"


@dataclasses.dataclass(frozen=True)
class Request:
    """What to choose, and from what.

    Attributes:
      config: configuration of stage 1.
      workdir: directory of the runs and results.
      budget: fraction of the cost of softmax in all blocks.
      forms: the entries of the candidates, see `make_candidates`.
      cost, topology: see `form_costs`.
      latents: (frames, height, width) whose cost counts; None for those of the training examples.
      data, examples: see `selection.measure`.
      jobs: processes at a time; None for the default.
      command: the command line.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    budget: float
    forms: Sequence[Mapping[str, Any]]
    cost: str
    topology: str
    latents: tuple[int, int, int] | None
    data: str
    examples: int
    jobs: int | None
    command: str


def choose(request: Request) -> dict[str, str]:
    """Trains and measures the candidates, chooses, and writes the results.

    Returns:
      Label of each candidate that failed -> the reason. Nothing is chosen if one did.

    Raises:
      InputError: something in the request is wrong or impossible, or cannot be read or written.
      RunStoppedError: SIGTERM asked to stop. KeyboardInterrupt: Ctrl-C did. The same call resumes.
    """
    config, workdir = request.config, request.workdir

    # --------------------------------------------------------------------------------------------------------- checks
    if config.stage != "distill":
        raise InputError(f'config.stage: expected "distill", found {config.stage!r}; give a configuration of stage 1')
    check_budget(request.budget, 0)
    check_cost(request.cost, request.topology)
    model = open_checkpoint(config.init_from).config
    if model.hybrid_blocks:
        raise InputError(f"config.init_from: {config.init_from} is already hybrid; give its softmax teacher")
    shapes = [bucket.latents_shape[:3] for bucket in open_data(config).buckets]
    longest = max(frames for frames, _, _ in shapes) // model.patch_size[0]
    latents = request.latents or max(shapes, key=math.prod)
    sizes = attention_sizes(model, latents)
    candidates, skipped = make_candidates(config, request.forms, longest)
    held_out_source(config, request.data)
    for name in (JSON_FILE, PAGE, PICTURE, CONFIG):
        check_place(workdir / name)

    with locked(workdir):
        check_definition(config, request.data, request.examples, workdir)

        # -------------------------------------------------------------------------------------------------------- costs
        of_form, too_large = form_costs(candidates, sizes, request.cost, request.topology, workdir)
        skipped |= too_large
        for label, reason in skipped.items():
            print_message(f"skipping {label}: {reason}")
        check_budget(request.budget, min(of_form.values()) / of_form[candidates[0]])

        # ------------------------------------------------------------------------------------------------------- errors
        candidates = tuple(of_form)
        failures = run_candidates(
            config, candidates[1:], workdir, data=request.data, examples=request.examples, jobs=request.jobs
        )
        if failures:
            return failures
        figures = [read_figures(workdir, candidate, model.num_layers) for candidate in candidates[1:]]

        # ------------------------------------------------------------------------------------------------------- choice
        problem, intervals = _problem(candidates, figures, of_form, model.num_layers)
        about = {
            "command": request.command,
            "teacher": config.init_from,
            "cost": request.cost,
            "cost_words": COSTS[request.cost],
            "topology": None if request.cost == "flops" else request.topology,
            "latents": "x".join(map(str, latents)),
            "examples": figures[0]["examples"],
            "forms": {candidate.label: candidate.fields for candidate in candidates},
            "cost_of_a_block": {candidate.label: of_form[candidate] for candidate in candidates},
            "skipped": skipped,
            "hardware": figures[0]["hardware"],
            "code": figures[0]["code"],
        }
        result = solve(problem, intervals, request.budget, about)
        _write(result, candidates, request)
    return {}


def _problem(
    candidates: Sequence[Candidate], figures: Sequence[dict[str, Any]], of_form: dict[Candidate, int], blocks: int
) -> tuple[Problem, np.ndarray]:
    """The problem, and the ends of the errors' intervals, [forms, blocks, 2]; softmax has no error."""
    ends = [[[0.0] * blocks] * 3, *([found["error"][end] for end in ("value", "low", "high")] for found in figures)]
    array = np.array(ends)
    # Every block has the same sizes, so a form costs the same in all of them.
    costs = np.array([of_form[candidate] / of_form[candidates[0]] / blocks for candidate in candidates])
    problem = Problem(tuple(one.label for one in candidates), array[:, 0], np.repeat(costs[:, None], blocks, axis=1))
    return problem, np.moveaxis(array[:, 1:], 1, 2)


def _write(result: Result, candidates: Sequence[Candidate], request: Request) -> None:
    """Writes all results, and prints the choice."""
    workdir, chosen = request.workdir, result.choice.forms
    converted = [form for form in dict.fromkeys(chosen) if form > 0]  # 0 is softmax
    entries = tuple(
        {"blocks": tuple(block for block, found in enumerate(chosen) if found == form), **candidates[form].fields}
        for form in converted
    )
    config = with_forms(request.config, entries)
    has_maps = any(candidates[form].form.learned is not None for form in converted)
    command = shlex.join(
        ["python", "-m", "rehyat_jax.train", f"--config={workdir / CONFIG}", f"--workdir={workdir / 'distill'}"]
    )
    if has_maps:
        finetune = "then finetune with --config.init_from=" + shlex.quote(str(workdir / "distill/model"))
        result.about["next"] = [command, f"# {finetune}; the model has its forms"]
    else:
        changes = [f"--config.init_from={config.init_from}", f"--config.forms={entries!r}"]
        result.about["next"] = [
            "# no form has parameters for stage 1: finetune with these options",
            shlex.join(changes),
        ]
    summary = ", ".join(f"{block} {label}" for block, label in enumerate(result.labels))
    description = (
        f"Attention Surgery's choice at budget {result.budget:g} ({result.about['cost_words']}).\n\n    {command}\n\n"
        f"Written by:\n\n    {request.command}"
    )
    write_config(config, description, workdir / CONFIG)
    with reported_write_errors(workdir):
        write_page(result, workdir / PAGE, workdir / PICTURE)
        write_json(result, workdir / JSON_FILE)
    print_message(f"chosen: {summary}", result=True)
    mean = result.choice.error / len(chosen)
    print_message(f"cost {result.choice.cost:.4f}, mean error {mean:.4f}; {result.choice.status}", result=True)
    print_message(f"see {workdir / PAGE}; train with {workdir / CONFIG}", result=True)
