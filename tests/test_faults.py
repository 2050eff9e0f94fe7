"""What can go wrong in a run: kills, damage, useless updates, another command. `make fault-test` has more."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fault_runs import DAMAGE, ROOT, FaultRun, fill, saved, saved_model, tmpfs
from jax.sharding import NamedSharding, PartitionSpec
from prepared_data import example, write_data_set
from safetensors.numpy import load_file, save_file
from tiny_runs import digits_config, pretrained, tiny_config, write_config

from rehyat_jax.convert import main as convert_main
from rehyat_jax.errors import InputError, RunDivergedError
from rehyat_jax.files.fingerprint import SAMPLED_BYTES, fingerprint
from rehyat_jax.files.lock import locked
from rehyat_jax.files.temporary import new_token, temporary_path
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.parallel.sharding import host_shardings
from rehyat_jax.planning.memory import check_memory, reported_memory_errors
from rehyat_jax.planning.train_step import abstract_step
from rehyat_jax.train import main, train
from rehyat_jax.training import step as training_step
from rehyat_jax.training.checkpoints import Keep, RunCheckpoints
from rehyat_jax.training.checksums import CHECKSUMS, MAY_BE_MISSING, NOT_COVERED
from rehyat_jax.training.config import default_config
from rehyat_jax.training.continuation import check_continuation, describe_run
from rehyat_jax.training.fields import CHANGED, REFUSED, SAME
from rehyat_jax.training.metrics import MetricWriter, SkippedStep
from rehyat_jax.training.setup import initial_model, open_data
from rehyat_jax.training.step import accumulate, gradient_update, init_state, make_step
from rehyat_jax.training.stop_signal import StopSignal
from rehyat_jax.training.trouble import next_batch
from rehyat_jax.weights.load import checkpoint_files, load_params
from rehyat_jax.weights.model_checkpoint import save_model

# ------------------------------------------------------------------------------------------------------------- kills


def test_a_run_that_is_killed_and_stopped_again_and_again_ends_as_if_nothing_had_happened(tmp_path):
    changes = {"steps": 40, "checkpoint_every": 4, "keep_every": 4, "batch_size": 1, "ema_decay": 0.9}
    config = digits_config(tmp_path, "finetune", **changes)
    whole, run = FaultRun(tmp_path, config, "whole"), FaultRun(tmp_path, config)
    assert whole.start().end() == 0, whole.log.read_text()

    run.start()
    assert run.wait_for(lambda: run.steps() and run.is_saving())
    assert run.kill()
    newest = run.steps()[-1]
    assert saved(run.checkpoints / str(newest)) == saved(whole.checkpoints / str(newest))

    run.start()
    assert run.wait_for(lambda: run.last_step() >= newest + 5)
    assert run.end(signal.SIGTERM) == 75
    assert "stopped by SIGTERM after everything was saved" in run.log.read_text()
    assert run.steps()[-1] == (stopped := run.last_step()) < 36  # no step was lost

    run.start()
    assert run.wait_for(lambda: run.last_step() > stopped and run.is_saving())
    assert run.end(signal.SIGINT) == 130, run.log.read_text()
    assert "Traceback" not in run.log.read_text() and "interrupted" in run.log.read_text().splitlines()[-1]

    assert run.start().end() == 0, run.log.read_text()
    assert saved_model(run.workdir) == saved_model(whole.workdir)
    assert run.metrics() == whole.metrics()
    assert saved(run.checkpoints / "40") == saved(whole.checkpoints / "40")


def test_sigterm_before_the_first_step_ends_the_process_at_once():
    """Where the main thread does not come back to Python, as when it compiles."""
    script = (
        "import ctypes\nfrom rehyat_jax.training.stop_signal import StopSignal\n"
        "with StopSignal():\n    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert time.monotonic() - started < 10
    assert "before the first step" in process.stderr.read()


def test_sigterm_is_noticed_between_steps():
    with StopSignal() as stop_signal:
        assert not stop_signal.is_requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop_signal.is_requested(2):
            assert time.monotonic() < deadline
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with_signal = []
    thread = threading.Thread(target=lambda: with_signal.append(StopSignal().__enter__().is_requested(1)))
    thread.start()
    thread.join()
    assert with_signal == [False]


# ----------------------------------------------------------------------------------------------------------- damage


def state_after(step):
    """On all eight devices, one array cut among four of them."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda array, *axes: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    params = {"a": place(jnp.arange(3000.0), "fsdp"), "b": place(jnp.ones((40, 50))), "c": place(jnp.arange(7))}
    return {"step": place(jnp.int32(step)), "params": params}


