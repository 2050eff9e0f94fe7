"""Every module that can be run explains itself, and the commands print nothing that alarms when all is well."""

import pkgutil
import runpy
import sys
from logging import WARNING, getLogger

import absl.logging
import pytest
from tiny_runs import TINY, digits_config, tiny_model, write_config

import rehyat_jax.benchmarks
from rehyat_jax import convert, sample, train
from rehyat_jax.weights import save_model

COMMANDS = [
    ["train"],
    ["sample"],
    ["convert"],
    ["convert", "from-torch"],
    ["convert", "to-torch"],
    ["convert", "publish"],
    ["prepare"],
    ["prepare", "latents"],
    ["prepare", "teacher-trajectories"],
    ["plan"],
    ["study"],
    ["studies.measure"],
    ["studies.untrained"],
    ["surgery"],
    ["selection.measure"],
    ["compare"],
    ["recipe"],
    ["evaluate"],
    ["evaluate", "vbench-videos"],
    ["demo"],
    ["completion"],
    ["demo.report"],
    ["demo.drift"],
    ["cost_model.tpu_compile"],
    ["benchmarks.gpu_run.process"],
    *([f"benchmarks.{module.name}"] for module in pkgutil.iter_modules(rehyat_jax.benchmarks.__path__)),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_a_description_the_options_and_an_example(command, option, capsys, monkeypatch):
    module, *subcommand = command
    monkeypatch.setattr(sys, "argv", [module, *subcommand, option])
    for name in (f"rehyat_jax.{module}", f"rehyat_jax.{module}.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"rehyat_jax.{module}", run_name="__main__")
        raise SystemExit(0)  # a module that ends by itself
    assert end.value.code == 0
    text = capsys.readouterr().out
    description, example = text.split("xample:\n")
    assert len(description) > 60 and "ptions" in description
    assert example.strip().startswith(f"python -m rehyat_jax.{'benchmarks.' if 'Another command' in text else module}")


def test_commands_that_succeed_print_no_warning(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(getLogger("absl"), "filters", [])  # of an earlier test's command
    config = digits_config(tmp_path, "distill", steps=2, checkpoint_every=1, batch_size=8)
    config.optimizer.warmup_steps, config.mesh.data = 1, 8
    write_config(tmp_path / "config.py", config)
    caplog.clear()
    capfd.readouterr()
    assert train.main([f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]) == 0
    model = str(tmp_path / "run" / "model")
    assert convert.main(["to-torch", model, str(tmp_path / "torch"), "--layout", "diffusers"]) == 0
    assert convert.main(["from-torch", str(tmp_path / "torch"), str(tmp_path / "back")]) == 0
    size = ["--frames", "2", "--height", "8", "--width", "8", "--steps", "1"]
    assert sample.main(["--checkpoint", model, "--prompt", "a two", "--out", str(tmp_path / "two.mp4"), *size]) == 0
    printed = capfd.readouterr()
    assert "distill: 100%" in printed.err and "wrote" in printed.out
    assert "warning" not in (printed.out + printed.err).lower(), printed.err
    # pytest takes absl's records before they are printed.
    assert [record.message for record in caplog.records if record.levelno >= WARNING] == []


def test_saving_a_model_from_python_silences_only_orbax_s_word_of_nothing_to_merge(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(getLogger("absl"), "propagate", True)
    monkeypatch.setattr(getLogger("absl"), "filters", [])  # of an earlier test's command
    _, params = tiny_model()
    save_model(tmp_path / "model", TINY, params, codec="space_to_depth", text_encoder="word_vectors")
    assert [record.message for record in caplog.records if record.levelno >= WARNING] == []
    absl.logging.warning("[process=0] Skipping merge of OCDBT checkpoints: another program's")
    absl.logging.warning("the disk is slow")
    assert len(caplog.records) == 2
