"""`rehyat_jax.compare` shows the differences of training runs, and explains folders that are none."""

import json
import time

import pytest
from tiny_runs import tiny_config

from rehyat_jax import compare
from rehyat_jax.errors import InputError
from rehyat_jax.studies.run_comparison import RunLog, comparison, read_run, short_names
from rehyat_jax.training.config import save_config
from rehyat_jax.training.metrics import MetricWriter


def make_run(folder, losses, first_step=0, **changes):
    """The directory of a run that logged these losses, and an evaluation at its last step."""
    folder.mkdir(exist_ok=True)
    save_config(tiny_config("distill", **changes), folder)
    writer = MetricWriter(folder, first_step=first_step, steps=10, description="distill", is_silent=False)
    for step, loss in enumerate(losses, first_step + 1):
        writer.write(step, {"loss": loss, "block_loss": [loss, 3 * loss], "learning_rate": 0.1, "skipped": 0})
    writer.write(first_step + len(losses) + 1, {"held_out/loss": 7.0})
    writer.close()
    return folder


@pytest.fixture
def runs(tmp_path):
    slow = {"hybrid.chunk_frames": 5, "optimizer.learning_rate": 0.01}
    return make_run(tmp_path / "a", [4.0, 1.0, 2.0]), make_run(tmp_path / "b", [4.0, 3.0], seed=3, **slow)


def test_fields_that_differ_and_metrics_are_shown(runs, tmp_path, capsys):
    page = tmp_path / "out" / "compared.md"
    assert compare.main([*map(str, runs), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"- b: `{runs[1]}`" in printed and "| field | a | b |" in printed
    assert "| hybrid.chunk_frames | 3 | 5 |" in printed and "| seed | 0 | 3 |" in printed
    assert "| optimizer.learning_rate | " in printed and "batch_size" not in printed
    assert "| loss | 2 (1 at 2) | 3 (3 at 2) |" in printed
    assert "| block_loss | 4 (2 at 2) | 6 (6 at 2) |" in printed  # the mean of a vector
    assert "| held_out/loss | 7 (7 at 4) | 7 (7 at 3) |" in printed and "| skipped" not in printed
    assert "| last step | 4 | 3 |" in printed
    assert printed.split("wrote")[0].strip() in page.read_text()
    assert "![Curves of the runs](compared.png)" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_speed_is_the_median_time_of_a_step_within_one_process(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 3))  # 3 seconds pass between two events
    monkeypatch.setattr(time, "time", lambda: next(clock))
    folder = make_run(tmp_path / "a", [4.0, 1.0, 2.0])
    monkeypatch.setattr(time, "time", lambda: 10.0**9)  # much later: the time between two processes is no step
    make_run(folder, [1.0], first_step=4)
    monkeypatch.undo()
    assert read_run(folder).seconds == 3


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["runs/wide/seed_0/distill", "runs/deep/seed_1/distill"], ["wide/seed_0", "deep/seed_1"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "b/y"]),
    ],
)
def test_names_of_runs_leave_out_what_all_have_in_common(directories, names):
    assert short_names([RunLog(directory, {}, {}, None) for directory in directories]) == names


def test_a_run_that_is_writing_can_be_read(runs):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert "| loss | 2 (1 at 2) |" in comparison([read_run(run) for run in runs])


def test_equal_configurations_and_losses_that_are_not_finite(tmp_path):
    first, second = make_run(tmp_path / "a", [float("nan"), 2.0]), make_run(tmp_path / "b", [float("nan")])
    text = comparison([read_run(first), read_run(second)])
    assert "No field differs." in text
    assert "| loss | 2 (2 at 2) | nan |" in text


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: None, "give their workdirs"),
        (lambda run: (run / "config.json").unlink(), "config.json: expected the configuration of a training run"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: expected the metrics of a training run"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "expected logged steps"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n'), "expected figures"),
        (lambda run: (run / "config.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_folders_that_are_no_runs_are_explained(runs, capsys, damage, expected):
    damage(runs[0])
    other = runs[0] if expected == "give their workdirs" else runs[1]
    assert compare.main([str(runs[0]), str(other)]) == 2
    assert expected in capsys.readouterr().err


def test_a_missing_folder_and_a_strange_page_are_refused(runs, tmp_path, capsys):
    assert compare.main([str(tmp_path / "c"), str(runs[0])]) == 2
    assert "c: expected the directory of a training run" in capsys.readouterr().err
    assert compare.main([*map(str, runs), "--out", str(tmp_path / "page.txt")]) == 2
    assert "ends in .md" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected the directory"):
        read_run(runs[0] / "config.json")


def test_huge_numbers_in_metrics_do_no_harm(runs):
    line = json.dumps({"step": 9, "loss": 10**400, "other": {"a": 1}, "block_loss": []})
    (runs[0] / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    assert "| loss | 2 (2 at 1) | 3 (3 at 2) |" in comparison([read_run(run) for run in runs])
