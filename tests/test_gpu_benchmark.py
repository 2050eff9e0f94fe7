"""The GPU benchmarks: everything but the GPU and its compiler."""

import json
import sys

import numpy as np
import pytest

from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.benchmarks import gpu, gpu_compile
from rehyat_jax.cost_model import gpu_target

TINY = ["--device=cpu", "--implementations=scan", "--heads=1", "--frames=4", "--tokens-per-frame=2", "--repeats=1"]


def test_tables_and_file_hold_every_case_and_size(tmp_path, capsys):
    assert gpu.main([*TINY, "--json", str(tmp_path / "new" / "result.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| scan |") == 4
    assert printed.count("| yes |") == 4
    attentions = ("full, xla", "full, PyTorch", "layer, scan, row_max", "hybrid, scan, row_max", "hybrid, scan, joint")
    for attention in (*attentions, "feature maps of query and key"):
        assert f"| 1 | 4 | {attention} |" in printed

    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert [case["right"] for case in result["correctness"]] == [True] * 4
    assert len(result["measurements"]) == 6
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


def test_without_pytorch_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    kinds = ("full", "torch", "maps")
    rows = list(gpu.measure(1, 4, 2, ["scan"], full_by="xla", repeats=1, kinds=kinds))
    assert [row.attention for row in rows] == ["full, xla", "feature maps of query and key"]
    assert "attention=full, PyTorch: ModuleNotFoundError" in capsys.readouterr().err


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


HLO = """HloModule jit_f

%fused (p: bf16[4,8]) -> f32[8,4] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %t = f32[8,4]{0,1} transpose(%p), dimensions={1,0}
}

ENTRY %main.1 (a.1: bf16[4,8]) -> (f32[8,4]) {
  %a.1 = bf16[4,8]{1,0} parameter(0), sharding={replicated}
  %fusion.1 = f32[8,4]{0,1} fusion(%a.1), kind=kLoop, calls=%fused
  %call.2 = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%fusion.1, %a.1), custom_call_target="attention", metadata={}
  %get-tuple-element.3 = f32[8,4]{1,0} get-tuple-element(%call.2), index=0
  %reduce.4 = s32[] reduce(%get-tuple-element.3, /*index=1*/%a.1), dimensions={0,1}
  ROOT %tuple.5 = (f32[8,4]{1,0}) tuple(%get-tuple-element.3)
}
"""


def test_bytes_are_those_of_operations_beside_the_kernels():
    # The fusion reads 4*8 numbers of two bytes and writes as many of four; the reduction reads both and writes one.
    assert gpu_compile.moved_bytes(HLO) == (["attention"], (64 + 128) + (128 + 64 + 4))


def test_without_the_cuda_plugin_the_error_says_what_to_do(monkeypatch, capsys):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(gpu_target.topologies, "get_topology_desc", missing)
    assert gpu_compile.main([]) == 2
    assert "expected JAX's CUDA plugin, found none; run pip install" in capsys.readouterr().err