STATE = state_after(0)


def checkpoints_with(folder, *steps, keep=Keep(2)):  # noqa: B008
    checkpoints = RunCheckpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state_after(step), {"position": step}, loss=abs(step - 4.5))
    checkpoints.close()
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_what_several_devices_hold_is_copied_to_the_host_once():
    on_host = jax.jit(lambda state: state, out_shardings=host_shardings(STATE))(STATE)
    chex.assert_trees_all_equal(on_host, STATE)
    params = on_host["params"]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(on_host)} == {"pinned_host"}
    assert sum(shard.data.size for shard in params["a"].addressable_shards) == 3000
    assert sum(shard.data.size for shard in params["b"].addressable_shards) == 40 * 50
    assert sum(shard.data.size for shard in params["c"].addressable_shards) == 7 * 8  # which nothing divides


def test_a_save_that_fails_on_the_way_is_told_soon_and_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path, Keep(1))
    checkpoints.save(3, state_after(3), {"position": 3})
    checkpoints.wait()

    def fail(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rehyat_jax.training.checkpoints.write_checksums", fail)
    checkpoints.save(6, state_after(6), {"position": 6})
    deadline = time.monotonic() + 60
    with pytest.raises(InputError, match="No space left on device"):
        while time.monotonic() < deadline:
            checkpoints.check()
            time.sleep(0.01)
    with pytest.raises(InputError, match="No space left on device"):
        checkpoints.close()
    monkeypatch.undo()
    again = RunCheckpoints(tmp_path, Keep(1))
    assert again.latest_step == 3 and int(again.restore(STATE)["step"]) == 3


def test_damage_to_any_file_of_the_newest_checkpoint_is_found_and_the_one_before_it_is_taken(tmp_path, capsys):
    checkpoints_with(tmp_path, 3, 6)
    rng = np.random.default_rng(0)
    files = [path for path in sorted((tmp_path / "6").rglob("*")) if path.is_file()]
    names = [str(path.relative_to(tmp_path / "6")) for path in files]
    assert CHECKSUMS in names and sum(name.startswith("state/") for name in names) > 5
    for file, name in zip(files, names, strict=True):
        for kind, damage in DAMAGE.items():
            content = file.read_bytes()
            damage(file, rng)
            checkpoints = RunCheckpoints(tmp_path, Keep(2))
            if name in NOT_COVERED[1:] or (name in MAY_BE_MISSING and kind == "delete"):  # and not needed
                assert checkpoints.latest_step == 6, (name, kind)
            else:
                assert checkpoints.latest_step == 3 and checkpoints.description() == {"position": 3}, (name, kind)
                assert str(tmp_path / "6" / name) in capsys.readouterr().err
                (tmp_path / "damaged-6").rename(tmp_path / "6")
            assert int(checkpoints.restore(STATE)["step"]) == checkpoints.latest_step
            checkpoints.close()
            file.write_bytes(content)
    assert RunCheckpoints(tmp_path, Keep(2)).latest_step == 6


def test_a_damaged_checkpoint_makes_way_for_a_later_save_of_its_step(tmp_path):
    checkpoints_with(tmp_path, 3, 6)
    for _ in range(2):
        (tmp_path / "6" / CHECKSUMS).unlink()
        assert checkpoints_with(tmp_path, 6) == [3, 6]
    assert (tmp_path / "damaged-6").is_dir() and (tmp_path / "damaged-6.2").is_dir()


def test_a_run_with_damaged_checkpoints_alone_does_not_start_over(tmp_path):
    checkpoints_with(tmp_path, 3)
    (tmp_path / "3" / "run" / "metadata").write_text("{}")
    for _ in range(2):
        with pytest.raises(InputError, match="expected a complete checkpoint, found only damaged ones"):
            RunCheckpoints(tmp_path, Keep(2))


def test_unreadable_metrics_of_an_older_checkpoint_are_no_obstacle(tmp_path):
    checkpoints_with(tmp_path, 3, 6)
    for content in ("{", '{"losr": 1.0}', '{"loss": null}', "3"):
        metrics = tmp_path / "3" / "metrics" / "metrics"
        metrics.write_text(content)
        assert checkpoints_with(tmp_path, 6, keep=Keep(1, best=2)) == [3, 6]
        assert not metrics.exists()
    (tmp_path / "6" / CHECKSUMS).unlink()
    assert RunCheckpoints(tmp_path, Keep(2)).latest_step == 3  # whose values are whole


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(Keep(2), [8, 9]), (Keep(1, every=3), [3, 6, 9]), (Keep(1, best=2), [4, 5, 9])],
)
def test_the_newest_the_regular_and_the_best_checkpoints_stay(tmp_path, keep, expected):
    assert checkpoints_with(tmp_path, *range(1, 8), keep=keep)
    assert checkpoints_with(tmp_path, 8, 9, keep=keep) == expected  # also across two openings


