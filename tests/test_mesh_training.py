"""Training on eight virtual devices, and in two processes, against training on one device."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tpu_topologies  # noqa: F401, what libtpu must know before it is loaded
from attention_oracles import error_ratio
from jax.experimental import topologies
from jax.sharding import PartitionSpec
from prepared_data import example, flip_a_bit, write_data_set
from tiny_runs import digits_config, interrupt_at, pretrained, tiny_config, tiny_model, write_config

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.parallel.mesh import AXES, BATCH, make_mesh, part_of_process, resolve_sizes
from rehyat_jax.parallel.sharding import FSDP
from rehyat_jax.train import main, train
from rehyat_jax.training.metrics import MetricWriter
from rehyat_jax.training.optimizer import make_optimizer
from rehyat_jax.training.setup import abstract_model, initial_model
from rehyat_jax.training.step import init_state, state_specs
from rehyat_jax.weights import load_params, save_model

# One device and several add the same float32 numbers in another order; Adam's first steps divide by their sizes.
LOSS = 1e-5
PARAMS = 2e-4


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is nearly all that these tests cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def on(config, sizes):
    config = config.copy_and_resolve_references()
    config.mesh.update(dict(zip(AXES, sizes, strict=True)))
    return config


def run(config, workdir, sizes):
    count = int(np.prod(sizes))
    return train(on(config, sizes), workdir, jax.devices()[:count])


def logged(workdir, name):
    return [json.loads(line).get(name) for line in (workdir / "metrics.jsonl").open()]


def assert_same_run(found, expected):
    assert_same_updates(found, expected)
    assert logged(found, "skipped_records") == logged(expected, "skipped_records")


def assert_same_updates(found, expected):
    np.testing.assert_allclose(logged(found, "loss"), logged(expected, "loss"), rtol=LOSS)
    ratios = jax.tree.map(error_ratio, *(load_params(path / "model")[1] for path in (found, expected)))
    assert max(jax.tree.leaves(ratios)) < PARAMS, ratios


def two_heads(tmp_path, num_layers=2):
    """A softmax teacher with two heads, so that they can be cut."""
    config = WAN_PRESETS["tiny"].replace(num_layers=num_layers, ffn_dim=64, num_heads=2, head_dim=16)
    save_model(tmp_path / "two", config, tiny_model(config)[1], codec="space_to_depth", text_encoder="word_vectors")
    return str(tmp_path / "two")


def data_with_a_corrupt_record(folder):
    """12 prepared examples, of which one cannot be read."""
    examples = [example(number, (8, 6, 6, 16)) for number in range(12)]
    for number, one in enumerate(examples):
        one["latents"] = np.random.default_rng(number).standard_normal((8, 6, 6, 16), np.float32)
    write_data_set(folder, examples, codec="space_to_depth")
    flip_a_bit(folder / "000001-8x6x6x16.array_record", "5.mp4")
    return {"data.source": "prepared", "data.path": str(folder), "data.corrupt": "skip", "data.workers": 1}


CASES = {
    "distill": {"ema_decay": 0.9, "steps": 10},
    "finetune": {"ema_decay": 0.9, "accumulation_steps": 2, "remat": "block"},
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """{stage: (configuration, directory of its run on one device)}."""
    runs = {}
    for stage, changes in CASES.items():
        folder = tmp_path_factory.mktemp(stage)
        if stage == "distill":
            changes = changes | data_with_a_corrupt_record(folder / "data")
        teacher = two_heads(folder, num_layers=3 if stage == "distill" else 2)
        config = digits_config(folder, stage, init_from=teacher, batch_size=8, **changes)
        config.hybrid.blocks, config.hybrid.chunk_frames, config.hybrid.feature_map.features = (1,), 2, 16
        if stage == "distill":  # softmax, and two forms of different chunks and feature maps
            config.forms = ({"blocks": (2,), "chunk_frames": 3, "feature_map": {"kind": "hedgehog"}},)
        config.optimizer.learning_rate = 1e-3
        run(config, folder / "run", (1, 1, 1, 1))
        runs[stage] = config, folder / "run"
    assert logged(runs["distill"][1], "skipped_records")[-1] == 7  # of 80 draws of 12 examples
    return runs


def test_a_distillation_on_many_devices_is_that_on_one(single, tmp_path):
    config, expected = single["distill"]
    config = config.copy_and_resolve_references()
    config.data.workers = 0  # a worker process takes seconds to start
    run(config, tmp_path / "run", (1, 2, 2, 2))
    assert_same_run(tmp_path / "run", expected)


def test_several_updates_of_a_batch_on_many_devices_are_those_on_one(single, tmp_path):
    config = single["distill"][0].copy_and_resolve_references()
    config.forms, config.data.workers = (), 0
    config.optimizer.clip_norm, config.optimizer.warmup_steps, config.steps = 0.0, 1, 2
    config.distill.updates_per_batch, config.distill.clip_norm, config.distill.loss = 2, 0.1, "energy_l2"
    for name, sizes in (("one", (1, 1, 1, 1)), ("many", (1, 2, 2, 2))):
        run(config, tmp_path / name, sizes)
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_a_finetuning_that_goes_on_on_another_mesh_is_that_on_one_device(single, tmp_path):
    config, expected = single["finetune"]
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricWriter, "write", interrupt_at(4, MetricWriter.write))
        run(config, tmp_path / "run", (2, 1, 2, 2))
    run(config, tmp_path / "run", (1, 2, 4, 1))
    assert_same_run(tmp_path / "run", expected)


def test_no_device_holds_more_than_its_part(tmp_path):
    """Of what is cut at all: kernels, not biases and norms."""
    config = on(digits_config(tmp_path, "finetune", init_from=two_heads(tmp_path)), (1, 2, 2, 2))
    config.hybrid.blocks, config.hybrid.feature_map.features = "all", 16
    with jax.set_mesh(make_mesh(config.mesh)):
        model = initial_model(config)
    cut = 0
    for leaf, spec in zip(
        jax.tree.leaves(model.params),
        jax.tree.leaves(model.specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
        strict=True,
    ):
        parts = int(np.prod([{FSDP: 4, "tensor": 2}.get(axis, 1) for axis in spec]))
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}
        cut += leaf.size * (parts > 1)
    assert cut > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize("preset", ["t2v-1.3B", "t2v-14B"])
def test_published_sizes_are_cut_where_they_are_large(preset):
    wan = WAN_PRESETS[preset].replace(hybrid_blocks="all")
    _, params, specs = abstract_model(wan, tiny_config("finetune"))
    small = sum(
        leaf.size
        for leaf, spec in zip(
            jax.tree.leaves(params),
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
            strict=True,
        )
        if FSDP not in tuple(spec)
    )
    assert small < 2e-3 * sum(leaf.size for leaf in jax.tree.leaves(params))


# --------------------------------------------------------------------------------------------------------- processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_in_two_processes(config, workdir, sizes, *, meanwhile=lambda processes: None, code=0):
    """`python -m rehyat_jax.train` twice, with half of the devices each; both outputs, once they end with `code`."""
    path = workdir.parent / "config.py"
    write_config(path, on(config, sizes))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(int(np.prod(sizes)) // 2),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "rehyat_jax.train", f"--config={path}", f"--workdir={workdir}"]
    command += [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={number}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        meanwhile(processes)
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], outputs
    return outputs


def test_two_processes_train_as_one_through_an_unreadable_record_other_meshes_and_a_sigterm(single, tmp_path):
    """One process cannot read a record; later SIGTERM reaches one while they save, and every video is cut over both."""
    config, expected = single["distill"]
    config, workdir = config.copy_and_resolve_references(), tmp_path / "run"
    config.data.corrupt, config.checkpoint_every = "error", 100
    outputs = run_in_two_processes(config, workdir, (1, 2, 1, 2), code=2)
    messages = sorted(stderr for _, stderr in outputs)
    named = [process for process, (_, stderr) in enumerate(outputs) if "array_record: record 1" in stderr]
    assert len(named) == 1, messages
    (saved,) = saved_steps(workdir)
    assert f"processes {named} cannot read their part of step {saved + 1}" in outputs[1 - named[0]][1]

    # `single` skips the record in a worker process.
    config.data.corrupt, config.data.workers, config.checkpoint_every = "skip", 0, 1
    log = workdir / "metrics.jsonl"

    def stop_one_while_they_save(processes):
        deadline = time.monotonic() + 200
        while len(log.read_text().splitlines()) <= saved:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)

    outputs = run_in_two_processes(config, workdir, (1, 1, 2, 1), meanwhile=stop_one_while_they_save, code=75)
    assert f"after step {saved}" in outputs[0][0] and "continuing" not in outputs[1][0]
    assert all("stopped by SIGTERM after everything was saved" in stderr for _, stderr in outputs)
    assert "step/s" in outputs[0][1] and "step/s" not in outputs[1][1]  # one process logs
    made = len(logged(workdir, "loss"))
    assert saved < made < config.steps and max(saved_steps(workdir)) == made

    outputs = run_in_two_processes(config, workdir, (1, 1, 2, 1))
    assert f"after step {made}" in outputs[0][0]
    assert "wrote" in outputs[0][0] and "wrote" not in outputs[1][0]
    assert_same_updates(workdir, expected)
    assert logged(workdir, "skipped_records")[-1] == logged(expected, "skipped_records")[-1]
    shutil.rmtree(workdir / "model")
    run(config, workdir, (1, 2, 1, 1))  # and in one, which only writes the model
    assert_same_updates(workdir, expected)


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").iterdir()]


def parts_of(topology, sizes, **options):
    """The part of each process of a TPU slice that is not there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), devices)
    return [part_of_process(mesh, process) for process in sorted({device.process_index for device in devices})]


