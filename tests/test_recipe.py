"""Recipes: what they run, in which order they may, and their record."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from tiny_runs import digits_config, pretrained, write_config

from rehyat_jax import evaluate, recipe, train
from rehyat_jax.diffusion.solver_options import SolverOptions
from rehyat_jax.errors import InputError
from rehyat_jax.recipes import running
from rehyat_jax.recipes.definition import TEACHER, Recipe, Step, read_recipe, step_config
from rehyat_jax.recipes.report import collect, markdown
from rehyat_jax.weights import load_params, save_model

STAGES, FEW = ("distill", "finetune", "dmd"), {"few_step.steps": 2, "dmd.score_updates": 1}
RECIPES = sorted(Path("configs/recipes").glob("*.py"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_commands_of_a_recipe_train_what_its_definition_says(file, tmp_path):
    found = read_recipe(file, {"log_every": 7})
    commands = running.training_task(file, found, tmp_path, seed=2).commands
    models = {"": found.teacher} | {command.name: str(command.result) for command in commands}
    for step, command in zip(found.steps, commands, strict=True):
        config = train.parse_arguments(["train", *command.argv[3:]]).config
        expected = step_config(file, found, step)
        start = found.start_of(step)
        with expected.unlocked():
            expected.seed, expected.init_from = 2, models["" if start is None else start.name]
        assert config.to_dict() == expected.to_dict() and config.log_every == 7
        assert TEACHER not in command.argv
    for command in running.evaluation_task(found, tmp_path, seed=2).commands:
        made = evaluate.make_parser().parse_args(list(command.argv[3:]))
        assert str(made.teacher) == found.teacher and str(made.student) in models.values()


def tiny_recipe(folder, **changes):
    """A recipe's file over tiny configurations, and its definition."""
    teacher = pretrained(folder)
    for stage in STAGES:
        write_config(folder / f"{stage}.py", digits_config(folder, stage, init_from=teacher, steps=3))
    step = lambda name, **more: Step(name, str(folder / f"{name}.py"), **more)
    made = Recipe(
        title="A tiny recipe",
        teacher=teacher,
        steps=(step("distill"), step("finetune"), step("dmd", changes=FEW)),
        results={"student": "finetune", "student_2_steps": "dmd"},
        evaluation=("--samples", "4", "--examples", "2", "--levels", "1", "--batch", "4", "--steps", "3"),
        seeds=(0, 1),
    )
    made = dataclasses.replace(made, **changes)
    file = folder / "recipe.py"
    file.write_text(f"from rehyat_jax.recipes.definition import *\ndef get_recipe():\n    return {made!r}\n")
    return file, made


def train_on_one_device(arguments):
    return train.train(arguments.config, arguments.workdir, jax.devices()[:1])


def run_in_this_process(tasks, jobs, environment):
    """`run_tasks` without processes."""
    for task in tasks:
        for command in task.commands:
            if not command.result.exists():
                if command.argv[2] == "rehyat_jax.evaluate":
                    assert evaluate.main(list(command.argv[3:])) == 0
                else:
                    train_on_one_device(train.parse_arguments(["train", *command.argv[3:]]))
        task.seconds.write_text(json.dumps(dict.fromkeys((command.name for command in task.commands), 1.0)))
    return {}


def test_a_recipe_trains_evaluates_and_reports_and_another_one_is_refused(tmp_path, monkeypatch, capsys):
    steps = tuple(Step(name, str(tmp_path / f"{name}.py"), changes=FEW if name == "dmd" else {}) for name in STAGES)
    results = {"student": "dmd", "before": "distill"}
    changes = {"without_samples": ("before",), "options": {"student": ("--student-steps", "1")}, "seeds": (1,)}
    tiny_recipe(tmp_path, steps=(steps[0], steps[2]), results=results, **changes)
    monkeypatch.setattr(running, "run_tasks", run_in_this_process)
    command = [str(tmp_path / "recipe.py"), "--workdir", str(tmp_path / "run"), "--config.caption_dropout=0.2"]
    assert recipe.main(command) == 0
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    for name in ("teacher", "student"):
        low, high = record[name]["intervals"]["frame_accuracy"]
        assert low <= record[name]["frame_accuracy"] <= high
    assert record["samples"] == 4 and record["velocity_error"] > 0 and record["boundary_ratio_student"] > 0
    page = (tmp_path / "run" / "recipe.md").read_text()
    assert "| digit, every frame |" in page and f"before {record['velocity_error_before']:.4f}." in page
    assert "frame_accuracy" not in record["before"] and (tmp_path / "run" / "recipe.png").exists()
    # The few-step student keeps its own solver, but for the asked-for number of steps.
    about = json.loads((tmp_path / "run" / "seed_1" / "evaluation" / "student" / "evaluation.json").read_text())[
        "about"
    ]
    assert about["sampling"]["sampler"] == "renoise" and about["sampling"]["steps"] == 1
    # All evaluations find the teacher's samples there.
    assert len(list((tmp_path / "run" / "teacher_samples").iterdir())) == 4

    tiny_recipe(tmp_path, steps=(steps[0], steps[2]), results={"student": "dmd"}, evaluation=("--samples", "6"))
    capsys.readouterr()
    assert recipe.main(command) == 2
    assert "evaluation: '--samples 4" in capsys.readouterr().err