def test_a_checkpoint_that_would_not_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    checkpoints_with(tmp_path, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match=r"expected 2e-05 GB of free space .* found 1e-08 GB; free some space"):
        checkpoints_with(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# --------------------------------------------------------------------------------------------------- useless updates


def linear_step(**options):
    """A step of least squares with every kind of state."""

    def grad_fn(params, context, batch, key):
        loss, grads = jax.value_and_grad(lambda p: jnp.square(batch["x"] @ p["w"] - 1).mean())(params)
        return {"loss": loss}, grads

    optimizer = optax.adamw(0.1)
    step = make_step(gradient_update(accumulate(grad_fn, 1), optimizer), seed=0, ema_decay=0.9, **options)
    return jax.jit(step), init_state({"w": jnp.arange(5.0)}, optimizer, keep_ema=True)


def batch_of(number, scale=1.0):
    return {"x": scale * jax.random.normal(jax.random.key(number), (1, 12, 5))}


def run_steps(step, state, batches):
    metrics = []
    for batch in batches:
        state, found = step(state, {}, batch)
        metrics.append(found)
    return state, metrics


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30])
def test_an_update_that_is_not_finite_leaves_no_trace_but_its_count(bad):
    step, state = linear_step(spike_factor=0.0)
    good = [batch_of(number) for number in range(4)]
    expected, _ = run_steps(step, state, good)
    found, metrics = run_steps(step, state, [*good[:2], batch_of(9, bad), batch_of(9, bad), *good[2:]])
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 0, 1, 2, 0, 0]
    assert (int(found["step"]), int(found["updates"])) == (6, 4)
    assert_equal({**found, "step": 0}, {**expected, "step": 0})


def test_an_update_whose_gradient_spikes_is_skipped_once_there_is_a_usual_size(monkeypatch):
    monkeypatch.setattr(training_step, "UPDATES_BEFORE_SPIKES", 3)
    step, state = linear_step(spike_factor=10.0)
    spike, usual = batch_of(9, 100.0), [batch_of(number) for number in range(4)]
    _, metrics = run_steps(step, state, [spike, *usual])
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0] * 5
    state, metrics = run_steps(step, state, [*usual, spike, usual[0]])
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0] * 4 + [1, 0]
    norms = [m["gradient_norm"] for m in metrics if not m["skipped_in_a_row"]]
    # Few norms: their mean; float32 rounding.
    np.testing.assert_allclose(state["usual_norm"], np.mean(norms), rtol=1e-6)


