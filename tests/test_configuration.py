"""The table of a configuration's fields: checks, help and docs follow it; files and command lines that are wrong."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.plan import main as plan_main
from rehyat_jax.train import main
from rehyat_jax.training import fields_page
from rehyat_jax.training.config import check_config, default_config
from rehyat_jax.training.fields import BY_PATH, CHANGED, EFFECTS, ENTRIES, FIELDS, REFUSED, ROUNDED, SAME
from rehyat_jax.training.values import Blocks, Boolean, Choice, Entry, Integer, Real, Several, Text

DEFAULTS = {
    "stage": "finetune",
    "preset": "tiny",
    "init_from": "",
    "seed": 0,
    "hybrid.chunk_frames": 3,
    "hybrid.overlap_frames": 1,
    "hybrid.causal": True,
    "hybrid.stabilizer": "row_max",
    "hybrid.anchor_frames": 0,
    "hybrid.decay": False,
    "hybrid.feature_map.features": 256,
    "hybrid.feature_map.num_layers": 2,
    "hybrid.feature_map.degree": 2,
    "hybrid.feature_map.hidden_activation": "gelu",
    "hybrid.feature_map.output_activation": "relu",
    "hybrid.feature_map.input": "rotated",
    "hybrid.linear_window": False,
    "hybrid.feature_map.gate": False,
    "hybrid.feature_map.kind": "mlp",
    "hybrid.blocks": None,
    "forms": (),
    "data.source": "digits",
    "data.path": "",
    "data.workers": 0,
    "data.corrupt": "error",
    "data.weights": (),
    "steps": 1000,
    "batch_size": 16,
    "accumulation_steps": 1,
    "dtype": "bfloat16",
    "remat": "none",
    "attention_implementation": "",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-5,
    "optimizer.muon_learning_rate": 0.02,
    "optimizer.warmup_steps": 100,
    "optimizer.decay": "cosine",
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "distill.loss": "l1",
    "distill.clip_norm": 0.0,
    "distill.updates_per_batch": 1,
    "velocity.teacher": "",
    "velocity.teacher_weight": 0.0,
    "velocity.guidance_scale": 1.0,
    "few_step.steps": 4,
    "dmd.score_updates": 5,
    "dmd.score_rate": 1.0,
    "consistency.warmup_steps": 1000,
    "lora.rank": 0,
    "lora.alpha": 0.0,
    "lora.targets": ("query", "key", "value", "output"),
    "ema_decay": 0.99,
    "flow_shift": 5.0,
    "timestep_sampling": "logit_normal",
    "noise_by_chunk": False,
    "teacher_forcing": False,
    "caption_dropout": 0.1,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.context": 1,
    "mesh.tensor": 1,
    "spike_factor": 10.0,
    "max_skipped": 10,
    "log_every": 10,
    "profile": (),
    "evals": (),
    "checkpoint_every": 500,
    "keep_checkpoints": 2,
    "keep_every": 0,
    "keep_best": 0,
    "checkpoint_dir": "",
}

EFFECT_OF = {
    SAME: "log_every checkpoint_every keep_checkpoints keep_every keep_best evals profile checkpoint_dir data.workers "
    "max_skipped",
    ROUNDED: "remat attention_implementation mesh.data mesh.fsdp mesh.context mesh.tensor",
    CHANGED: "steps accumulation_steps dtype data.path data.corrupt ema_decay flow_shift timestep_sampling "
    "caption_dropout spike_factor optimizer.learning_rate optimizer.muon_learning_rate optimizer.warmup_steps "
    "optimizer.decay optimizer.weight_decay optimizer.clip_norm distill.loss distill.clip_norm "
    "velocity.teacher velocity.teacher_weight velocity.guidance_scale few_step.steps dmd.score_rate "
    "consistency.warmup_steps",
}


def test_defaults_are_those_of_earlier_versions():
    config = default_config()
    found = traverse_util.flatten_dict(config.to_dict(), sep=".")
    assert found == DEFAULTS
    assert {path: type(value) for path, value in found.items()} == {p: type(v) for p, v in DEFAULTS.items()}
    assert config.is_locked and config.hybrid.get_type("blocks") is object


def test_effects_on_a_resumed_run_are_those_of_earlier_versions():
    expected = dict.fromkeys(DEFAULTS, REFUSED)
    expected |= {path: effect for effect, paths in EFFECT_OF.items() for path in paths.split()}
    assert {field.path: field.effect for field in FIELDS} == expected and set(EFFECTS) >= set(expected.values())
    assert [field.path for field in FIELDS if field.refusal] == ["steps", "ema_decay"]


def test_the_table_has_every_field_of_a_form():
    expected = traverse_util.flatten_dict({"hybrid": dataclasses.asdict(HybridConfig())}, sep=".")
    found = {field.path: field.default for field in FIELDS if field.path.startswith("hybrid.")}
    assert found == expected | {"hybrid.blocks": None}


def test_every_default_is_allowed():
    for field in FIELDS:
        field.allowed.check(field.default, field.path)
    check_config(valid_config())


def test_the_page_of_fields_is_up_to_date():
    # `python -m rehyat_jax.training.fields_page` writes it anew.
    assert fields_page.PAGE.read_text(encoding="utf-8") == fields_page.fields_page()


def test_help_lists_every_field(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for field in FIELDS:
        assert f"--config.{field.path} (" in text and " ".join(str(field.allowed).split()) in words
    assert max(map(len, text.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------- values not allowed

NO_NUMBERS = st.sampled_from(["", "many", "1e", None, (), (1,), {}, b"1", np.ones(2)])
NO_TEXT = st.sampled_from([None, 0, 1.5, True, (), ("a",), b"a", {}])


def outside(allowed):
    """Values that are not allowed."""
    match allowed:
        case Integer(low, high, also):
            beyond = st.integers(max_value=low - 1) | st.integers(min_value=high + 1) | st.just(10**5000)
            numbers = beyond.filter(lambda value: value not in also)
            return numbers | st.booleans() | st.floats() | NO_NUMBERS | st.just(str(low)) | st.just(np.int64(low))
        case Real(low, high, above, below):
            beyond = st.floats(max_value=low, exclude_max=not above, allow_infinity=True)
            if high < float("inf"):
                beyond |= st.floats(min_value=high, exclude_min=not below, allow_infinity=True)
            special = st.sampled_from([float("nan"), float("inf"), float("-inf"), 10**400, -(10**400)])
            return beyond | special | st.booleans() | NO_NUMBERS | st.just(str(low))
        case Choice(names):
            return st.text(max_size=8).filter(lambda value: value not in tuple(names)) | NO_TEXT
        case Text():
            return NO_TEXT | st.just("a\0b")
        case Boolean():
            return st.sampled_from([None, 0, 1, "True", "", ()])
        case Blocks(may_be_unset):
            wrong = [(0.5,), (-1,), (1, 1), (2, 1), (True,), ("a",), (None,), ((0,),), "some", "", 3, True, {}, {0}]
            return st.sampled_from(wrong if may_be_unset else [*wrong, None])
        case Several(each):
            return outside(each).map(lambda value: (value,)) | st.sampled_from([None, 3, "a", {}])
        case Entry():
            return st.sampled_from([None, 3, "a", (), {1: 2}])
    raise AssertionError(allowed)


def valid_config(**changes):
    config = default_config()
    config.init_from = "somewhere"
    config.update_from_flattened_dict(changes)
    return config


def with_value(config, path, value):
    """The configuration with a field of whatever type."""
    *groups, name = path.split(".")
    for group in groups:
        config = config[group]
    with config.unlocked():
        del config[name]  # and its type with it
        config[name] = value


few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("path", BY_PATH)
def test_a_value_outside_is_refused_and_its_field_is_named(path):
    @few
    @given(value=outside(BY_PATH[path].allowed))
    def check(value):
        config = valid_config()
        with_value(config, path, value)
        with pytest.raises(InputError) as error:
            check_config(config)
        message = str(error.value)
        assert message.startswith(f"config.{path}") and len(message) < 600 and "\n" not in message

    check()


IN_FORMS = {path.removeprefix("hybrid."): field for path, field in BY_PATH.items() if path.startswith("hybrid.")}
IN_FORMS |= {field.path: field for field in ENTRIES["forms"]}


@pytest.mark.parametrize("path", IN_FORMS)
def test_a_value_outside_in_a_form_of_other_blocks_is_refused_and_its_field_is_named(path):
    @few
    @given(value=outside(IN_FORMS[path].allowed))
    def check(value):
        entry = {"blocks": (1,), **traverse_util.unflatten_dict({path: value}, sep=".")}
        config = valid_config(forms=({"blocks": (0,), "chunk_frames": 2}, entry))
        with pytest.raises(InputError) as error:
            check_config(config)
        assert str(error.value).startswith(f"config.forms[1].{path} must be ")

    check()


@pytest.mark.parametrize("field", ENTRIES["evals"], ids=lambda field: field.path)
def test_a_value_outside_in_an_evaluator_is_refused_and_its_field_is_named(field):
    @few
    @given(value=outside(field.allowed))
    def check(value):
        config = valid_config(evals=({"type": "flow_loss", "every": 1, field.path: value},))
        with pytest.raises(InputError) as error:
            check_config(config)
        assert str(error.value).startswith(f"config.evals[0].{field.path} must be ")

    check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forms": ({"block": (0,)},)}, ["config.forms[0].blocks must be", "None"]),
        ({"forms": ({"blocks": (0,), "chunk_frame": 3},)}, ["config.forms[0].chunk_frame'", "'chunk_frames'"]),
        ({"forms": ({"blocks": (0,), "kind": "softmax", "chunk_frames": 3},)}, ["config.forms[0].chunk_frames'"]),
        ({"forms": ({"blocks": (0,), "feature_map": 3},)}, ["config.forms[0].feature_map must be a dictionary"]),
        ({"forms": ({"blocks": (0,), "feature_map": {"kinds": 3}},)}, ["config.forms[0].feature_map.kinds'", "'kind'"]),
        ({"forms": ({"blocks": (0,), "overlap_frames": 4},)}, ["config.forms[0]: overlap_frames", "found 4"]),
        ({"forms": ({"blocks": (0,), "feature_map": {"features": 3}},)}, ["config.forms[0]: feature_map.features (3)"]),
        (
            {"hybrid.feature_map.kind": "hedgehog", "hybrid.feature_map.degree": 3},
            ["config.hybrid: feature_map.degree"],
        ),
        ({"evals": ({"every": 3},)}, ["config.evals[0].type", "None"]),
        ({"evals": ({"type": "flow_loss"},)}, ["config.evals[0].every", "None"]),
        ({"data.weights": (1, 2.5, "a")}, ["config.data.weights[2]", "'a'"]),
        ({"lora.targets": ("query", "keys")}, ["config.lora.targets[1]", "did you mean 'key'"]),
        ({"lora.rank": 4, "lora.targets": ()}, ["config.lora: targets must be some of", "found ()"]),
        ({"stage": "distill", "lora.rank": 4}, ["config.lora.rank is 4", '"velocity" and "finetune"', "'distill'"]),
        ({"lora.rank": 4, "optimizer.name": "muon"}, ["config.optimizer.name", "config.lora.rank = 4", '"muon"']),
        ({"mesh.tensor": 0}, ["config.mesh.tensor", "-1 or an integer from 1", "found 0"]),
        (
            {"stage": "distill", "distill.updates_per_batch": 2},
            ["config.distill.updates_per_batch (2)", "config.optimizer.clip_norm = 0, found 1.0"],
        ),
    ],
)
def test_values_that_are_wrong_together_or_within_an_entry_are_named(changes, words):
    with pytest.raises(InputError) as error:
        check_config(valid_config(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_fields_that_are_missing_or_unknown_are_named():
    config = valid_config()
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(InputError, match=r"config\.optimizer\.learning_rat' .*config\.optimizer\.learning_rate\?"):
        check_config(config)
    config = valid_config()
    with config.unlocked():
        del config.optimizer.decay
    with pytest.raises(InputError, match=r"config\.optimizer\.decay is missing"):
        check_config(config)
    config = valid_config()
    with_value(config, "mesh", 3)
    with pytest.raises(InputError, match=r"config\.mesh\.data is missing"):
        check_config(config)
    with pytest.raises(InputError, match=r"is not a field"):
        check_config(ConfigDict({"steps": 3, "a": 1}))


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def default_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("configuration") / "config.py"
    file.write_text(
        "from rehyat_jax.training.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.init_from = 'nowhere'\n"
        "    return config\n"
    )
    return file


def refused(capsys, *arguments, main=main):
    """The one line that the command prints before it ends with 2."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and not captured.out
    return line


