"""What can go wrong in a run: kills, damage, useless updates, another command. `make fault-test` has more."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fault_runs import DAMAGE, FaultRun, saved, saved_model
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from tiny_runs import digits_config

from rehyat_jax.errors import InputError, RunDivergedError
from rehyat_jax.parallel.sharding import host_shardings
from rehyat_jax.train import train
from rehyat_jax.training import step as training_step
from rehyat_jax.training.checkpoints import Keep, RunCheckpoints
from rehyat_jax.training.checksums import CHECKSUMS, MAY_BE_MISSING, NOT_COVERED
from rehyat_jax.training.config import default_config
from rehyat_jax.training.continuation import check_continuation, describe_run
from rehyat_jax.training.fields import CHANGED, REFUSED, SAME
from rehyat_jax.training.step import init_state, make_step
from rehyat_jax.training.stop_signal import StopSignal

# ------------------------------------------------------------------------------------------------------------- kills


def test_a_run_that_is_killed_and_stopped_again_and_again_ends_as_if_nothing_had_happened(tmp_path):
    config = digits_config(tmp_path, "finetune", steps=24, checkpoint_every=4, keep_every=4)
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
    assert run.steps()[-1] == (stopped := run.last_step()) < 20  # no step was lost

    run.start()
    assert run.wait_for(lambda: run.last_step() > stopped)
    assert run.end(signal.SIGINT) == 130
    assert "Traceback" not in run.log.read_text() and "interrupted" in run.log.read_text().splitlines()[-1]

    assert run.start().end() == 0, run.log.read_text()
    assert saved_model(run.workdir) == saved_model(whole.workdir)
    assert run.metrics() == whole.metrics()
    assert saved(run.checkpoints / "24") == saved(whole.checkpoints / "24")


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
    step = make_step(grad_fn, optimizer, seed=0, accumulation_steps=1, ema_decay=0.9, **options)
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
    config.optimizer.learning_rate, config.optimizer.warmup_steps, config.ema_decay = 1e25, 0, 0.0
    with pytest.raises(RunDivergedError, match=r"the last 3 updates were skipped.* those after step 1, .*step_2"):
        train(config, tmp_path / "run", jax.devices()[:1])
    assert load_file(tmp_path / "run" / "skipped_step_2.safetensors")["latents"].shape == (1, 4, 21, 6, 6, 16)
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints", Keep(2))
    assert checkpoints.latest_step == 4 and checkpoints.description()["data"] == {"next": 4, "skipped": 0}


# ---------------------------------------------------------------------------------------------------- another command


def described(examples=100, **changes):
    config = default_config()
    config.update_from_flattened_dict({"init_from": "a", **changes})
    return describe_run(config, {"next": 5}, examples=examples)


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


def test_fields_that_another_version_does_not_know_are_told_and_not_refused():
    older = described()
    del older["config"]["max_skipped"]
    table = check_continuation(older, described(), 5, "runs/x")
    assert "max_skipped  unknown  10" in table