def test_useful_updates_are_those_of_the_optimizer_to_the_bit():
    step, state = linear_step(spike_factor=10.0)
    optimizer = optax.adamw(0.1)

    @jax.jit
    def plain(params, opt_state, ema, batch):
        grads = jax.grad(lambda p: jnp.square(batch["x"][0] @ p["w"] - 1).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, optax.incremental_update(params, ema, 1 - 0.9)

    expected = state["params"], state["opt_state"], state["ema"]
    # Operation by operation: compiled as a whole, the two may be rounded differently.
    with jax.disable_jit():
        for number in range(5):
            state, _ = step(state, {}, batch_of(number))
            expected = plain(*expected, batch_of(number))
    assert_equal((state["params"], state["opt_state"], state["ema"]), expected)


def test_a_run_that_diverges_ends_with_its_last_good_state_and_the_batch(tmp_path):
    config = digits_config(tmp_path, "finetune", steps=20, max_skipped=3, checkpoint_every=20, log_every=4)
    # Adam's first update is of the size of the learning rate: all later losses overflow.
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e25, 0
    with pytest.raises(RunDivergedError, match=r"the last 3 updates were skipped.* those after step 1, .*step_2"):
        train(config, tmp_path / "run", jax.devices()[:1])
    assert load_file(tmp_path / "run" / "skipped_step_2.safetensors")["latents"].shape == (1, 4, 21, 6, 6, 16)
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints", Keep(2))
    assert checkpoints.latest_step == 4 and checkpoints.description()["data"] == {"next": 4, "skipped": 0}


# ---------------------------------------------------------------------------------------------------- another command


def described(examples=100, inputs=None, **changes):
    config = default_config()
    config.update_from_flattened_dict({"init_from": "a", **changes})
    return describe_run(config, {"next": 5}, examples=examples, inputs=inputs or {})


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({"optimizer.learning_rate": 0.5}, CHANGED),
        ({"steps": 5}, CHANGED),
        ({"steps": 4}, REFUSED),
        ({"ema_decay": 0.9}, CHANGED),
        ({"ema_decay": 0.0}, REFUSED),
        ({"data.workers": 3}, SAME),
        ({"seed": 1}, REFUSED),
        ({"hybrid.chunk_frames": 7}, REFUSED),
        ({"batch_size": 8}, REFUSED),
        ({"examples": 99}, REFUSED),
    ],
)
def test_what_another_command_means_to_a_run_is_told_field_by_field(changes, then):
    saved_run, now = described(), described(**changes)
    assert check_continuation(saved_run, described(), 5, "runs/x") == ""
    if then == REFUSED:
        with pytest.raises(InputError, match=r"^runs/x: holds a run that differs(.|\n)*refused\n.*another workdir"):
            check_continuation(saved_run, now, 5, "runs/x")
    else:
        header, row = check_continuation(saved_run, now, 5, "runs/x").splitlines()
        (field, value) = next(iter(changes.items()))
        assert header.split() == ["saved", "now", "it", "would", "be"]
        assert f"config.{field}" in row and str(value) in row and row.endswith(then)


def test_a_field_that_the_run_s_version_did_not_know_had_its_default():
    older, config = described(), dict.fromkeys(("max_skipped", "forms", "distill.updates_per_batch"))
    for field in config:
        group, _, name = field.rpartition(".")
        del (older["config"][group] if group else older["config"])[name]
    assert check_continuation(older, described(), 5, "runs/x") == ""
    assert "max_skipped  10     3    the same run" in check_continuation(older, described(max_skipped=3), 5, "runs/x")
    with pytest.raises(InputError, match=r"distill\.updates_per_batch +1 +2 +refused"):
        check_continuation(older, described(**{"distill.updates_per_batch": 2}), 5, "runs/x")


def test_a_field_that_only_the_run_s_version_knew_is_told_and_not_refused():
    older = described()
    older["config"]["new_field"] = 3
    assert "new_field  3      unknown" in check_continuation(older, described(), 5, "runs/x")


