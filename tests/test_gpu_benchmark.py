"""The GPU benchmark: everything but the GPU."""

import json

import numpy as np
import pytest

from rehyat_jax.attention.geometry import ChunkGeometry
from rehyat_jax.benchmarks import gpu

TINY = ["--device=cpu", "--implementations=scan", "--heads=1", "--frames=4", "--tokens-per-frame=2", "--repeats=1"]


def test_tables_and_file_hold_every_case_and_size(tmp_path, capsys):
    assert gpu.main([*TINY, "--json", str(tmp_path / "new" / "result.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| scan |") == 4
    assert printed.count("| yes |") == 4
    for attention in ("full, xla", "hybrid, scan, row_max", "hybrid, scan, joint", "feature maps of query and key"):
        assert f"| 1 | 4 | {attention} |" in printed

    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert [case["right"] for case in result["correctness"]] == [True] * 4
    assert len(result["measurements"]) == 4
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in result["measurements"])


def test_operations_are_those_of_the_paper_tables():
    tokens, geometry = 21 * 1560, ChunkGeometry(21, 1560, gpu.CHUNK_FRAMES, gpu.OVERLAP_FRAMES)
    window = int(geometry.key_masks(causal=True)[0].sum()) * 1560**2
    # 4 operations for each pair of tokens and each of 12 * 128 channels; windows of 3 frames, then six times of 4.
    np.testing.assert_allclose(gpu.softmax_tflop(tokens**2, 12, products=2), 4 * 32760**2 * 1536 / 1e12)
    np.testing.assert_allclose(
        gpu.softmax_tflop(window, 12, products=2), 4 * (3 * 3 + 6 * 3 * 4) * 1560**2 * 1536 / 1e12
    )


def test_what_is_wrong_or_fails_is_said_and_the_rest_goes_on(monkeypatch, capsys):
    def fails(query, *_, implementation, **arguments):
        if implementation == "reference":
            return query
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(gpu, "hybrid_attention", fails)
    assert gpu.main(TINY) == 1
    printed = capsys.readouterr()
    assert printed.out.count("| NO |") == 4
    assert "| 1 | 4 | hybrid, scan, joint | failed |" in printed.out
    assert "| 1 | 4 | feature maps of query and key |" in printed.out
    assert "failed: implementation=scan, stabilizer=joint, causal=True: NotImplementedError: no such" in printed.err


@pytest.mark.parametrize("error, right", [(0.01, True), (0.02, False), (float("nan"), False)])
def test_errors_beyond_rounding_are_wrong(error, right, monkeypatch):
    monkeypatch.setattr(gpu, "errors", lambda **_: {"output": 0.001, "query": error, "key": 0.001})
    assert [case["right"] for case in gpu.check(["scan"])] == [right] * 4


def test_without_a_gpu_the_error_says_what_to_do(capsys):
    assert gpu.main([]) == 2
    assert "expected an NVIDIA GPU that JAX can use, found [CpuDevice" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeats=0", "--frames=-1", "--heads=x"])
def test_sizes_are_positive(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main([option])
    assert f"argument {option.split('=')[0]}: invalid positive value" in capsys.readouterr().err