def test_processes_of_a_tpu_slice_read_neighbouring_parts_and_those_that_share_a_video_the_same():
    assert parts_of("v5e:4x4", (1, 16, 1, 1)) == [(n, 4) for n in range(4)]
    assert parts_of("v5e:4x4", (1, 2, 8, 1)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert parts_of("v5e:4x4", (1, 1, 4, 4)) == [(0, 1)] * 4
    assert parts_of("v5p:2x2x4", (2, 4, 1, 2)) == [(n, 4) for n in range(4)]
    assert parts_of("v5e:4x4", (2, 16, 1, 1), num_slices=2) == [(n, 8) for n in range(8)]
    assert parts_of("v5e:4x4", (1, 32, 1, 1), num_slices=2) == [(n, 8) for n in range(8)]
    with pytest.raises(InputError, match=r"multiple of the 2 slices.* found data 1 and fsdp 1; mesh\.data=2"):
        parts_of("v5e:4x4", (1, 1, 8, 4), num_slices=2)


@pytest.mark.parametrize("topology", ["v5e:4x8", "v6e:4x4", "v6e:8x8", "v5p:2x4x4", "tpu7x:2x2x2"])
def test_every_mesh_of_powers_of_two_fits_every_slice(topology):
    for data, context, tensor in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4)):
        if data * context * tensor <= 16:
            parts_of(topology, (data, -1, context, tensor))