@pytest.mark.parametrize(
    ("stage", "field", "then"),
    [("distill", "init_from", REFUSED), ("finetune", "init_from", SAME), ("finetune", "data.path", CHANGED)],
)
def test_inputs_that_were_replaced_at_their_place_are_told(stage, field, then):
    was, now = (described(stage=stage, inputs={field: f"3 files, SHA-256 {digit * 64}"}) for digit in "ab")
    row = rf"\n *files of config.{field} +3 files, SHA-256 a{{12}} +3 files, SHA-256 b{{12}} +{then}(\n|$)"
    if then == REFUSED:
        with pytest.raises(InputError, match=row):
            check_continuation(was, now, 5, "runs/x")
    else:
        assert re.search(row, check_continuation(was, now, 5, "runs/x"))
    # An earlier version saved no fingerprints.
    del was["inputs"]
    assert check_continuation(was, now, 5, "runs/x") == ""


def test_inputs_that_were_only_moved_are_the_same_run():
    inputs = {"init_from": f"3 files, SHA-256 {'a' * 64}"}
    was, now = (described(stage="distill", inputs=inputs, init_from=place) for place in ("old", "new"))
    assert re.search(rf"config.init_from +old +new +{SAME}(\n|$)", check_continuation(was, now, 5, "runs/x"))
    with pytest.raises(InputError, match=r"config.init_from +old +new +refused"):
        check_continuation(was | {"inputs": {}}, now, 5, "runs/x")


def test_a_run_knows_its_teacher_and_its_data(tmp_path):
    examples = [example(number, (5, 4, 4, 16)) for number in range(8)]
    write_data_set(tmp_path / "data", examples, codec="space_to_depth")
    changes = {"data.source": "prepared", "data.path": str(tmp_path / "data"), "checkpoint_every": 1}
    config = digits_config(tmp_path, "distill", **{"steps": 1, "optimizer.warmup_steps": 0}, **changes)
    train(config, tmp_path / "run", jax.devices()[:1])

    pretrained(tmp_path)  # the same model, written again
    assert "files of" not in refused(config, tmp_path / "run", "seed")
    shutil.rmtree(tmp_path / "data")
    examples[3]["latents"] += 1
    write_data_set(tmp_path / "data", examples, codec="space_to_depth")
    assert "files of config.data.path" in refused(config, tmp_path / "run", "seed")
    wan, params, metadata = load_params(config.init_from)
    params["blocks"]["feed_forward"]["up"]["kernel"][1, 3, 5] += 1
    save_model(config.init_from, wan, params, **metadata)
    with pytest.raises(InputError, match=r"files of config.init_from .*refused\n(.|\n)*put back its files"):
        train(config, tmp_path / "run", jax.devices()[:1])


def refused(config, workdir, field):
    """The table of differences of a command with another value of a field that cannot change."""
    other = config.copy_and_resolve_references()
    other[field] += 1
    with pytest.raises(InputError, match="refused") as caught:
        train(other, workdir, jax.devices()[:1])
    return str(caught.value)


def test_a_fingerprint_is_of_names_sizes_and_blocks_from_all_over_a_file(tmp_path):
    files = [tmp_path / name for name in ("a", "b")]
    content = np.random.default_rng(0).bytes(20 * SAMPLED_BYTES)
    for file in files:
        file.write_bytes(content)
    before = fingerprint(files, tmp_path, blocks=32)
    assert fingerprint(files[::-1], tmp_path, blocks=32) == before
    for place in (0, 9.5, 20):
        changed = bytearray(content)
        changed[min(int(place * SAMPLED_BYTES), len(content) - 1)] ^= 1
        files[1].write_bytes(changed)
        assert fingerprint(files, tmp_path, blocks=32) != before
    files[1].write_bytes(content + b"0")
    assert fingerprint(files, tmp_path, blocks=32) != before
    files[1].write_bytes(content)
    assert fingerprint(files, tmp_path, blocks=32) == before
    files[1].rename(tmp_path / "c")
    assert fingerprint([files[0], tmp_path / "c"], tmp_path, blocks=32) != before


