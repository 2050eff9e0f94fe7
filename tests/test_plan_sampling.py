"""Planning of sampling: counts against those of others, one compiled plan, and what is refused or would fit."""

import dataclasses
import functools
import json

import jax
import pytest

from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.cost_model.tpu_compile import DoesNotFitError
from rehyat_jax.cost_model.tpu_target import topology_devices
from rehyat_jax.cost_model.traced_flops import traced_flops
from rehyat_jax.models.umt5.config import UMT5_PRESETS
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.flops import forward_flops
from rehyat_jax.models.wan_vae.config import WAN_VAE_PRESETS, WanVaeConfig
from rehyat_jax.parallel.mesh import AXES, make_mesh
from rehyat_jax.plan import main
from rehyat_jax.planning import compiled
from rehyat_jax.planning.compiled import Outcome
from rehyat_jax.planning.sampling import command, plan, programs
from rehyat_jax.planning.sampling.command import parser, request_of, with_hybrid_blocks
from rehyat_jax.planning.sampling.plan import Companions, PartPlan, Program, SamplingPlan, SamplingRequest, chosen_mesh
from rehyat_jax.planning.sampling.remedies import smallest_remedy
from rehyat_jax.planning.sampling.report import SAMPLING, planned_samplings

TINY = ["--sample", "--preset=tiny", "--size=32x48", "--topology=v5e:1x1"]
GIB = 2**30


def request(*options: str) -> SamplingRequest:
    return request_of(parser().parse_args(options))


def traced(part: str, config, **sizes) -> int:
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        return traced_flops(programs.abstract_program(part, config.to_dict(), **sizes).trace().jaxpr)


# -------------------------------------------------------------------------------------------------------------- FLOPs
def test_flops_of_the_vae_are_those_of_others():
    # 275 T for 81 frames at 480x832, counted on the public code. A step decodes 4 frames. 275 has three digits.
    step = traced("vae", WAN_VAE_PRESETS["wan2.1"], latents=(1, 60, 104))
    assert step * 81 / 4 == pytest.approx(275e12, rel=0.003)


def test_flops_of_the_text_encoder_are_those_of_its_weights_and_its_attention():
    config = UMT5_PRESETS["umt5-xxl"]
    # All published parameters but the embedding, the norms and the position biases are matrices, used once a token.
    others = config.vocab_size * config.model_dim + (2 * 24 + 1) * config.model_dim + 24 * 32 * 64
    attention = 24 * 4 * 512**2 * config.width
    assert traced("text_encoder", config, tokens=512) == 2 * 512 * (5_680_910_336 - others) + attention


def test_loops_count_with_their_trips_and_the_largest_branch_of_a_conditional_counts():
    def function(x, choice):
        branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        x = jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x)
        return jax.lax.switch(choice, branches, x)

    x, choice = jax.ShapeDtypeStruct((8, 8), float), jax.ShapeDtypeStruct((), int)
    assert traced_flops(jax.jit(function).trace(x, choice).jaxpr) == (5 + 2) * 2 * 8**3
    endless = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    with pytest.raises(ValueError, match="loops of known length"):
        traced_flops(jax.jit(endless).trace(x).jaxpr)


# --------------------------------------------------------------------------------------------------------- whole plans
@functools.cache
def smaller_vae() -> Companions:
    """The tiny preset with a VAE that libtpu compiles in 10 seconds, where the real stages take minutes."""
    vae = WanVaeConfig(base_dim=8, dim_mult=(1,), num_res_blocks=1, temporal_downsample=())
    return dataclasses.replace(plan.COMPANIONS["tiny"], vae=vae)