OUTSIDE_AS_TEXT = {
    Integer: ("-2", str(2**40), "1.5", "True", "many", "nan", "9" * 5000),
    Real: ("-1e30", "nan", "inf", "-inf", "1e999", "many"),
    Choice: ("nothing", "A"),
    Boolean: ("maybe", "2"),
    Blocks: ("(0.5,)", "(2,1)", "-1", "some", "True"),
    Several: ("(-1,)", "('a',)", "(nan,)", "(None,)"),
    Text: (),
}


@pytest.mark.parametrize("path", BY_PATH)
def test_the_command_refuses_a_value_outside_and_names_the_field(tmp_path, capsys, default_file, path):
    for value in OUTSIDE_AS_TEXT[type(BY_PATH[path].allowed)]:
        line = refused(capsys, f"--config={default_file}", f"--workdir={tmp_path / 'r'}", f"--config.{path}={value}")
        assert f"config.{path}" in line and len(line) < 700
    assert not (tmp_path / "r").exists()


@settings(few, max_examples=60)
@given(data=st.data())
def test_the_command_refuses_numbers_outside(default_file, data):
    field = data.draw(st.sampled_from([field for field in FIELDS if isinstance(field.allowed, Integer | Real)]))
    value = data.draw(outside(field.allowed).filter(lambda value: type(value) in (int, float)))
    shown = "9" * 5000 if type(value) is int and abs(value) > 10**4000 else value
    assert main([f"--config={default_file}", "--workdir=/nowhere/r", f"--config.{field.path}={shown}"]) == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.learning_rate=1", ["config.learning_rate'", "config.optimizer.learning_rate?"]),
        ("--config.stepz=1", ["config.stepz'", "config.steps?"]),
        ("--config.stepz.a=1", ["config.stepz.a'"]),
        ("--config.steps.a=1", ["config.steps.a'", "config.steps?"]),
        ("--noconfig.hybrid.casual", ["config.hybrid.casual'", "config.hybrid.causal?"]),
        ("--config.steps", ["config.steps"]),
        ("--config.hybrid.blocks", ["config.hybrid.blocks must be", "found True"]),
        ("--config.mesh=3", ["config.mesh"]),
        ("--config.mesh={'data': 1}", ["config.mesh.fsdp is missing"]),
        ("--config.evals=abc", ["config.evals[0] must be a dictionary", "'abc'"]),
        ("--config.evals=({'type': 'flow_loss', 'every': 0},)", ["config.evals[0].every", "found 0"]),
        ("--config.evals=({'type': 'flow_los', 'every': 1},)", ["config.evals[0].type", "flow_loss", "flow_los"]),
        ("--config.evals=({'type': 'flow_loss', 'every': 1, 'batch': 2},)", ["config.evals[0]: ", "'batch'"]),
        ("--config.forms[0].chunk_frames=3", ["cannot be understood"]),
        ("--config.forms=" + "(" * 300, ["config.forms"]),
        ("--config.hybrid.blocks=" + "-" * 100_000 + "1", ["error"]),
        ("--config.=1", ["cannot be understood"]),
        (f"--config.{'x' * 10_000}=1", ["xxx ... (", "is not a field"]),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_named(tmp_path, capsys, default_file, argument, words):
    line = refused(capsys, f"--config={default_file}", f"--workdir={tmp_path / 'run'}", argument)
    assert all(word in line for word in words) and len(line) < 1000, line
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- configuration files