def test_a_fingerprint_reads_no_more_than_it_may(tmp_path, monkeypatch):
    files = [tmp_path / f"{number:03}" for number in range(100)]
    for file in files:
        file.write_bytes(b"0" * 10)
    opened = []
    monkeypatch.setattr(Path, "open", lambda path, *mode, of=Path.open: opened.append(path) or of(path, *mode))
    assert fingerprint(files, tmp_path, blocks=20).startswith("100 files")
    assert len(opened) == 10


def test_a_pytorch_model_is_known_by_the_files_that_are_read(tmp_path):
    for name in ("a.safetensors", "other.safetensors"):
        save_file({"blocks.0.x": np.zeros(3, np.float32)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    folder, files = checkpoint_files(tmp_path / "a.safetensors")
    assert folder == tmp_path and sorted(file.name for file in files) == ["a.safetensors", "config.json"]


# ------------------------------------------------------------------------------------------------------ two trainings


def command_of(folder, config):
    """The arguments of the train command, for a workdir `run` in the folder."""
    write_config(folder / "config.py", config)
    return [f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"]


def test_a_second_training_in_a_workdir_is_refused_and_names_the_first(tmp_path, capsys):
    command = command_of(tmp_path, tiny_config("pretrain", checkpoint_dir=str(tmp_path / "checkpoints")))
    for place in ("run", "checkpoints"):
        (tmp_path / place).mkdir(exist_ok=True)
        with locked(tmp_path / place):
            left = temporary_path(tmp_path / "run" / "model", new_token(), "incomplete")
            left.mkdir()
            assert main(command) == 2
            assert left.exists() and not (tmp_path / "run" / "config.json").exists()
        message = capsys.readouterr().err
        assert f"error: {tmp_path / place}: expected no other training there" in message
        assert f"host {socket.gethostname()}, process {os.getpid()}" in message and message.count("\n") == 1


def test_the_lock_of_another_host_is_waited_for(tmp_path, monkeypatch, capsys):
    """A file server releases the lock of a host that has crashed only after some time."""
    monkeypatch.setattr("time.sleep", lambda seconds: crashed.close())
    with contextlib.ExitStack() as crashed:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
            crashed.enter_context(locked(tmp_path))
        with locked(tmp_path):
            assert "waiting for the lock of 'host elsewhere, process" in capsys.readouterr().err
        with monkeypatch.context() as at_once:
            at_once.setattr("rehyat_jax.files.lock.LEASE_SECONDS", -1)
            at_once.setattr("socket.gethostname", lambda: "elsewhere")
            crashed.enter_context(locked(tmp_path))
            at_once.setattr("socket.gethostname", lambda: "here")
            with pytest.raises(InputError, match="found one that is still running: 'host elsewhere"), locked(tmp_path):
                pass


def test_a_directory_of_a_filesystem_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with locked(tmp_path):
        assert "cannot be locked (No locks available); start no other training there" in capsys.readouterr().err


def test_trainings_and_a_conversion_beside_one_another(tmp_path, capsys):
    """As processes: a second training, a conversion below the workdir, and a training after one that was killed."""
    config = digits_config(tmp_path, "finetune", steps=100_000, checkpoint_every=100_000)
    with converting(tmp_path / "teacher", tmp_path / "run" / "converted") as conversion:
        run = FaultRun(tmp_path, config).start()
        assert run.wait_for(lambda: run.last_step() >= 1), run.log.read_text()
        command = [f"--config={tmp_path / 'run.py'}", f"--workdir={run.workdir}"]
        assert main(command) == 2
        assert f"process {run.process.pid}" in capsys.readouterr().err
        conversion.communicate("go on\n", timeout=100)
        assert conversion.returncode == 0
    assert saved_model(tmp_path / "run", "converted") == saved_model(tmp_path, "teacher")
    assert convert_main(["from-torch", str(tmp_path), str(run.workdir), "--force"]) == 2
    assert run.process.poll() is None and run.kill()
    with locked(run.workdir):  # which blocks nobody
        pass


@contextlib.contextmanager
def converting(source, destination):
    """A conversion to a PyTorch folder and back, stopped before it writes its last arrays; it goes on after a line."""
    script = (
        "import sys\nfrom rehyat_jax import convert\nfrom rehyat_jax.weights import conversion\n"
        "write = conversion.write_model_checkpoint\n"
        "def wait(*arguments):\n    print('ready', flush=True)\n    input()\n    write(*arguments)\n"
        "conversion.write_model_checkpoint = wait\nsys.exit(convert.main(sys.argv[1:]))\n"
    )
    torch = destination.parent.parent / "torch"
    assert convert_main(["to-torch", str(source), str(torch), "--layout", "diffusers"]) == 0
    destination.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", script, "from-torch", str(torch), str(destination)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------------------- full, misplaced

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")


@needs_root
def test_a_log_that_cannot_be_written_ends_the_run_with_everything_saved(tmp_path):
    """The workdir is on a full disk, the checkpoints are elsewhere."""
    changes = {"steps": 4, "checkpoint_every": 100, "checkpoint_dir": str(tmp_path / "saved")}
    config, run = digits_config(tmp_path, "finetune", **changes), tmp_path / "run"
    write = MetricWriter.write

    def write_on_full_disk(writer, step, values, *more):
        if step == 2:
            fill(run)
            values["more than a block of the disk"] = np.zeros(2000)
        write(writer, step, values, *more)

    with tmpfs(run, "2m"):
        is_full = pytest.raises(InputError, match=rf"^{run}/.*: cannot be written \(No space left on device.*free some")
        with is_full, pytest.MonkeyPatch.context() as patch:
            patch.setattr(MetricWriter, "write", write_on_full_disk)
            train(config, run, jax.devices()[:1])
        assert (tmp_path / "saved" / "2").is_dir()  # no step is lost
        with is_full:
            train(config, run, jax.devices()[:1])
        (run / "filling").unlink()
        train(config, run, jax.devices()[:1])
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 3, 4]


@needs_root
def test_metrics_that_do_not_fit_are_told_and_never_waited_for(tmp_path):
    with tmpfs(tmp_path / "disk", "64k"):
        writer = MetricWriter(tmp_path / "disk", first_step=0, steps=100, description="test")
        for step in range(100):
            writer.write(step, {"errors": np.zeros(100)})
        assert "No space left on device" in str(writer.trouble)
        with pytest.raises(InputError, match="No space left on device"):
            writer.close()


def test_a_terminal_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        writer = MetricWriter(tmp_path, first_step=0, steps=2, description="test")
        writer.advance()
        writer.write(1, {"loss": 2.0}, [SkippedStep(1, 2.0, 3.0)])
        writer.close()
        monkeypatch.undo()
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
        with contextlib.suppress(OSError):
            full.close()


def test_lines_of_the_metrics_that_cannot_be_read_are_dropped(tmp_path):
    good = [b'{"step": 1, "loss": 2.0}', '{"step": 3, "name": "é\u2028"}'.encode()]
    bad = [b"[1]", b"3", b'"x"', b"null", b'{"step": "2"}', b'{"step": true}', b'{"loss": 1}', b"\xff\xfe", b"["]
    bad += [b"[" * 100_000, b"1" * 5000, b'{"step": 4}', b"\0\0", b'{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1], *bad]))
    MetricWriter(tmp_path, first_step=3, steps=9, description="test").close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == good


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workdir=file", "file: cannot be written (File exists)"),
        ("--workdir=file/run", "file/run: cannot be written (Not a directory)"),
        ("--workdir=gs://bucket/run", "--workdir: expected a directory of a filesystem, found 'gs://bucket/run'"),
        ("--workdir=", "--workdir: expected a directory of a filesystem, found ''"),
        (f"--workdir={'x' * 300}", "cannot be written (File name too long)"),
        ("--config.checkpoint_dir=file", "file: cannot be written (File exists)"),
        ("--config.checkpoint_dir=file/x", "file/x: cannot be written (Not a directory)"),
        ("--config.checkpoint_dir=/proc/x", "/proc/x: cannot be written (No such file or directory)"),
        ("--config.checkpoint_dir=foo://x", "config.checkpoint_dir: expected a directory, or gs://BUCKET/FOLDER"),
        ("--config.checkpoint_dir=gs://x/y", "ImportError: Please install gcsfs to access Google Storage"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch, capsys, argument, message):
    if "gcsfs" in message and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    command = command_of(tmp_path, tiny_config("pretrain", batch_size=8))  # which eight devices divide
    assert main([*command, argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"config.py", "file", "run"}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tensorboard", "train.lock", "checkpoints"])
def test_what_is_in_the_way_of_a_run_s_own_files_is_named(tmp_path, name):
    place = tmp_path / "run" / name
    if name in ("tensorboard", "checkpoints"):
        place.parent.mkdir()
        place.touch()
    else:
        place.mkdir(parents=True)
    named = "metrics.jsonl: cannot be written .*" if name == "tensorboard" else ""
    with pytest.raises(InputError, match=rf"^{tmp_path}/run/{named}{name}.*(in the way|found a directory)"):
        train(tiny_config("pretrain"), tmp_path / "run", jax.devices()[:1])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "shared memory (/dev/shm) is full"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -7. See"), "(/dev/shm) is full"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9. See"), "too little memory"),
    ],
)
def test_shared_memory_that_is_full_is_told_from_a_worker_that_was_killed(error, told):
    class Data:
        position = 7

        def __next__(self):
            raise error

        def rewind(self, step):
            self.position = step

    with pytest.raises(InputError) as caught:
        next_batch(data := Data(), 3)
    assert told in str(caught.value) and data.position == 3