def test_sampling_is_planned_from_end_to_end_on_one_chip(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(plan.COMPANIONS, "tiny", smaller_vae())
    file = tmp_path / "plan.json"
    assert main([*TINY, "--hybrid-blocks=3", "--frames=17", "--steps=20", f"--json={file}"]) == 0
    data = json.loads(file.read_text())
    assert data["topology"] == "v5e:1x1" and data["fits"] and data["devices"] == data["chips"] == 1
    assert data["hybrid_blocks"] == 3 and data["versions"]["libtpu"]
    parts = data["parts"]
    assert list(parts) == ["text_encoder", "transformer", "vae"]
    # The prompt and the negative one, steps, latent frames.
    assert [part["executions"] for part in parts.values()] == [2, 20, 5]
    for part in parts.values():
        assert part["hbm_bytes_peak"] == sum(part["memory"].values()) < data["hbm_bytes_limit"] == 15.75 * GIB
        assert 0 < part["seconds"]["low"] < part["seconds"]["high"]
        assert part["least_cycles"] < part["static_cycles"]
    for end in ("low", "high"):
        assert data[f"seconds_{end}"] == pytest.approx(sum(part["seconds"][end] for part in parts.values()))
    # The parts take turns.
    assert data["hbm_bytes_peak"] == max(part["hbm_bytes_peak"] for part in parts.values())
    out = capsys.readouterr().out
    assert "Nothing was run" in out and "20 steps with guidance, in one pass" in out and "latents of 5x4x6" in out

    # The same programs in another number: nothing is compiled again, and time is proportional.
    monkeypatch.setattr(compiled, "_compiled", lambda *program: pytest.fail(f"{program} was compiled again"))
    assert main([*TINY, "--hybrid-blocks=3", "--frames=17", "--steps=40", f"--json={file}"]) == 0
    twice = json.loads(file.read_text())["parts"]
    assert twice["transformer"]["seconds"]["low"] == pytest.approx(2 * parts["transformer"]["seconds"]["low"])
    assert twice["vae"] == parts["vae"]


def test_on_gpus_arithmetic_gives_the_time(monkeypatch):
    # CI has no CUDA plugin; the program is then made for a CPU device.
    for module in (plan, compiled):
        monkeypatch.setattr(module, "devices_of", lambda topology: jax.devices()[: int(topology.split(":")[1])])
    asked = request("--preset=tiny", "--size=32x48", "--frames=17", "--topology=h100:2", "--hybrid-blocks=3")
    programs_of = asked.programs()
    found = plan.part_plan(programs_of["text_encoder"])
    data, peak = found.to_json(), chip_of("h100:2").peak_flops
    flops = traced("text_encoder", plan.COMPANIONS["tiny"].text_encoder, tokens=8)
    # Two prompts, on two devices. This is so little arithmetic that the least HBM traffic takes longer.
    assert found.cost.compute_seconds == pytest.approx((flops / 2 / 0.75 / peak, flops / 2 / 0.3 / peak))
    assert data["seconds"]["low"] == 2 * found.cost.step_seconds[0] and data["static_cycles"] is None
    assert data["hbm_bytes_peak"] == sum(data["memory"].values())
    count = forward_flops(asked.wan, (5, 4, 6))
    # Each of the two evaluations is on a device of its own.
    assert plan.placement(programs_of["transformer"]).flops == count.outside + count.blocks


def placed(*options: str) -> dict[str, dict[str, int]]:
    return {name: plan.placement(program).arguments for name, program in request(*options).programs().items()}


def test_weights_are_in_the_compute_dtype_except_where_the_model_computes_in_float32():
    arguments = placed("--preset=t2v-1.3B", "--topology=v5e:1x1", "--hybrid-blocks=none")
    # Published numbers of parameters. In float32 are the timestep's layers, modulations, norms and the head.
    width, blocks = 1536, 30
    time = 256 * width + width + width**2 + width + 6 * width**2 + 6 * width
    head = 2 * width + width * 64 + 64
    in_float32 = time + head + blocks * (6 * width + 2 * width + 4 * width)
    assert arguments["transformer"]["weights"] == 2 * (1_418_996_800 + in_float32)
    # Two maps of a head are two matrices each, and a scale in float32.
    hybrid = placed("--preset=t2v-1.3B", "--topology=v5e:1x1", "--hybrid-blocks=all")
    maps = blocks * 12 * 2 * (128 * 256 + 256 * 256)
    assert hybrid["transformer"]["weights"] == arguments["transformer"]["weights"] + 2 * maps + 4 * blocks * 12 * 2
    assert arguments["text_encoder"]["weights"] == 2 * 5_680_910_336
    assert arguments["vae"]["weights"] == 4 * 126_892_531


def test_a_mesh_shards_weights_and_the_frames_that_are_decoded():
    one, eight = (placed("--preset=t2v-14B", f"--topology=v5e:{size}") for size in ("1x1", "2x4"))
    # The transformer's are sharded among the four devices of a video, each of the two evaluations has a copy.
    assert eight["transformer"]["weights"] < one["transformer"]["weights"] / 3.9
    assert eight["text_encoder"]["weights"] < one["text_encoder"]["weights"] / 7.9
    assert eight["vae"]["weights"] == one["vae"]["weights"]
    # 60 rows of latents are padded to 64, and bool [] says if a clip begins.
    assert eight["vae"]["cached frames"] - 1 == (one["vae"]["cached frames"] - 1) * 64 / 60 / 8


@pytest.mark.parametrize(
    ("options", "devices", "expected"),
    [
        ((), 1, (1, 1, 1)),
        ((), 8, (2, 4, 1)),
        (("--guidance-scale=1",), 8, (1, 8, 1)),
        # 7 chunks of 3 frames: more than 8 devices would have none.
        ((), 32, (2, 8, 2)),
        (("--stream",), 8, (2, 1, 4)),
    ],
)
def test_the_mesh_divides_evaluations_then_frames_then_heads(options, devices, expected):
    found = chosen_mesh(request("--preset=t2v-1.3B", "--topology=v5e:1x1", *options), devices)
    assert found == dict(zip(("data", "context", "tensor"), expected, strict=True))


def test_a_streamed_program_is_the_same_for_every_length():
    options = ("--preset=t2v-1.3B", "--topology=v5e:1x1", "--stream")
    short, long = (request(*options, f"--frames={frames}").programs() for frames in (81, 8101))
    assert short == long
    assert short["transformer"].executions == 50 * 2 and long["transformer"].executions == 50 * 169


def test_hybrid_blocks_are_evenly_spaced():
    wan = WAN_PRESETS["t2v-1.3B"]
    assert with_hybrid_blocks(wan, "15").hybrid_block_indices == tuple(range(1, 30, 2))  # as configs/ have them
    assert with_hybrid_blocks(wan, "30") == with_hybrid_blocks(wan, "all") == wan.replace(hybrid_blocks="all")
    assert with_hybrid_blocks(wan, "none") == with_hybrid_blocks(wan, "0") == wan


# -------------------------------------------------------------------------------------------------- what does not fit
def too_large(asked: SamplingRequest, peak: float | None, failing: str = "transformer") -> SamplingPlan:
    def part(program: Program) -> PartPlan:
        size = peak and round(peak * GIB) if program.part == failing else GIB
        return PartPlan(
            program, {"weights": GIB}, Outcome({}, size, None if program.part == failing else object(), 1.0)
        )

    return SamplingPlan(asked, {name: part(program) for name, program in asked.programs().items()})


def test_sampling_that_does_not_fit_ends_with_code_3_and_what_would_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(plan.COMPANIONS, "tiny", smaller_vae())
    asked = []

    def part_plan(program: Program, report) -> PartPlan:
        asked.append(program)
        if program.part != "transformer" or program.arguments["stream"]:
            cost = dataclasses.make_dataclass(
                "Cost", ["step_seconds", "assumptions", "collective_bytes", "hbm_traffic"]
            )
            fits = Outcome({"weights": GIB}, GIB, cost((1, 2), "assumed", {}, 0), 1.0)
            return PartPlan(program, {"weights": GIB}, fits)
        return PartPlan(program, {"weights": GIB}, Outcome({}, 20 * GIB, None, 1.0))

    monkeypatch.setattr(command, "part_plan", part_plan)
    file = tmp_path / "plan.json"
    assert main([*TINY, f"--json={file}"]) == 3
    out = capsys.readouterr().out
    assert "20.00 GiB" in out and "does not fit" in out and "would fit: --stream (compiled: 1.0 GiB a device)" in out
    data = json.loads(file.read_text())
    assert not data["fits"] and data["seconds_low"] is data["seconds_high"] is None
    assert data["parts"]["transformer"]["seconds"] is None and data["parts"]["vae"]["seconds"]["high"] == 2 * 21
    assert data["remedy"].startswith("--stream")
    assert [program.part for program in asked[3:]] == ["transformer"]  # the others fit already


def test_after_two_compilations_arithmetic_decides():
    found = too_large(request("--preset=t2v-14B", "--size=720p", "--topology=v5e:2x2", "--hybrid-blocks=none"), peak=40)
    limit = chip_of("v5e:1x1").hbm_bytes
    asked = []

    def plan_part(program: Program) -> PartPlan:
        asked.append(program.topology)
        return PartPlan(program, found.parts["transformer"].arguments, Outcome({}, round(1.4 * limit), None, 1.0))

    remedy = smallest_remedy(found, plan_part)
    assert asked == ["v5e:4x4", "v5e:4x8"]  # 2x4 is ruled out, and softmax blocks cannot be streamed
    assert not remedy.compiled and remedy.peak < limit
    assert str(remedy).startswith("--topology v5e:8x8 (by arithmetic, not compiled: ")


def test_a_larger_slice_helps_the_vae():
    found = too_large(request("--preset=t2v-1.3B", "--size=720p", "--topology=v5e:1x1"), peak=20, failing="vae")
    fits = Outcome({}, GIB, object(), 1.0)
    remedy = smallest_remedy(found, lambda program: dataclasses.replace(found.parts["vae"], outcome=fits))
    assert remedy.options == "--topology v5e:2x2" and remedy.compiled


def test_weights_that_do_not_fit_are_not_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda *_: pytest.fail("compiled"))
    program = request("--preset=t2v-14B", "--topology=v5e:1x1").programs()["transformer"]
    found = plan.part_plan(program)
    assert not found.fits and found.peak is None and found.arguments["weights"] > 2 * 14_288_491_584


