"""Studies: what they run, what they refuse, and the sentences and pages that come out."""

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from tiny_runs import TINY, digits_config, pretrained, tiny_config, write_config

from rehyat_jax import study as command
from rehyat_jax import train
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.forms.window import WindowForm
from rehyat_jax.demo.digits import DigitVideos
from rehyat_jax.errors import InputError, RunStoppedError
from rehyat_jax.studies.begun import check_definition
from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant, read_study, stage_config
from rehyat_jax.studies.measure import MEASURES, Sampled, measure_model
from rehyat_jax.studies.processes import Command, Task, run_tasks
from rehyat_jax.studies.record import Record, Run, collect, read_record, write_record
from rehyat_jax.studies.running import FIGURES, run_folder, run_task
from rehyat_jax.studies.trends import sentences
from rehyat_jax.studies.untrained import write_untrained
from rehyat_jax.weights import load_wan

STUDIES = sorted(Path("configs/studies").glob("*.py"))


# ------------------------------------------------------------------------------------------------------- definitions
@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_commands_of_a_study_train_what_its_definition_says(file, tmp_path):
    study = read_study(file)
    for label in study.variants:
        task = run_task(file, study, tmp_path, label, seed=2)
        *trainings, measurement = task.commands
        model = study.teacher
        for stage, training in zip(study.stages_of(label), trainings, strict=True):
            _, _, module, *options = training.argv
            found = train.parse_arguments(["train", *options]).config
            expected = stage_config(file, study, label, stage)
            with expected.unlocked():
                expected.seed, expected.init_from = 2, model
            assert found.to_dict() == expected.to_dict()
            is_window = [entry["kind"] for entry in found.forms] == ["window"]
            assert module == ("rehyat_jax.studies.untrained" if is_window else "rehyat_jax.train")
            model = str(training.result)
        assert model in measurement.argv


def tiny_study(**changes):
    fields = dict(
        title="Windows of a tiny model",
        question="Which?",
        published="nothing",
        stages=(TrainingStage("distill", "configs/demo_distill.py"),),
        variants={"narrow": Variant(), "wide": Variant({"hybrid.chunk_frames": 5})},
        measures=("velocity_error",),
        headline="velocity_error",
        seeds=(0,),
    )
    return Study(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variants={}), "variants: expected at least one"),
        (dict(variants={"Tc 3": Variant(), "tc-3": Variant()}), "variants: expected labels that differ"),
        (
            dict(variants={"a": Variant(stages=("finetune",))}),
            r"variants\['a'\].stages: expected some of \['distill'\]",
        ),
        (dict(measures=("speed",)), "measures: expected some of"),
        (dict(headline="frame_accuracy"), "headline: expected one of"),
        (dict(trends=(Trend("VBench", {"narrow": 1.0, "middle": 2.0}),)), "trends: expected labels of variants"),
        (dict(seeds=(1, 1)), "seeds"),
        (dict(videos=30), "videos: expected a multiple of 40"),
    ],
)
def test_a_wrong_definition_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_study(**changes)


WRONG_FILE = """
from rehyat_jax.studies.definition import Study, TrainingStage, Variant
def get_study():
    return Study(
        title="t", question="q", published="p", headline="velocity_error", measures=({measures},),
        stages=(TrainingStage("one", "configs/demo_{stage}.py"),), variants={{"a": Variant({changes})}},
    )
"""


