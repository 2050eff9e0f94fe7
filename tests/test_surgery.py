"""Attention Surgery: the choice of forms is optimal, budgets are checked, and `train` takes the result."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import digits_config, pretrained, tiny_config, write_config

from rehyat_jax import surgery as command
from rehyat_jax import train
from rehyat_jax.attention.form import make_form
from rehyat_jax.attention.forms.base import Sizes
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.forms.linear import LinearForm
from rehyat_jax.attention.forms.softmax import SOFTMAX, SoftmaxForm
from rehyat_jax.attention.forms.strided import StridedForm
from rehyat_jax.attention.forms.window import WindowForm
from rehyat_jax.errors import InputError
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.selection import choose, costs
from rehyat_jax.selection.candidate_runs import candidate_folder, check_definition, read_figures
from rehyat_jax.selection.candidates import DEFAULT_FORMS, Candidate, make_candidates, parsed_entries, with_forms
from rehyat_jax.selection.config_file import write_config as write_config_file
from rehyat_jax.selection.page import markdown
from rehyat_jax.selection.record import solve
from rehyat_jax.selection.solve import (
    TOLERANCE,
    Problem,
    best_choice,
    best_homogeneous,
    check_budget,
    conversions,
    front,
    homogeneous_choice,
)
from rehyat_jax.training.setup import initial_model, student_config, wanted_forms
from rehyat_jax.weights.load import open_checkpoint

LABELS = ("softmax", "wide", "narrow", "linear")


def random_problem(seed, blocks=4):
    """Errors and costs that differ in every block."""
    rng = np.random.default_rng(seed)
    errors, costs = rng.uniform(0.05, 1, (4, blocks)), rng.uniform(0.1, 1, (4, blocks))
    errors[0], costs[0] = 0, rng.uniform(1, 2, blocks)
    return Problem(LABELS, errors, costs / costs[0].sum())


def brute_force(problem, budget):
    """The least error over all choices within the budget."""
    blocks = np.arange(problem.errors.shape[1])
    totals = (
        (problem.errors[list(chosen), blocks].sum(), problem.costs[list(chosen), blocks].sum())
        for chosen in itertools.product(range(len(problem.labels)), repeat=len(blocks))
    )
    return min(error for error, cost in totals if cost <= budget)


# --------------------------------------------------------------------------------------------------------- the choice
@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_within_the_budget_has_a_lower_error(seed):
    problem = random_problem(seed)
    for budget in np.linspace(problem.least_cost + 1e-4, 1, 5):
        found = best_choice(problem, budget)
        assert found.cost <= budget + TOLERANCE and found.gap == 0 and "ptimal" in found.status
        # Costs of other choices are millionths apart with probability 1e-4, so tolerances play no part.
        assert found.error == pytest.approx(brute_force(problem, budget), abs=1e-12)


def test_the_whole_budget_keeps_softmax_and_the_least_one_takes_the_cheapest_forms():
    problem = random_problem(0)
    assert best_choice(problem, 1.0).forms == (0, 0, 0, 0)
    assert best_choice(problem, problem.least_cost).forms == tuple(problem.costs.argmin(axis=0))


def test_one_form_converts_the_blocks_of_lowest_error_first_until_the_budget_holds():
    errors = np.array([[0, 0, 0], [0.3, 0.1, 0.2], [0.5, 0.5, 0.4]])
    costs = np.array([[1, 1, 1], [0.4, 0.4, 0.4], [0.1, 0.1, 0.1]]) / 3
    problem = Problem(("softmax", "wide", "narrow"), errors, costs)
    assert [choice.forms for choice in conversions(problem, 1)] == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1)]
    assert homogeneous_choice(problem, 1, 0.8).forms == (0, 1, 0)  # costs 2.4 / 3 exactly
    assert homogeneous_choice(problem, 1, 0.79).forms == (0, 1, 1)
    assert homogeneous_choice(problem, 1, 0.3) is None
    assert homogeneous_choice(problem, 2, 0.45).forms == (2, 0, 2)
    assert homogeneous_choice(problem, 2, 0.3).forms == (2, 2, 2)
    assert best_homogeneous(problem, 0.79).forms == (0, 1, 1)
    assert best_homogeneous(problem, 0.05) is None


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_one_form_is_better_than_the_front(seed):
    problem = random_problem(seed)
    found = front(problem, 7)
    assert [choice.cost for choice in found] == sorted(choice.cost for choice in found)
    assert found[-1].error == 0
    for form in (1, 2, 3):
        for one in conversions(problem, form):
            if one.cost <= 1:
                reachable = [choice.error for choice in found if choice.cost <= one.cost + TOLERANCE]
                assert min(reachable) <= one.error + 1e-9


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (1.0, "nothing needs converting"),
        (1.5, "nothing needs converting"),
        (0.0, "expected a fraction between 0 and 1, found 0"),
        (float("nan"), "expected a fraction between 0 and 1"),
        (0.2, "expected at least 0.25, which the cheapest form in every block costs, found 0.2"),
    ],
)
def test_an_impossible_or_needless_budget_is_an_error_that_says_why(budget, message):
    with pytest.raises(InputError, match=message):
        check_budget(budget, 0.25)
    check_budget(0.25, 0.25)


def test_the_page_shows_a_form_that_is_too_costly_for_the_budget():
    problem = random_problem(1)
    budget = problem.least_cost + 0.01
    about = dict.fromkeys(("cost_words", "latents", "examples", "hardware", "command"), "x") | {
        "next": [],
        "skipped": {},
    }
    result = solve(problem, np.zeros((4, 4, 2)), budget, about)
    text = markdown(result, "picture.png")
    assert "| too costly |" in text and f"Budget: {budget:g}" in text
    assert [row.budget for row in result.rows] == sorted(row.budget for row in result.rows)


# ----------------------------------------------------------------------------------------------------- the candidates
def distill_config(**changes):
    config = tiny_config("distill", **{"init_from": "teacher"} | changes)
    config.hybrid.blocks, config.hybrid.feature_map.features = (1,), 16
    return config


def test_candidates_take_from_config_hybrid_what_they_do_not_say():
    config = distill_config()
    config.hybrid.stabilizer = "joint"
    candidates, skipped = make_candidates(config, DEFAULT_FORMS, frames=21)
    assert candidates[0].form == SOFTMAX and not skipped
    kinds = [type(candidate.form) for candidate in candidates]
    assert kinds == [SoftmaxForm, *[StridedForm] * 3, *[HybridConfig] * 3, LinearForm, WindowForm]
    assert [one.form.chunk_frames for one in candidates[4:7]] == [1, 3, 5]
    for candidate in candidates[1:8]:
        assert candidate.form.learned.feature_map.features == 16
        assert (
            make_form(candidate.form.kind, {k: v for k, v in candidate.fields.items() if k != "kind"}) == candidate.form
        )
    assert candidates[4].form.stabilizer == "joint"
    assert len({candidate.folder for candidate in candidates}) == len(candidates)


def test_forms_that_differ_only_in_fields_without_a_word_have_labels_and_folders_of_their_own():
    entries = ({"kind": "strided", "stride": 2}, {"kind": "strided", "stride": 2, "stabilizer": "joint"})
    candidates, _ = make_candidates(distill_config(), entries, frames=21)
    assert [candidate.label for candidate in candidates] == ["softmax", "strided 2", "strided 2 (2)"]
    assert candidates[1].folder != candidates[2].folder


def test_a_form_whose_window_holds_all_frames_is_skipped_with_the_reason():
    entries = ({"chunk_frames": 5}, {"kind": "window", "chunk_frames": 5})
    candidates, skipped = make_candidates(distill_config(), entries, frames=5)
    assert [candidate.label for candidate in candidates] == ["softmax", "window 5+1"]
    assert "hold all 5 latent frames" in skipped["hybrid 5+1"]
    with pytest.raises(InputError, match=r"expected a form other than softmax, found none. hybrid 5.1: its chunks"):
        make_candidates(distill_config(), entries[:1], frames=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strided", "expected a tuple of forms"),
        ("()", "expected a tuple of forms"),
        ("({'kind': 'strided'}, 3)", "expected a tuple of forms"),
        ("(" * 300, "expected a tuple of forms"),
        ("({'blocks': (0,)},)", r"--forms\[0\].blocks: expected no blocks"),
        ("({'kind': 'window'}, {'kind': 'stride'})", r"--forms\[1\].kind must be one of .* did you mean 'strided'"),
        ("({'kind': 'strided', 'chunk_frames': 3},)", r"--forms\[0\].chunk_frames.* is not a field"),
        ("({'kind': 'strided', 'stride': 1},)", r"--forms\[0\]: stride must be an integer .* found 1"),
        ("({'kind': 'strided', 'stride': 2.5},)", r"--forms\[0\]: stride must be an integer .* found 2.5"),
        ("({'chunk_frames': 2, 'overlap_frames': 3},)", r"--forms\[0\]: overlap_frames must be between"),
        (
            "({'chunk_frames': 2}, {'kind': 'hybrid', 'chunk_frames': 2})",
            r"--forms\[1\]: is the same form as 'hybrid 2",
        ),
        ("({'kind': 'softmax'},)", "expected a form other than softmax, found none"),
    ],
)
def test_wrong_forms_are_errors_that_name_the_entry(text, message):
    with pytest.raises(InputError, match=message):
        make_candidates(distill_config(), parsed_entries(text), frames=21)


def test_a_workdir_of_another_definition_is_refused_and_another_form_is_none(tmp_path):
    config = distill_config(init_from=pretrained(tmp_path))
    check_definition(config, "", 64, tmp_path)
    config.hybrid.chunk_frames, config.log_every = 7, 5
    check_definition(config, "", 64, tmp_path)
    with pytest.raises(InputError, match=r"config.seed: 0 when it began, 1 now\n  --examples: 64 when it began, 8 now"):
        config.seed = 1
        check_definition(config, "", 8, tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"error": 3}', '{"error": {"value": [1], "low": [1], "high": [1]}}'])
def test_damaged_figures_are_an_error(tmp_path, content):
    candidate = Candidate("window", WindowForm())
    folder = candidate_folder(tmp_path, candidate)
    folder.mkdir(parents=True)
    (folder / "errors.json").write_text(content)
    with pytest.raises(InputError, match=r"errors\.json: expected errors of 2 blocks"):
        read_figures(tmp_path, candidate, 2)


# ---------------------------------------------------------------------------------------------------------- the costs
CANDIDATES = (Candidate("softmax", SOFTMAX), Candidate("window", WindowForm()))


def test_flops_are_those_of_the_forms(tmp_path):
    sizes = Sizes(7, 4, 2, 12)
    found, skipped = costs.form_costs(CANDIDATES, sizes, "flops", "", tmp_path)
    assert found == {one: one.form.flops(sizes).total for one in CANDIDATES} and not skipped


def test_compiled_costs_are_kept_and_forms_that_do_not_fit_are_skipped(tmp_path, monkeypatch):
    """The compiler is replaced: what matters is what becomes of its results."""
    compiled = []

    def fake(case):
        compiled.append(case.keywords["kind"])
        cost = None if case.keywords["kind"] == "window" else type("Cost", (), {"cycles": 70})
        return [type("Result", (), {"cost": cost, "program": cost and type("Program", (), {"temporary_bytes": 0})})]

    monkeypatch.setattr(costs, "costs", fake)
    for _ in range(2):
        found, skipped = costs.form_costs(CANDIDATES, Sizes(7, 4, 2, 12), "cycles", "v5e:2x2", tmp_path)
        assert found == {CANDIDATES[0]: 70} and "more memory than one chip" in skipped["window"]
    assert compiled == ["softmax", "window"]
    with pytest.raises(InputError, match="softmax cannot be compared, because it needs no temporary memory"):
        costs.form_costs(CANDIDATES, Sizes(7, 4, 2, 12), "memory", "v5e:2x2", tmp_path)


def test_an_unknown_chip_and_a_missing_compiler_are_errors(monkeypatch):
    with pytest.raises(InputError, match="expected one that begins with v5e"):
        costs.check_cost("cycles", "v9:2x2")
    with pytest.raises(InputError, match="found GPUs"):
        costs.check_cost("cycles", "h100:8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rehyat-jax\[tpu\]"):
        costs.check_cost("memory", "v5e:2x2")
    costs.check_cost("flops", "v9:2x2")


def test_latents_must_be_whole_patches():
    config = open_checkpoint("assets/demo_teacher").config
    assert costs.attention_sizes(config, (21, 24, 24)).frames == 21
    with pytest.raises(InputError, match=r"--latents: expected height in multiples of 2.*, found 5"):
        costs.attention_sizes(config, (21, 5, 6))


# ------------------------------------------------------------------------------------------------------ its config.py
def test_the_written_configuration_is_the_one_with_the_chosen_forms(tmp_path):
    config = digits_config(tmp_path, "distill", seed=5, evals=({"type": "flow_loss", "every": 2},))
    teacher = pretrained(tmp_path, num_layers=4)
    forms = (HybridConfig(2, 1, causal=False), StridedForm(4), WindowForm(5))
    blocks = ((0, 3), (1,), (2,))
    entries = tuple({"blocks": b, **Candidate("", form).fields} for b, form in zip(blocks, forms, strict=True))
    changed = with_forms(config, entries)
    file = tmp_path / 'a \'quoted\' """ name.py'
    write_config_file(changed, f"Made in {file} by a\\command.", file)
    read = train.parse_arguments(["train", f"--config={file}", f"--workdir={tmp_path}"]).config
    with changed.unlocked():
        changed.hybrid = read.hybrid  # the entries have all fields
    assert read.to_dict() == changed.to_dict()
    assert wanted_forms(read, 4) == (forms[0], forms[1], forms[2], forms[0])
    student = student_config(open_checkpoint(teacher).config, read)
    assert student.block_forms.of_block == (forms[0], forms[1], forms[2], forms[0])
    compile(file.read_text(), str(file), "exec")


