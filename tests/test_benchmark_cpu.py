"""The CPU benchmark: that its calls do equal work, that memory is measured truly, and what is reported."""

import contextlib
import json
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rehyat_jax.benchmarks import cpu, torch_attention
from rehyat_jax.benchmarks.cpu_attention import BACKWARD, FORWARD, Shape, prepare
from rehyat_jax.benchmarks.peak_memory import measuring_process, peak_bytes

MEBIBYTE = 2**20

# The kernel's counters of resident pages may be off by some megabytes.
COUNTING = 4 * MEBIBYTE


@pytest.fixture(scope="module")
def process():
    with measuring_process() as process:
        yield process


def bytes_of(mebibytes):
    return np.ones(mebibytes * MEBIBYTE, np.uint8)


def peak_of_temporaries():
    del_before = [bytes_of(5) for _ in range(40)]  # were they still resident, the call could take them
    del del_before
    return peak_bytes(lambda: bytes_of(80).sum() + bytes_of(60).sum())


def peak_of_results():
    make = lambda: [bytes_of(1) for _ in range(60)]
    make()
    return peak_bytes(make)


def peak_and_plan_of_a_program():
    """What XLA planned is an oracle of its own: a buffer for every result, and the temporaries."""
    x = jnp.ones((1024, 1024))
    program = jax.jit(lambda x: [jnp.sort(x @ x + i) for i in range(8)]).lower(x).compile()
    run = lambda: jax.block_until_ready(program(x))
    run()
    plan = program.memory_analysis()
    return peak_bytes(run), plan.temp_size_in_bytes + plan.output_size_in_bytes


def test_peak_memory_counts_what_a_call_frees_again_and_nothing_freed_before(process: ProcessPoolExecutor):
    assert process.submit(peak_of_temporaries).result() == pytest.approx(80 * MEBIBYTE, abs=COUNTING)


def test_peak_memory_counts_results(process):
    assert process.submit(peak_of_results).result() == pytest.approx(60 * MEBIBYTE, abs=COUNTING)


def test_peak_memory_of_a_program_is_what_its_compiler_planned(process):
    peak, plan = process.submit(peak_and_plan_of_a_program).result()
    assert plan > 30 * MEBIBYTE
    assert peak == pytest.approx(plan, abs=COUNTING)


SHAPE = Shape(batch=2, frames=6, tokens_per_frame=3, heads=2, head_dim=8)


def test_the_hybrid_forms_compute_the_same():
    expected = prepare("hybrid, reference", SHAPE, FORWARD)()
    assert expected.shape == SHAPE.array
    for name in ("hybrid, xla", "hybrid, scan"):
        np.testing.assert_allclose(prepare(name, SHAPE, FORWARD)(), expected, atol=1e-5)  # float32 rounding
    last_chunk = prepare("hybrid, streamed", SHAPE, FORWARD)()
    np.testing.assert_allclose(last_chunk, expected[:, 9:], atol=1e-5)


def test_both_libraries_return_the_gradients_of_queries_keys_values_and_feature_maps():
    _, (maps, *gradients) = prepare("hybrid, scan", SHAPE, BACKWARD)()
    of_torch = prepare("hybrid, PyTorch", SHAPE, BACKWARD)()
    shapes = lambda arrays: sorted(tuple(array.shape) for array in arrays)
    assert shapes(of_torch) == shapes([*gradients, *jax.tree.leaves(maps)])
    assert shapes(prepare("full attention, PyTorch", SHAPE, BACKWARD)()) == [SHAPE.array] * 3


def test_an_attention_drops_out_where_quadratic_growth_would_exceed_a_maximum(monkeypatch):
    monkeypatch.setattr(cpu, "prepare", lambda attention, shape, direction: lambda: None)
    monkeypatch.setattr(cpu, "median_seconds", lambda run: 1.0)
    shapes = [Shape(1, frames, 1, 1, 8) for frames in (1, 2, 4)]
    peaks = {"small": 10, "large": 30}
    points = cpu.measure(list(peaks), shapes, lambda attention, *_: peaks[attention], max_seconds=5.0, max_bytes=100.0)
    forward = [(point.attention, point.frames) for point in points if point.direction == FORWARD]
    assert forward == [("small", 1), ("large", 1), ("small", 2), ("small", 4)]


def test_the_command_prints_and_writes_what_it_measured(process, tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def started_before(initialize):
        process.submit(initialize).result()
        yield process

    monkeypatch.setattr(cpu, "measuring_process", started_before)
    command = "--frames 6 3 --tokens-per-frame 2 --heads 1 --head-dim 8 --batch 2"
    names = ["full attention, PyTorch", "hybrid, streamed"]
    files = ["--json", str(tmp_path / "new" / "cpu.json"), "--plot", str(tmp_path / "cpu.png")]
    assert cpu.main([*command.split(), "--attentions", *names, *files]) == 0

    report = json.loads((tmp_path / "new" / "cpu.json").read_text())
    assert (report["batch"], report["tokens_per_frame"], report["heads"], report["head_dim"]) == (2, 2, 1, 8)
    measured = [(row["frames"], row["tokens"], row["attention"], row["direction"]) for row in report["measurements"]]
    of_length = lambda frames: [
        (frames, 2 * frames, names[0], FORWARD),
        (frames, 2 * frames, names[0], BACKWARD),
        (frames, 2 * frames, names[1], FORWARD),
    ]
    assert measured == of_length(3) + of_length(6)
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in report["measurements"])
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| 6 | 12 | hybrid, streamed |" in printed
    assert "| full attention, PyTorch, forward, 3 to 6 frames |" in printed


def test_the_implementations_in_pytorch_take_turns(process, capsys, monkeypatch):
    monkeypatch.setattr(torch_attention, "measuring_process", lambda: contextlib.nullcontext(process))
    command = "--frames 4 --tokens-per-frame 2 --heads 1 --head-dim 8 --rounds 2"
    assert torch_attention.main(command.split()) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| row", "| joint"))]
    assert [tuple(row[:2]) for row in rows] == [
        (f"| {stabilizer}", direction) for stabilizer in ("row_max", "joint") for direction in (FORWARD, BACKWARD)
    ]
    assert all(float(seconds) > 0 for row in rows for seconds in row[2:4])
    assert [row[4] == "-" for row in rows] == [False, True, False, True]  # "flex" has no backward pass on CPUs
    assert torch_attention.main(["--rounds", "0"]) == 2
    plain, sdpa = (torch_attention.prepare(SHAPE, name, "joint", BACKWARD)() for name in ("plain", "sdpa"))
    for expected, found in zip(plain, sdpa, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 rounding


def test_an_impossible_size_is_named(capsys):
    assert cpu.main(["--frames", "3", "--heads", "0"]) == 2
    assert capsys.readouterr().err == "error: --heads must be at least 1, found 0\n"