# ------------------------------------------------------------------------------------------------------ beyond memory


@pytest.mark.parametrize(
    ("stage", "changes", "largest"),
    [
        ("finetune", {"batch_size": 2**24}, r"batch 846 GB\)"),
        ("distill", {"hybrid.feature_map.features": 2**16, "hybrid.feature_map.num_layers": 100}, "parameters 6,"),
    ],
)
def test_a_run_that_memory_cannot_hold_is_refused_with_the_number_before_anything_is_made(
    tmp_path, monkeypatch, stage, changes, largest
):
    config = digits_config(tmp_path, stage)
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr("rehyat_jax.train.initial_model", without_values(initial_model))
    with pytest.raises(InputError, match=rf"expected at least [\d,]+ GB of free memory \(.*{largest}.*, found"):
        train(config, tmp_path / "run", jax.devices()[:1])


def without_values(make):
    def abstract(config, *, with_values=True):
        assert not with_values
        return make(config, with_values=False)

    return abstract


def test_a_run_is_refused_only_above_what_its_arrays_take(monkeypatch):
    config = tiny_config("pretrain")
    source = open_data(config)
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        needed = sum(abstract_step(config, WAN_PRESETS["tiny"], (21, 6, 6)).memory.values())
        monkeypatch.setattr("rehyat_jax.planning.memory.device_bytes", lambda device: needed)
        check_memory(config, WAN_PRESETS["tiny"], source)
        monkeypatch.setattr("rehyat_jax.planning.memory.device_bytes", lambda device: needed - 1)
        with pytest.raises(InputError, match=r"rehyat_jax\.plan estimates"):
            check_memory(config, WAN_PRESETS["tiny"], source)


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_memory_that_runs_out_is_told_with_the_remedy(error):
    with pytest.raises(InputError, match=r"memory has run out \(.*\); lower"), reported_memory_errors():
        raise error
    with pytest.raises(jax.errors.JaxRuntimeError), reported_memory_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