def test_a_record_has_means_over_seeds_and_their_range(tmp_path):
    _, definition = tiny_recipe(tmp_path)
    one = lambda value: {"value": value, "low": value - 0.1, "high": value + 0.1}
    for seed, value in ((0, 0.5), (1, 0.7)):
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}" / "seconds.json").write_text('{"distill": 60.0}')
        for name, more in (("student", 0.0), ("student_2_steps", 0.1)):
            metrics = {
                "frame_accuracy_student": one(value + more),
                "frame_accuracy_teacher": one(0.9),
                "velocity_error": one(value / 10),
                "chunk_jump_student": one(2 * value),
            }
            series = {
                side: {end: [0.8, value, 0.9] for end in ("value", "low", "high")} for side in ("teacher", "student")
            }
            curves = {"frame_accuracy_by_frame": {"series": series}}
            place = tmp_path / f"seed_{seed}" / "evaluation" / name
            place.mkdir(parents=True)
            (place / "evaluation.json").write_text(json.dumps({"metrics": metrics, "curves": curves}))
    record = collect(definition, tmp_path, ["recipe.py"])
    assert record["teacher"]["frame_accuracy"] == 0.9
    assert record["teacher"]["intervals"]["frame_accuracy"] == pytest.approx([0.8, 1.0])
    assert record["student_2_steps"]["frame_accuracy"] == pytest.approx(0.7)
    assert record["student_2_steps"]["intervals"]["frame_accuracy"] == pytest.approx([0.6, 0.8])
    assert record["student"]["lowest_frame"] == pytest.approx(0.6)
    assert record["velocity_error"] == pytest.approx(0.06) and record["boundary_ratio_student"] == pytest.approx(1.2)
    assert "motion_accuracy" not in record["student"] and "boundary_ratio_teacher" not in record
    page = markdown(definition, record, pictured=False)
    assert "| digit, every frame | 90.0% (80.0% to 100.0%) | 60.0% (50.0% to 70.0%) | 70.0% (60.0% to 80.0%) |" in page


@pytest.mark.parametrize(
    "steps, message",
    [
        ("dmd finetune", "stage 'finetune' cannot follow stage 'dmd', whose result is a model of few steps"),
        ("finetune distill", "stage 'distill' learns from .* its own model, which stage 'finetune' has changed"),
        ("velocity distill", "stage 'distill' learns from .* its own model, which stage 'velocity' has changed"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(steps, message, tmp_path):
    adapters = {"lora.rank": 2, "stage": "velocity"}
    steps = tuple(
        Step(
            name, str(tmp_path / f"{name.replace('velocity', 'finetune')}.py"), changes=adapters if "v" in name else {}
        )
        for name in steps.split()
    )
    file, _ = tiny_recipe(tmp_path, steps=steps, results={"student": steps[1].name})
    with pytest.raises(InputError, match=message):
        read_recipe(file, {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"results": {"last": "dmd"}}, "results: expected 'student'"),
        ({"results": {"student": "x"}}, "results: expected 'student', of steps"),
        ({"seeds": (0, 0)}, "seeds: expected seeds"),
        ({"without_samples": ("student",)}, "without_samples: expected some of"),
        ({"options": {"other": ("--student-steps", "2")}}, "options: expected some of .*student"),
    ],
)
def test_wrong_definitions_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_recipe(tmp_path, **changes)


def test_a_model_of_few_steps_is_not_trained_further(tmp_path):
    """Made one by its solver, which a run of stage "dmd" writes: tests/test_few_step.py."""
    wan, params, parts = load_params(pretrained(tmp_path))
    solver = SolverOptions(steps=1, guidance_scale=1.0, flow_shift=5.0, sampler="renoise")
    save_model(tmp_path / "student", wan, params, **parts, sampling=solver)
    config = digits_config(tmp_path, "finetune", init_from=str(tmp_path / "student"))
    with pytest.raises(InputError, match="is a model of few steps"):
        train.train(config, tmp_path / "run", jax.devices()[:1])