# ---------------------------------------------------------------------------------------------------------- end to end
FORMS = "({'kind': 'hybrid', 'chunk_frames': 2, 'overlap_frames': 0}, {'kind': 'window'})"


def test_forms_are_trained_measured_and_chosen_and_train_takes_the_choice(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    config = digits_config(tmp_path, "distill", steps=2, checkpoint_every=2)
    config.optimizer.warmup_steps = 1
    write_config(tmp_path / "distill.py", config)
    workdir = tmp_path / "surgery"
    options = ["--workdir", str(workdir), "--forms", FORMS, "--latents", "21x48x48", "--examples", "4", "--jobs", "2"]
    arguments = ["--config", str(tmp_path / "distill.py"), *options]
    assert command.main([*arguments, "--budget", "0.01"]) == 2
    assert "--budget: expected at least" in capfd.readouterr().err
    assert not (workdir / "surgery.json").exists() and not (workdir / "candidates").exists()

    assert command.main([*arguments, "--budget", "0.7"]) == 0
    printed = capfd.readouterr().out
    found = json.loads((workdir / "surgery.json").read_text())
    assert set(found["errors"]) == {"softmax", "hybrid 2+0", "window 2+1"}
    hybrid, window = np.array(found["errors"]["hybrid 2+0"]), np.array(found["errors"]["window 2+1"])
    assert hybrid.shape == window.shape == (2,) and (hybrid > 0).all() and (window > 0).all()
    intervals = np.array(found["error_intervals"]["window 2+1"])
    assert (intervals[:, 0] < window).all() and (window < intervals[:, 1]).all()
    choice = found["choice"]
    assert choice["cost"] <= 0.7 and choice["gap"] == 0 and "ptimal" in choice["status"]
    text = (workdir / "surgery.md").read_text()
    assert "| block | form | hybrid 2+0 | window 2+1 |" in text and found["command"] in text
    assert (workdir / "surgery.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"{block} {label}" in printed for block, label in enumerate(choice["forms"]))

    # Another budget measures nothing again.
    logs = sorted((workdir / "candidates").rglob("*.log"))
    before = [(log, log.stat().st_size) for log in logs]
    assert len(logs) == 3  # the window alone has no stage 1
    assert command.main([*arguments, "--budget", "0.5"]) == 0
    assert before == [(log, log.stat().st_size) for log in logs]
    assert command.main([*arguments, "--budget", "0.5", "--config.seed=3"]) == 2
    assert "config.seed: 0 when it began, 3 now" in capfd.readouterr().err

    # Stage 1 of a choice with hybrid blocks, and stage 2 of its result.
    entries = ({"blocks": (1,), **found["forms"]["hybrid 2+0"]}, {"blocks": (0,), **found["forms"]["window 2+1"]})
    write_config_file(with_forms(config, entries), "Both forms.", tmp_path / "config.py")
    run = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}"]
    model = train.train(train.parse_arguments(run).config, tmp_path / "distill", jax.devices()[:1])
    finetuning = train.parse_arguments([*run, "--config.stage=finetune", f"--config.init_from={model}"]).config
    with jax.set_mesh(make_mesh(finetuning.mesh, jax.devices()[:1])):
        forms = initial_model(finetuning, with_values=False).config.block_forms.of_block
    assert forms[0] == WindowForm(2, 1) and isinstance(forms[1], HybridConfig) and forms[1].chunk_frames == 2


def test_nothing_is_chosen_if_a_candidate_failed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(choose, "run_candidates", lambda *_, **options: {"window 2+1": "no data"})
    write_config(tmp_path / "distill.py", digits_config(tmp_path, "distill"))
    arguments = ["--config", str(tmp_path / "distill.py"), "--workdir", str(tmp_path / "surgery")]
    assert command.main([*arguments, "--budget", "0.5", "--forms", FORMS, "--latents", "21x48x48"]) == 3
    assert "window 2+1: failed, no data" in capfd.readouterr().err
    assert not (tmp_path / "surgery/surgery.json").exists() and not (tmp_path / "surgery/config.py").exists()


def test_what_cannot_be_the_start_of_surgery_is_an_error(tmp_path, capfd):
    config = digits_config(tmp_path, "distill")
    write_config(tmp_path / "distill.py", config)
    base = ["--config", str(tmp_path / "distill.py"), "--workdir", str(tmp_path / "surgery"), "--budget", "0.5"]
    for more, message in (
        (["--budget", "1"], "nothing needs converting"),
        (["--config.stage=finetune"], 'config.stage: expected "distill"'),
        (["--cost", "seconds"], "--cost must be one of"),
        (["--cost", "cycles", "--topology", "v9:2x2"], "expected one that begins with v5e"),
        (["--latents", "21x6"], "--latents: expected FRAMESxHEIGHTxWIDTH"),
        (["--examples", "1"], "examples"),
        (["--data", str(tmp_path / "nothing")], "nothing"),
        (["--config.init_from=nowhere"], "nowhere"),
        (["--config.data.source=prepared"], "config.data.path"),
    ):
        assert command.main([*base, *more]) == 2
        assert message in capfd.readouterr().err
    assert not Path(tmp_path / "surgery").exists()