START = "from rehyat_jax.training.config import default_config\ndef get_config():\n    config = default_config()\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def get_config():\n    return (\n", ["config.py:2: SyntaxError: '(' was never closed"]),
        ("\nimport no_such_module\n", ["config.py:2: ModuleNotFoundError", "no_such_module"]),
        ("from rehyat_jax.training.config import default_confi\n", ["config.py:1: ImportError", "default_confi"]),
        ("x = 1\n", ["config.py: expected a function get_config", "no such function"]),
        ("get_config = 3\n", ["config.py: TypeError"]),
        ("def get_config(size):\n    return size\n", ["config.py: TypeError", "size"]),
        ("def get_config():\n    return {'steps': 3}\n", ["default_config()", "found {'steps': 3}"]),
        (START, ["default_config()", "found None"]),
        (f"{START}    config.steps = 1 / 0\n    return config\n", ["config.py:4: ZeroDivisionError: division by zero"]),
        (f"{START}    raise ValueError('not\\n today')\n", ["config.py:4: ValueError: not today"]),
        (f"{START}    config.stepz = 3\n    return config\n", ["config.py:4: AttributeError", "stepz", '"steps"']),
        (f"{START}    config.steps = 'many'\n    return config\n", ["config.py:4: TypeError", "steps", "many"]),
        (f"{START}    config.steps = 1.5\n    return config\n", ["config.py:4: TypeError", "steps", "1.5"]),
        (f"{START}    config.ema_decay = 10**400\n    return config\n", ["config.py:4: OverflowError"]),
        (f"{START}    config.steps = 10**5000\n    return config\n", ["config.steps must be", "too large to show"]),
        (f"{START}    config.steps = True\n    return config\n", ["config.steps must be an integer", "found True"]),
        (f"{START}    config.init_from = 'a\\0b'\n    return config\n", ["config.init_from must be text"]),
        (f"{START}    exit()\n", ["config.py:4: SystemExit"]),
        ("def get_config():\n    return get_config()\n", ["config.py:2: RecursionError"]),
        (b"\x7fELF\x00\x01\xff\xfe", ["config.py", "cannot contain null bytes"]),
        (b"x = 1\n\xff\xfe\n", ["config.py", "SyntaxError", "0xff"]),
        (b"#" * (2**20 + 1), ["config.py: expected a file of at most 1,048,576 bytes, found 1,048,577"]),
        ("import sibling\nget_config = sibling.get_config\n", ["sibling.py:2: KeyError: 'gone'"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_configuration_file_that_cannot_be_run_is_named_with_its_line(tmp_path, capsys, monkeypatch, content, words):
    file = tmp_path / "config.py"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "sibling.py").write_text("def get_config():\n    return {}['gone']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "--config=config.py", "--workdir=run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_is_no_file_is_named(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path, "found a directory"),
        (tmp_path / "none.py", "none.py: cannot be read (No such file or directory)"),
        (tmp_path / "fifo", "found a named pipe"),
        ("/dev/zero", "found a device"),
        ("", "found a directory"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
    ):
        line = refused(capsys, f"--config={path}", f"--workdir={tmp_path / 'run'}")
        assert words in line and len(line) < 700
    assert "found a directory" in refused(capsys, f"--config={tmp_path}", "--topology=v5e:2x2", main=plan_main)


def test_an_argument_after_the_file_s_name_reaches_it(tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "import dataclasses\n"
        "from rehyat_jax.training.config import default_config\n"
        "@dataclasses.dataclass\n"
        "class Sizes:\n"
        "    steps: 'int'\n"
        "def get_config(steps):\n"
        "    config = default_config()\n"
        "    config.steps = Sizes(int(steps)).steps\n"
        "    return config\n"
    )
    line = refused(capsys, f"--config={file}:50", f"--workdir={tmp_path / 'run'}")
    assert "config.optimizer.warmup_steps (100) must be less than config.steps (50)" in line
    assert list(tmp_path.iterdir()) == [Path(file)]
