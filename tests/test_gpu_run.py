"""The one command for all GPU figures: run on a CPU at tiny sizes, cut off, out of budget, rendered."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from rehyat_jax.benchmarks.gpu_run import __main__ as gpu_run
from rehyat_jax.benchmarks.gpu_run import runner
from rehyat_jax.benchmarks.gpu_run.report import render
from rehyat_jax.benchmarks.gpu_run.results import Results, is_right, read_results
from rehyat_jax.benchmarks.gpu_run.runner import run_sections
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, sizes_for
from rehyat_jax.benchmarks.gpu_run.targets import targets
from rehyat_jax.planning.planner import placement

# One of each kind: other sections are the same code at other sizes.
KINDS = {
    "machine": 1,
    "plan": 1,
    "correctness": 6,
    "attention_1.3b": 6,
    "train_15_of_30": 2,
    "sampling": 5,
    "student": 2,
    "demo": 4,
}


def test_the_sections_tried_are_one_of_each_kind():
    kinds = lambda names: {SECTIONS[name].module for name in names}
    assert kinds(KINDS) == kinds(SECTIONS)


# A short one, and the one that trains on all devices. Processes take seconds to start.
IN_PROCESSES = ("machine", "demo")


def test_everything_runs_on_a_cpu(tmp_path, capfd):
    file = tmp_path / "run.json"
    arguments = ["--json", str(file), "--device", "cpu", "--tiny", "--budget", "3000", "--only", *IN_PROCESSES]
    assert gpu_run.main(arguments) == 0, capfd.readouterr()
    sections = json.loads(file.read_text())
    assert sections.keys() == set(IN_PROCESSES)
    for name, section in sections.items():
        assert section["status"] == "complete", section
        assert len(section["rows"]) >= KINDS[name], name
        assert "jax" in section["environment"]
    report = (tmp_path / "run.md").read_text()
    assert all(f"| {name} | complete |" in report for name in IN_PROCESSES)
    assert "nan" not in report


def placed(request):
    """A plan without its compilation: tests/test_plan.py has that."""
    arguments = placement(request).arguments
    return SimpleNamespace(peak=sum(arguments.values()), cost=None, outcome=SimpleNamespace(compile_seconds=0.0))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in IN_PROCESSES])
def test_a_section_gives_rows_that_the_report_shows(name, monkeypatch):
    monkeypatch.setattr("rehyat_jax.benchmarks.gpu_run.plan.make_plan", placed)
    rows = json.loads(json.dumps(list(SECTIONS[name].rows(sizes_for("cpu", tiny=True)))))
    assert len(rows) >= KINDS[name]
    assert is_right({"status": "complete", "rows": rows}), rows
    report = render(results(**{name: rows}), {})
    assert f"| {name} | complete |" in report
    assert "nan" not in report


def fake(monkeypatch, script):
    """Every section runs this Python code instead."""
    monkeypatch.setattr(runner, "command", lambda name, section, arguments: [sys.executable, "-c", script])


ROWS = """
import json, sys, time
print(json.dumps("a machine"), flush=True)
print(json.dumps({"figure": 1}), flush=True)
"""


def test_a_section_that_is_cut_off_keeps_its_rows(monkeypatch, tmp_path):
    fake(monkeypatch, ROWS + "print('{\"half\"', end='', flush=True); time.sleep(600)")
    monkeypatch.setitem(runner.SECTIONS, "machine", runner.Section("machine", 3))
    run_sections(["machine"], Results(tmp_path / "run.json"), budget=100, device="cpu", tiny=True)
    section = json.loads((tmp_path / "run.json").read_text())["machine"]
    assert (section["status"], section["rows"], section["environment"]) == ("cut off", [{"figure": 1}], "a machine")


def test_a_section_that_fails_keeps_its_rows_and_says_why(monkeypatch, tmp_path, capfd):
    fake(monkeypatch, ROWS + "raise MemoryError('no more of it')")
    names = ["machine", "plan"]  # others run next to "plan"
    run_sections(names, Results(tmp_path / "run.json"), budget=100, device="cpu", tiny=True)
    sections = json.loads((tmp_path / "run.json").read_text())
    for name in names:
        assert (sections[name]["status"], sections[name]["rows"]) == ("failed", [{"figure": 1}])
        assert "no more of it" in sections[name]["error"]
    assert "no more of it" in capfd.readouterr().err


def test_sections_beyond_the_budget_are_skipped(monkeypatch, tmp_path):
    fake(monkeypatch, ROWS + "time.sleep(6)")
    names = ["machine", "student"]
    run_sections(names, Results(tmp_path / "run.json"), budget=runner.LEAST_SECONDS + 2, device="cpu", tiny=True)
    sections = json.loads((tmp_path / "run.json").read_text())
    assert [sections[name]["status"] for name in names] == ["complete", "skipped"]


def test_kernels_that_are_not_right_are_not_timed(monkeypatch, tmp_path):
    fake(monkeypatch, ROWS + "print(json.dumps({'right': False}), flush=True)")
    names = ["correctness_kernels", "attention_1.3b_kernels", "student"]
    run_sections(names, Results(tmp_path / "run.json"), budget=100, device="cpu", tiny=True)
    sections = json.loads((tmp_path / "run.json").read_text())
    assert [sections[name]["status"] for name in names] == ["complete", "skipped", "complete"]


def test_a_section_that_is_measured_again_keeps_nothing_of_before(monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(results(machine=[{"old": 1}]) | results(student=[{"old": 1}])))
    results_file = Results(tmp_path / "run.json")
    results_file.update("machine", note="by hand", error="of before")
    fake(monkeypatch, ROWS)
    run_sections(["machine"], results_file, budget=100, device="cpu", tiny=True)
    run_sections(["student"], results_file, budget=1, device="cpu", tiny=True)
    sections = json.loads((tmp_path / "run.json").read_text())
    assert sections["machine"]["rows"] == [{"figure": 1}]
    assert not {"note", "error"} & sections["machine"].keys()
    # One that is skipped keeps its rows.
    assert (sections["student"]["status"], sections["student"]["rows"]) == ("complete", [{"old": 1}])


def test_what_an_earlier_run_measured_stays_in_the_file(monkeypatch, tmp_path):
    fake(monkeypatch, ROWS)
    for name in ("machine", "student"):
        run_sections([name], Results(tmp_path / "run.json"), budget=100, device="cpu", tiny=True)
    assert read_results(tmp_path / "run.json").keys() == {"machine", "student"}


def test_a_run_that_is_stopped_leaves_its_file_and_no_process(tmp_path):
    file, running = tmp_path / "run.json", tmp_path / "running"
    script = f"""