@pytest.mark.parametrize(
    ("stage", "measures", "changes", "expected"),
    [
        ("distill", "'velocity_error'", "{'hybrid.chunk_frame': 5}", "did you mean config.hybrid.chunk_frames"),
        ("distill", "'velocity_error'", "{'hybrid.chunk_frames': 'five'}", "variant 'a', stage 'one'"),
        ("distill", "'velocity_error'", "{'steps': 5}", "config.optimizer.warmup_steps"),
        (
            "distill",
            "'velocity_error'",
            "{'forms': ({'blocks': (9,), 'kind': 'window'},)}",
            "variant 'a', stage 'one': config.forms[0].blocks must be increasing block indices below 6",
        ),
        ("nothing", "'velocity_error'", "{}", "configs/demo_nothing.py: does not exist here or in the package"),
        ("finetune", "'velocity_error', 'attention_error'", "{}", "'attention_error' needs the teacher's parameters"),
        ("distill", "'velocity'", "{}", "wrong.py:4: ValueError: measures"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(tmp_path, capsys, stage, measures, changes, expected):
    file = tmp_path / "wrong.py"
    file.write_text(WRONG_FILE.format(stage=stage, measures=measures, changes=changes))
    assert command.main([str(file), "--workdir", str(tmp_path / "study")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_study_that_began_with_another_definition_is_not_continued(tmp_path):
    file = Path("configs/studies/x.py")
    began = tiny_study()
    check_definition(file, began, tmp_path)
    check_definition(file, began, tmp_path)
    changed = tiny_study(variants={"narrow": Variant(), "wide": Variant({"hybrid.chunk_frames": 7})})
    with pytest.raises(InputError, match=r"'wide', .*, config.hybrid.chunk_frames: 5 when it began, 7 now"):
        check_definition(file, changed, tmp_path)
    with pytest.raises(InputError, match=r"variant 'wide': .* 'none of them' now"):
        check_definition(file, tiny_study(variants={"narrow": Variant()}), tmp_path)
    with pytest.raises(InputError, match=r"seeds: \[0\] when it began, \[1\] now"):
        check_definition(file, tiny_study(seeds=(1,)), tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "definition.json").write_text('{"variants": {"narrow": 1}}')
    with pytest.raises(InputError, match=r"definition\.json: is damaged"):
        check_definition(file, began, tmp_path / "damaged")
    # Fields that change no result, and further variants and seeds, are no other study.
    stages = (TrainingStage("distill", "configs/demo_distill.py", {"log_every": 7}),)
    more = tiny_study(stages=stages, variants={**began.variants, "wider": Variant()}, seeds=(0, 1))
    check_definition(file, more, tmp_path)
    with pytest.raises(InputError, match="variant 'wider'"):
        check_definition(file, tiny_study(seeds=(0, 1)), tmp_path)


# --------------------------------------------------------------------------------------------------------- processes
def task(folder, name, *programs):
    """A task of Python programs; each must create the file that its variable `result` names."""
    commands = []
    for number, program in enumerate(programs):
        result = folder / f"{name}_{number}"
        source = f"import os, signal, sys, time, pathlib\nresult = pathlib.Path({str(result)!r})\n{program}"
        commands.append(Command(str(number), (sys.executable, "-c", source), result, folder / f"{name}_{number}.log"))
    return Task(name, tuple(commands), folder / f"{name}.seconds")


def test_tasks_run_side_by_side_and_one_that_fails_ends_no_other(tmp_path):
    meet = "result.touch()\nwhile not (result.parent / {!r}).exists(): time.sleep(0.01)"
    tasks = [
        task(tmp_path, "a", meet.format("b_0"), "result.touch()"),
        task(tmp_path, "b", meet.format("a_0")),
        task(tmp_path, "c", "print('error: no such data'); sys.exit(2)", "result.touch()"),
        task(tmp_path, "d", "pass"),  # succeeds, but leaves no result
    ]
    failures = run_tasks(tasks, 2, {})
    assert set(failures) == {"c", "d"}
    assert "0 ended with exit code 2: error: no such data" in failures["c"] and "c_0.log" in failures["c"]
    assert (tmp_path / "a_1").exists() and not (tmp_path / "c_1").exists()
    assert set(json.loads((tmp_path / "a.seconds").read_text())) == {"0", "1"}


def test_what_has_a_result_is_not_repeated(tmp_path):
    (tmp_path / "a_0").touch()
    assert run_tasks([task(tmp_path, "a", "sys.exit(1)", "result.touch()")], 1, {}) == {}
    assert (tmp_path / "a_1").exists()


@pytest.mark.parametrize(("number", "raised"), [("SIGTERM", RunStoppedError), ("SIGINT", KeyboardInterrupt)])
def test_a_signal_lets_every_process_save_and_starts_no_other(tmp_path, number, raised):
    saves = "signal.signal(signal.SIGTERM, lambda *_: (result.with_suffix('.saved').touch(), sys.exit(75)))\n"
    asks = f"while not (result.parent / 'ready').exists(): time.sleep(0.01)\nos.kill(os.getppid(), signal.{number})\n"
    tasks = [
        task(tmp_path, "a", f"{saves}(result.parent / 'ready').touch()\ntime.sleep(60)"),
        task(tmp_path, "b", f"{saves}{asks}time.sleep(60)"),
        task(tmp_path, "c", "result.touch()"),
    ]
    with pytest.raises(raised):
        run_tasks(tasks, 2, {})
    assert (tmp_path / "a_0.saved").exists() and (tmp_path / "b_0.saved").exists()
    assert not (tmp_path / "c_0").exists()


def test_samples_have_the_change_where_chunks_begin_and_the_model_s_own_order(monkeypatch):
    _, caption = DigitVideos("train", seed=3).draw(0)
    # Frames grow brighter, twice as much from chunk to chunk.
    steps = np.where(np.arange(1, 21) % 3 == 0, 0.02, 0.01)
    videos = np.broadcast_to(np.concatenate([[0], steps.cumsum()])[:, None, None, None], (2, 21, 24, 24, 3))
    asked = []

    def sample_captions(model, count, description, solver, *, by_chunk):
        asked.append((count, solver, by_chunk))
        return videos, [caption] * 2

    monkeypatch.setattr("rehyat_jax.demo.measure.sample_captions", sample_captions)
    student = SimpleNamespace(config=TINY.replace(hybrid_blocks="all", hybrid=HybridConfig()))
    found = MEASURES["samples"].run(student, None, Sampled(40, {"steps": 8}, True))
    np.testing.assert_allclose(found["chunk_jump"], 2, rtol=1e-6)
    assert found.keys() == MEASURES["samples"].metrics.keys() and asked == [(40, {"steps": 8}, True)]


def test_a_figure_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    teacher = Path(pretrained(tmp_path))
    broken = dataclasses.replace(MEASURES["samples"], run=lambda *_: {"frame_accuracy": float("nan")})
    monkeypatch.setitem(MEASURES, "samples", broken)
    with pytest.raises(InputError, match="frame_accuracy is nan"):
        measure_model(teacher, teacher, ["samples"], 40)


# ------------------------------------------------------------------------------------------------------------ results
def record(values, headline="attention_error", trends=(), **changes):
    """A record of variants with one value for each seed."""
    runs = [
        Run(label, seed, {headline: value, f"{headline}_by_block": [value, value]}, 60.0, "a machine", "1.0 abc")
        for label, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    fields = dict(
        name="windows",
        title="Windows",
        question="Which window?",
        published="wider ones",
        headline=headline,
        trends=trends,
        variants=dict.fromkeys(values, "chunk_frames = 1"),
        runs=tuple(runs),
        teacher={},
        command="python -m rehyat_jax.study configs/studies/windows.py",
        versions={"rehyat_jax": "1.0"},
        date="2026-01-01",
    )
    return Record(**fields | changes)


SCORES = Trend("VBench", {"Tc 1": 80.97, "Tc 3": 82.17, "Tc 5": 82.48})


def test_sentences_compare_the_order_with_the_published_one():
    ordered = {"Tc 5": [0.1, 0.2], "Tc 1": [0.4, 0.5], "Tc 3": [0.2, 0.3]}
    best, trend = sentences(record(ordered, trends=(SCORES,)))
    assert best.startswith(
        "Best attention error: 0.1500 (Tc 5). Next: 0.2500 (Tc 3). The first is better in 2 of 2 seeds."
    )
    assert trend.endswith(
        "Published VBench, from worse to better: Tc 1: 80.97; Tc 3: 82.17; Tc 5: 82.48. Here, attention error: "
        "Tc 1: 0.4500; Tc 3: 0.2500; Tc 5: 0.1500. All 3 pairs of variants have the published order, in every seed."
    )
    one_seed_disagrees = ordered | {"Tc 3": [0.09, 0.5]}
    assert sentences(record(one_seed_disagrees, trends=(SCORES,)))[1].endswith("order, 1 of them in every seed.")
    swapped = ordered | {"Tc 5": [0.25, 0.35]}
    assert sentences(record(swapped, trends=(SCORES,)))[1].endswith(
        "2 of 3 pairs of variants have the published order, in every seed. The exceptions: Tc 3 and Tc 5."
    )
    # A higher accuracy is better, so the same numbers have the opposite order.
    assert sentences(record(ordered, "frame_accuracy", (SCORES,)))[1].endswith("have the opposite order.")
    # Equal published scores are no pair.
    saturated = Trend("VBench", {"Tc 1": 80.97, "Tc 3": 82.17, "Tc 5": 82.17})
    assert "All 2 pairs" in sentences(record(ordered, trends=(saturated,)))[1]


def test_variants_without_figures_are_left_out_of_sentences():
    values = {"Tc 1": [0.4], "Tc 3": [0.2]}
    unfinished = record(values | {"Tc 5": []}, trends=(SCORES,))
    assert sentences(unfinished)[1].endswith("The pair has the published order, in every seed.")
    assert sentences(record({"Tc 1": [0.4], "Tc 3": []}, trends=(SCORES,))) == []


def test_records_are_rendered_into_one_page(tmp_path, capsys):
    first = record({"Tc 1": [0.4, 0.6], "Tc 3": [0.2, 0.2], "Tc 5": []}, trends=(SCORES,))
    failed = dataclasses.replace(first.runs[0], values={}, failure="no data")
    second = dataclasses.replace(first, name="other", title="Other", runs=(failed, *first.runs[1:]))
    for each in (first, second):
        write_record(each, tmp_path / f"{each.name}.json")
        assert read_record(tmp_path / f"{each.name}.json") == each
    page = tmp_path / "docs" / "results.md"
    files = [str(tmp_path / f"{name}.json") for name in ("windows", "other")]
    assert command.main(["--render", str(page), *files]) == 0
    text = page.read_text()
    # The deviation of 0.4 and 0.6 is sqrt(2) / 10.
    assert "| Tc 1 | chunk_frames = 1 | 0.5000 ± 0.1414 | 0.4000 to 0.6000 | 2 |" in text
    assert "| Tc 5 | chunk_frames = 1 | not measured |" in text
    assert "Tc 1, seed 0, failed: no data" in text
    assert "| [Other](#other) | attention error | Tc 3: 0.2000 | Tc 1: 0.6000 | 1 of 1 |" in text
    for name in ("windows", "other"):
        assert f"(pictures/study_{name}.png)" in text
        assert (page.parent / "pictures" / f"study_{name}.png").read_bytes().startswith(b"\x89PNG")
    before = text
    assert command.main(["--render", str(page), *files]) == 0 and page.read_text() == before
    capsys.readouterr()
    assert command.main(["--render", str(page), files[0], files[0]]) == 2
    assert "found 'windows' twice" in capsys.readouterr().err
    fields = json.loads(Path(files[0]).read_text())
    fields["runs"][0]["values"]["attention_error"] = "0.4"
    (tmp_path / "x.json").write_text(json.dumps(fields))
    assert command.main(["--render", str(page), str(tmp_path / "x.json")]) == 2
    assert "a wrong value in the run of 'Tc 1', seed 0" in capsys.readouterr().err
    (tmp_path / "x.json").write_text('{"runs": 3}')
    assert command.main(["--render", str(page), str(tmp_path / "x.json")]) == 2
    assert "expected the record of a study" in capsys.readouterr().err
    assert page.read_text() == before


def test_a_record_tells_the_form_of_a_variant_in_words(tmp_path):
    file = Path("configs/studies/forms.py")
    variants = collect(file, read_study(file), tmp_path, {}).variants
    assert variants["hybrid"] == "none" and variants["hybrid, bidirectional"] == "causal = False"
    assert variants["strided, R 4"] == "kind = strided, stride = 4"


# -------------------------------------------------------------------------------------------------- a complete study
def test_a_stage_with_nothing_to_train_writes_the_teacher_with_its_forms(tmp_path):
    config = digits_config(tmp_path, "distill", forms=({"blocks": "all", "kind": "window"},))
    teacher, student = load_wan(config.init_from), load_wan(write_untrained(config, tmp_path / "run"))
    assert student.config.block_forms.of_block == (WindowForm(chunk_frames=2),) * 2
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(student)), nnx.to_pure_dict(nnx.state(teacher)))
    config.forms = ({"blocks": (0,), "kind": "window"},)  # block 1 is hybrid
    with pytest.raises(InputError, match=r"use rehyat_jax\.train"):
        write_untrained(config, tmp_path / "run")


STUDY = """
from rehyat_jax.studies.definition import Study, TrainingStage, Trend, Variant
def get_study():
    return Study(
        title="Tiny", question="Which?", published="wider ones",
        stages=(TrainingStage("distill", {config!r}),),
        variants={{"wide": Variant({{"hybrid.chunk_frames": 5}}), "broken": Variant({{"data.source": "prepared"}})}},
        measures=("attention_error", "velocity_error"), headline="attention_error", teacher={teacher!r}, seeds=(4,),
    )
"""


class InThisProcess:
    """Stands in for `subprocess.Popen`, whose processes take seconds to import everything: tests/test_surgery.py."""

    def __init__(self, argv, *, stdout, **options):
        module, output = importlib.import_module(argv[2]), io.TextIOWrapper(stdout, write_through=True)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            self.returncode = module.main(list(argv[3:]))
        output.detach()  # the log, which stays open

    def poll(self):
        return self.returncode


def test_a_study_trains_measures_and_reports_and_finished_runs_are_not_repeated(tmp_path, capfd, monkeypatch):
    own = SimpleNamespace(Popen=InThisProcess, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr("rehyat_jax.studies.processes.subprocess", own)
    train_on = train.train
    monkeypatch.setattr(train, "train", lambda config, workdir: train_on(config, workdir, jax.devices()[:1]))
    config = tiny_config("distill", steps=2, checkpoint_every=2, init_from="set by the study")
    config.optimizer.warmup_steps, config.hybrid.blocks, config.hybrid.feature_map.features = 1, "all", 16
    write_config(tmp_path / "distill.py", config)
    file, workdir = tmp_path / "tiny.py", tmp_path / "study"
    file.write_text(STUDY.format(config=str(tmp_path / "distill.py"), teacher=pretrained(tmp_path)))
    arguments = [str(file), "--workdir", str(workdir), "--jobs", "2"]
    assert command.main(arguments) == 3
    printed = capfd.readouterr()
    assert "broken, seed 4: failed, distill ended with exit code 2: error: config.data.path" in printed.err
    found = read_record(workdir / "study.json")
    wide, broken = found.runs
    values = wide.values
    # Two steps hardly train: attention with maps is not exact, and nothing is infinite.
    assert 0 < values["attention_error_exact"] < values["attention_error"] < 10
    assert len(values["attention_error_by_block"]) == 2 and values["velocity_error"] > 0
    assert wide.seconds > 0 and wide.hardware and broken.values == {} and "exit code 2" in broken.failure
    text = (workdir / "study.md").read_text()
    assert text.startswith("# Tiny\n") and f"| {values['attention_error']:.4f} ± 0.0000 |" in text
    assert "| broken |" in text and (workdir / "study.png").stat().st_size > 1000

    figures = run_folder(workdir, "wide", 4) / FIGURES
    before = figures.stat().st_mtime_ns, (workdir / "runs/wide/seed_4/distill.log").stat().st_size
    assert command.main([*arguments, "--only", "wide"]) == 0
    assert before == (figures.stat().st_mtime_ns, (workdir / "runs/wide/seed_4/distill.log").stat().st_size)
    figures.write_text('{"values": 3}')
    assert command.main([*arguments, "--only", "wide"]) == 2
    assert "figures.json: expected the figures of a run" in capfd.readouterr().err
    assert command.main([*arguments, "--only", "wider"]) == 2
    assert "did you mean 'wide'?" in capfd.readouterr().err