def test_the_compilers_own_refusal_is_a_part_that_does_not_fit(monkeypatch):
    def refused(*_):
        raise DoesNotFitError("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")

    monkeypatch.setattr(compiled, "_compiled", refused)
    # A size that no other test has: plans are kept.
    program = request("--preset=tiny", "--size=16x16", "--topology=v5e:1x1").programs()["transformer"]
    found = plan.part_plan(program)
    assert not found.fits and found.peak == 20.5 * GIB and found.seconds is None


# --------------------------------------------------------------------------------------------------------------- table
def test_the_table_has_a_row_for_every_topology_and_keeps_what_is_planned(tmp_path, monkeypatch, capsys):
    table = dataclasses.replace(SAMPLING, records=tmp_path / "runs.json", page=tmp_path / "runs.md")
    runs = planned_samplings()
    assert len(set(runs)) == len(runs) == 2 * 2 * (6 * 3 + 2)
    requests = {run: request(*run.split()) for run in runs}
    assert {r.topology.split(":")[0] for r in requests.values()} == {"v5e", "v6e", "v5p", "tpu7x", "h100"}
    assert {len(r.wan.hybrid_block_indices) for r in requests.values()} == {0, 15, 20, 30, 40}
    part = {"hbm_bytes_peak": 3 * GIB, "fits": True, "seconds": {"low": 0.25, "high": 1234.5}}
    record = {"fits": True, "hbm_bytes_limit": 15.75 * GIB, "seconds_low": 0.75, "seconds_high": 3703.5}
    record |= {"parts": {name: part for name in programs.PARTS}, "versions": {"jax": "1"}}
    large = record | {"fits": False, "parts": record["parts"] | {"vae": part | {"fits": False}}}
    planned = []
    table.update(runs[:3], lambda run: planned.append(run) or (large if run == runs[1] else record))
    table.update(runs[:4], lambda run: planned.append(run) or record)
    assert planned == runs[:4]
    table.update(runs[:4], lambda run: planned.append(run) or large, [runs[1], runs[1][5:]])
    assert planned[4:] == [runs[1]]
    table.update(runs[:5], lambda run: planned.append(run) or record, [runs[4]])
    assert planned[5:] == [runs[4]]
    page = table.page.read_text()
    assert "## `--preset t2v-1.3B --size 480p`" in page
    cell = "3.00 GiB of 15.75 GiB; 0.25 to 1,234 s"
    assert f"| `--topology v5e:1x1 --hybrid-blocks none` | {cell} | {cell} | {cell} | 0.75 to 3,704 |" in page
    assert "3.00 GiB of 15.75 GiB: does not fit | does not fit |" in page


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset=tiny"], "required: --topology"),
        (["--preset=huge", "--topology=v5e:1x1"], "t2v-14B"),
        (["--preset=tiny", "--topology=v9:1x1"], "v5e, v5p, v6e, tpu7x"),
        (["--preset=tiny", "--topology=v5e:3x5x7"], "expected a name that libtpu knows"),
        (["--preset=tiny", "--topology=v5e:99999x99999"], "expected a name that libtpu knows"),
        (["--preset=tiny", "--topology=v5e:1x1", "--hybrid-blocks=99"], "at most 6"),
        (["--preset=tiny", "--topology=v5e:1x1", "--hybrid-blocks=some"], '"all", "none" or a number'),
        (["--preset=tiny", "--topology=v5e:1x1", "--frames=80"], "81 frames"),
        (["--preset=tiny", "--topology=v5e:1x1", "--size=100x96"], "96x96"),
        (["--preset=tiny", "--topology=v5e:1x1", "--size=large"], "480p, 720p or HEIGHTxWIDTH"),
        (["--preset=tiny", "--topology=v5e:1x1", "--stream", "--hybrid-blocks=2"], "blocks 0, 2, 3, 5"),
        (["--preset=tiny", "--topology=v5e:2x2", "--mesh", "context=3"], "does not make 4 devices"),
        (["--preset=tiny", "--topology=v5e:2x2", "--mesh", "data=4"], "data x fsdp of 1, 2"),
        (["--preset=tiny", "--topology=v5e:1x1", "--json=README.md/plan.json"], "README.md"),
        (["--table", "--preset=tiny"], "expected a part of a run, found '--preset=tiny'; the closest run is"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(options, message, capsys, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda *_: pytest.fail("compiled"))
    try:
        code = main(["--sample", *options])
    except SystemExit as end:  # of argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_table_is_made_in_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--sample", "--table"]) == 2
    assert "run in the repository" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1"])
def test_a_single_chip_is_a_topology(topology):
    assert len(topology_devices(topology)) == chip_of(topology).devices_per_chip