import sys
from pathlib import Path
from rehyat_jax.benchmarks.gpu_run import runner
from rehyat_jax.benchmarks.gpu_run.results import Results
section = {ROWS!r} + "import os; open({str(running)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
runner.command = lambda *_: [sys.executable, "-c", section]
runner.run_sections(["machine"], Results(Path({str(file)!r})), budget=500, device="cpu", tiny=True)
"""
    run = subprocess.Popen([sys.executable, "-c", script])
    wait_for(running)
    wait_for(file, "figure")
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    section = json.loads(file.read_text())["machine"]
    assert (section["status"], section["rows"]) == ("running", [{"figure": 1}])
    assert "| machine | cut off with the run |" in render({"machine": section | {"rows": []}}, {})
    assert ended(running)


def test_a_run_that_is_killed_leaves_no_process(tmp_path):
    running = tmp_path / "running"
    script = f"""
import subprocess, sys
section = "import time; from rehyat_jax.benchmarks.gpu_run.process import _end_with_parent as end; end();"
section += "import os; open({str(running)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.run([sys.executable, "-c", section])
"""
    run = subprocess.Popen([sys.executable, "-c", script])
    wait_for(running)
    run.kill()
    run.wait()
    assert ended(running)


def wait_for(file, text=""):
    """Waits until a file has content, with this text in it."""
    for _ in range(600):
        if file.exists() and (content := file.read_text()) and text in content:
            return
        time.sleep(0.1)
    raise AssertionError(file)


def ended(file):
    """Whether the process with the number in the file ends within ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.kill(int(file.read_text()), 0)
            time.sleep(0.1)
        return False
    return True