def test_optimizer_moments_are_where_their_parameters_are():
    wan = WAN_PRESETS["t2v-1.3B"].replace(hybrid_blocks="all")
    for name in ("adamw", "muon"):
        config = tiny_config("finetune", **{"optimizer.name": name})
        _, params, specs = abstract_model(wan, config)
        state = jax.eval_shape(lambda params: init_state(params, make_optimizer(config), keep_ema=True), params)  # noqa: B023
        leaves = jax.tree.leaves(state_specs(state, specs), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        whole = sum(
            leaf.size for leaf, spec in zip(jax.tree.leaves(state), leaves, strict=True) if FSDP not in tuple(spec)
        )
        assert whole < 5e-3 * sum(leaf.size for leaf in jax.tree.leaves(state))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [
        ((1, -1, 1, 1), 8, (1, 8, 1, 1)),
        ((2, -1, 2, 1), 8, (2, 2, 2, 1)),
        ((2, 2, 2, 1), 8, (2, 2, 2, 1)),
    ],
)
def test_one_axis_takes_what_is_left(sizes, devices, expected):
    assert tuple(resolve_sizes(dict(zip(AXES, sizes, strict=True)), devices).values()) == expected


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((1, 3, 1, 1), r"does not make 8 devices; .* these would fit: mesh\.fsdp=8"),
        (
            (1, -1, 3, 1),
            r"context 3 x tensor 1 does not make 8 devices; .* would fit: mesh\.context=1, mesh\.context=2,",
        ),
        ((1, -1, 3, 3), r"no size of one axis would fit: change two"),
        ((-1, -1, 1, 1), r"only one axis can be -1, found \['data', 'fsdp'\]"),
        ((0, 8, 1, 1), r"mesh\.data must be -1 or an integer from 1"),
        ((8, 1, 1, 1), r"data 8 x fsdp 1 must divide the 4 examples .*; data x fsdp of 1, 2, 4 would fit"),
        ((1, 4, 1, 2), r"mesh\.tensor .*which does not divide a dimension of 1|tensor must divide .* 1 heads"),
    ],
)
def test_meshes_that_do_not_fit_are_named_with_those_that_would(tmp_path, sizes, message):
    config = on(digits_config(tmp_path, "finetune", steps=1, **{"optimizer.warmup_steps": 0}), sizes)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")


def test_the_command_says_which_mesh_would_fit(tmp_path, capsys):
    arguments = ["--config=configs/demo_finetune.py", f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=3"]
    assert main([*arguments, f"--config.init_from={pretrained(tmp_path)}"]) == 2
    assert "mesh.fsdp=8" in capsys.readouterr().err
    assert BATCH == ("data", "fsdp")
