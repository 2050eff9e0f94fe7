"""The command that counts complete steps on a TPU."""

import json

import jax

from rehyat_jax.benchmarks import tpu_steps
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.planning.sampling.command import with_hybrid_blocks


def test_a_row_has_a_steps_cycles_memory_and_arithmetic(tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ["--preset", "tiny", "--frames", "5", "--size", "32x48", "--only", "sample", "--blocks", "hybrid"]
    assert tpu_steps.main([*options, "--topology", "v5e:1x1", "--details", "2", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["direction"], row["blocks"], row["topology"]) == ("sample", "hybrid", "v5e:1x1")
    assert 0 < row["kernel_cycles"] < row["cycles"] and row["compile_seconds"] > 0
    assert row["temporary_bytes"] < row["peak_bytes"] and row["flops"] > 0
    assert "| sample | hybrid |" in capsys.readouterr().out


def test_the_training_step_returns_the_loss_and_gradients_of_all_parameters():
    wan = with_hybrid_blocks(WAN_PRESETS["tiny"], "3")
    step = tpu_steps.Step("train", "mixed", wan, (2, 4, 4))
    _, case = step.case(2)
    lowered = tpu_steps.lowered_gradient(jax.devices()[:2], **case)
    parameters, *inputs = lowered.in_avals[0]
    loss, gradients = lowered.out_info
    assert loss.shape == () and [x.shape[0] for x in inputs] == [2] * 3  # a video a device
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), parameters
    )


def test_more_devices_than_the_topology_has_are_refused(capsys):
    assert tpu_steps.main(["--devices", "9", "--topology", "v5e:2x2"]) == 2
    assert "--devices 9: expected at most 4, the devices of v5e:2x2" in capsys.readouterr().err