def results(**sections):
    return {
        name: {"status": "complete", "environment": "NVIDIA H200, 16 cores", "rows": rows}
        for name, rows in sections.items()
    }


def train_row(milliseconds, **changes):
    row = dict(stage="finetune", hybrid_blocks=30, blocks=30, remat="block", implementation="", peak_bytes=100)
    row |= dict(model="t2v-1.3B", latents=[21, 60, 104])
    row |= dict(milliseconds=milliseconds, compile_seconds=1.0, model_tflop=400.0, recomputed_tflop=100.0)
    return row | changes


def test_targets_are_ratios_of_the_run_itself():
    layer = dict(heads=12, frames=21, forward_tflop=1.0, both_tflop=3.0)
    sections = results(
        machine=[{"peak_tflops": 800.0}],
        correctness=[{"right": True}, {"right": False}],
        train_softmax=[train_row(2400.0)],
        train_all_hybrid=[train_row(1000.0, model_tflop=494.5)],
        plan=[{"section": "train_all_hybrid", "peak_bytes": 120}],
    )
    sections["attention_1.3b"] = results(
        a=[
            layer | dict(attention="full, cudnn", forward_ms=8.0, both_ms=30.0),
            layer | dict(attention="full, PyTorch", forward_ms=9.0, both_ms=40.0),
            layer | dict(attention="layer, cudnn, row_max", forward_ms=2.0, both_ms=10.0),
            layer | dict(attention="hybrid, cudnn, row_max", forward_ms=1.0, both_ms=5.0),
        ]
    )["a"]
    found = {target.name: (target.value, target.met) for target in targets(sections)}
    assert found["share of the cases of attention that are right"] == (0.5, False)
    assert found["full attention's time / hybrid layer's, 21 latent frames, forward"] == (4.0, True)
    assert found["full attention's time / hybrid layer's, 21 latent frames, forward + backward"] == (3.0, False)
    # A target that the run should have measured is missed.
    assert found["full attention's time / hybrid layer's, 81 latent frames, forward"] == (None, False)
    assert found["softmax step's time / all-hybrid step's, stage 2"] == (2.4, True)
    assert found["MFU of stage 2, all hybrid"] == (0.5, True)
    assert found["planned memory's distance from the measured peak, train_all_hybrid"] == (pytest.approx(0.2), False)


def test_the_report_sets_the_demo_beside_a_cpu(tmp_path, capsys):
    demo = [{"part": "distill", "steps": 300, "seconds": 12.3}, {"metrics": {"digit_accuracy_student": 0.98}}]
    for name, seconds in (("gpu", 12.3), ("cpu", 61.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(demo=[demo[0] | {"seconds": seconds}, demo[1]])))
    arguments = ["--render", str(tmp_path / "gpu.json"), "--cpu-results", str(tmp_path / "cpu.json")]
    assert gpu_run.main([*arguments, "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| distill | 300 | 12 | 61 |" in page
    assert "| `digit_accuracy_student` | 0.98 | 0.98 |" in page


@pytest.mark.parametrize(
    "text", ["[]", '{"machine": {}}', '{"machine": {"status": "complete", "rows": 3}}', "not JSON"]
)
def test_a_file_of_something_else_is_refused(text, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert gpu_run.main(["--render", str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    assert file.read_text() == text


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert gpu_run.main(["--render", str(tmp_path / "none.json")]) == 2
    assert "none.json: expected a file of results, found none" in capsys.readouterr().err


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_run, "nvidia_smi", lambda: None)
    assert gpu_run.main(["--json", str(tmp_path / "run.json")]) == 2
    assert "found no nvidia-smi that answers" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()
