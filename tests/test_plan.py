"""Planning a run: what is counted is checked against something else that counts, what is compiled against the plan."""

import contextlib
import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.attention.on_mesh import hybrid_attention_on_mesh
from rehyat_jax.cli import INTERRUPTED
from rehyat_jax.cost_model.chips import CHIPS, chip_of, device_count, larger_topology
from rehyat_jax.cost_model.collectives import collective_bytes
from rehyat_jax.cost_model.hlo_branches import branch_shares, weighted
from rehyat_jax.cost_model.hlo_operations import Branch, Operation, executed_operations
from rehyat_jax.cost_model.memory_bound import memory_bytes
from rehyat_jax.cost_model.tpu_compile import DoesNotFitError
from rehyat_jax.cost_model.tpu_target import topology_devices
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.flops import StepFlops, distillation_flops, forward_flops, training_flops
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.plan import main, parse_arguments
from rehyat_jax.planning import compiled, table
from rehyat_jax.planning.compiled import Outcome
from rehyat_jax.planning.estimate import GpuCost, TpuCost, bytes_asked_for, cycles_of_kernels, shares_of_forms
from rehyat_jax.planning.planner import Plan, Request, make_plan, placement
from rehyat_jax.planning.remedies import estimated_peak, smallest_remedy
from rehyat_jax.planning.report import report
from rehyat_jax.training.config import default_config

SMALL = WanConfig(num_heads=2, head_dim=64, ffn_dim=320, num_layers=2, text_dim=48, text_length=16)
LATENTS = (7, 8, 12)


# ------------------------------------------------------------------------------------------------------------- FLOPs
def products(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in left])
            total += 2 * int(depth) * equation.outvars[0].aval.size
        assert equation.primitive.name not in ("scan", "while", "cond")
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += products(inner)
    return total


def traced_products(config: WanConfig, latents: tuple[int, int, int], implementation: str | None = None) -> int:
    model_def, abstract = nnx.split(
        nnx.eval_shape(
            lambda: WanTransformer(config, rngs=nnx.Rngs(0), scan_layers=False, attention_implementation=implementation)
        )
    )
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = array(1, *latents, 16), array(1), array(1, config.text_length, config.text_dim)
    return products(jax.make_jaxpr(apply_model(model_def))(nnx.to_pure_dict(abstract), *inputs).jaxpr)


def test_the_softmax_models_flops_are_those_of_its_products():
    count = forward_flops(SMALL, LATENTS)
    assert count.outside + 2 * (count.block + count.softmax) == traced_products(SMALL, LATENTS)


def test_hybrid_attentions_flops_are_those_of_its_definition_without_what_masks_drop():
    # Against the dense definition: of its [tokens, tokens] weights, only pairs of a window are work, and phi is.
    config = SMALL.replace(hybrid_blocks="all", hybrid=HybridConfig(feature_map=FeatureMapConfig(features=32)))
    softmax, hybrid = (traced_products(c, LATENTS, "reference") for c in (SMALL, config))
    count = forward_flops(config, LATENTS)
    tokens, frame = 7 * 24, 24
    dense_linear = 2 * tokens**2 * 32 * 2  # phi_query.phi_key; the values' product is the softmax branch's
    all_maps = 2 * 2 * tokens * 2 * (64 * 32 + 32 * 32)
    assert (hybrid - softmax) / 2 == dense_linear + all_maps
    # Chunks of 3, 3 and 1 frames see 3, 4 and 2 of them; frames 3 to 6 have a past, frames 0 to 4 are in one.
    block = count.attention[0]
    assert block.softmax == count.softmax * (3 * 3 + 3 * 4 + 1 * 2) // 7**2
    assert block.feature_maps == all_maps * (4 + 5) // (2 * 7)
    assert block.linear == 2 * (4 + 5) * frame * 32 * (128 + 2)


def test_hybrid_attention_grows_with_length_and_softmax_attention_with_its_square():
    config = WAN_PRESETS["t2v-1.3B"].replace(hybrid_blocks="all")
    short, long = (forward_flops(config, (frames, 60, 104)) for frames in (60, 120))
    assert long.softmax == 4 * short.softmax
    assert 2 <= long.attention[0].total / short.attention[0].total < 2.05
    assert long.block / short.block == pytest.approx(2, rel=1e-2)  # the text's projections do not grow


def test_recomputation_and_the_teacher_are_not_the_models_flops():
    config = SMALL.replace(hybrid_blocks=(1,))
    count = forward_flops(config, LATENTS)
    hybrid = count.attention[1].total
    forward = count.outside + 2 * count.block + count.softmax + hybrid
    assert training_flops(config, LATENTS, remat="none") == StepFlops(3 * forward, 0)
    assert training_flops(config, LATENTS, remat="block") == StepFlops(3 * forward, forward - count.outside)
    narrow = dataclasses.replace(config, ffn_dim=64)  # columns, fewer than the video's 168 tokens
    narrow_count = forward_flops(narrow, LATENTS)
    again = 2 * (narrow_count.block - narrow_count.last_product) + narrow_count.softmax + hybrid
    assert training_flops(narrow, LATENTS, remat="block").recomputed == again
    distill = distillation_flops(config, LATENTS).model
    teacher = count.outside + 2 * (count.block + count.softmax)
    assert distill < teacher + 3 * hybrid
    # The teacher runs once for all updates of a batch.
    assert distillation_flops(config, LATENTS, updates=4).model == teacher + 4 * (distill - teacher)


# ----------------------------------------------------------------------------------------------------------- programs
HLO = """HloModule example

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {
  %all-reduce.9 = f32[64,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %part = f32[16,8]{1,0} dynamic-slice(%all-reduce.9, %here), dynamic_slice_sizes={16,8}
}

%beside.1 (p: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.1 = bf16[64,8]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['x'=4,'y'=1] {'x'}
}

%beside.2 (p: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%p), channel_id=1, replica_groups=mesh['x'=4,'y'=1] {'x'}
}

%body (state: (u32[], f32[64,8])) -> (u32[], f32[64,8]) {
  %state = (u32[], f32[64,8]{1,0}) parameter(0)
  %n = u32[] get-tuple-element(%state), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%n, %two)
  %fusion.1 = bf16[64,8]{1,0} fusion(%p), kind=kCustom, calls=%beside.1
  %fusion.2 = bf16[64,8]{1,0} fusion(%p), kind=kCustom, calls=%beside.2
  %fusion.3 = f32[16,8]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %permute = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%r), channel_id=3
  %part = ((f32[64,8]{1,0}), f32[16,8]{1,0}, u32[]) reduce-scatter-start(%r), channel_id=4, to_apply=%sum
  %whole = f32[12]{0} all-reduce-start(%r), channel_id=6, to_apply=%sum
  ROOT %result = (u32[], f32[64,8]{1,0}) tuple(%next, %x)
}

%condition (state: (u32[], f32[64,8])) -> pred[] {
  %state = (u32[], f32[64,8]{1,0}) parameter(0)
  %n = u32[] get-tuple-element(%state), index=0
  %limit = u32[] constant(9)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%softmax (p: f32[8]) -> f32[8] {
  ROOT %trade = f32[8]{0} all-to-all(%p), channel_id=5, replica_groups=[2,2]<=[4]
}

%hybrid (p: f32[8]) -> f32[8] {
  ROOT %keep = f32[8]{0} copy(%p)
}

ENTRY %main (p: f32[64,8]) -> f32[64,8] {
  %one = u32[] constant(1)
  %first = (u32[], f32[64,8]{1,0}) tuple(%one, %p)
  %loop = (u32[], f32[64,8]{1,0}) while(%first), condition=%condition, body=%body
  %choice = f32[8]{0} conditional(%p, %p, %p), branch_computations={%softmax, %hybrid},
    metadata={op_name="jit/attention_form/cond"}
  ROOT %total = f32[100]{0} all-reduce(%y), channel_id=7, replica_groups={}, to_apply=%sum
}
"""


def test_collectives_are_counted_once_each_and_as_often_as_loops_run():
    trips = 4  # 1, 3, 5 and 7, below 9
    assert collective_bytes(executed_operations(HLO, of_fusions=True), 4) == {
        "all-gather": trips * 64 * 8 * 2 * 3 // 4,
        "reduce-scatter": 2 * trips * 64 * 8 * 4 * 3 // 4,
        "all-reduce": 2 * (100 + trips * 12) * 4 * 3 // 4,
        "all-to-all": 8 * 4 // 2,
        "collective-permute": trips * 32 * 4,
    }


def test_the_choice_of_a_form_counts_by_its_share_of_the_blocks():
    operations = [dataclasses.replace(x, executions=100 * x.executions) for x in executed_operations(HLO)]
    one, other = HybridConfig(), HybridConfig(chunk_frames=2)
    of_forms = lambda **forms: shares_of_forms(dataclasses.replace(SMALL, num_layers=4, **forms))
    shares = branch_shares([(x, 1) for x in operations], of_forms(hybrid_blocks=(0,)))
    assert {branch.number: share for branch, share in shares.items()} == {0: Fraction(3, 4), 1: Fraction(1, 4)}
    assert collective_bytes(operations, 4, shares)["all-to-all"] == 75 * 8 * 4 // 2
    # Two hybrid forms and no softmax: a choice of two all the same.
    shares = branch_shares([(x, 1) for x in operations], of_forms(hybrid_blocks="all", hybrid=(one, other, one, one)))
    assert {branch.number: share for branch, share in shares.items()} == {0: Fraction(3, 4), 1: Fraction(1, 4)}


def test_half_of_the_steps_that_dmd_may_simulate_count():
    steps = [Branch("cond", number, 2, "while/body/simulated_step/cond") for number in range(2)]
    operations = [(Operation(str(n), "", "fusion", "", 6, (branch,)), 100 * n) for n, branch in enumerate(steps)]
    shares = branch_shares(operations, shares_of_forms(SMALL))
    assert [weighted(operation, shares).executions for operation, _ in operations] == [3, 3]


def test_of_a_choice_by_place_the_largest_branch_counts():
    place = [Branch("switch", number, 3, "attention_form/branch_1_fun/shard_map/cond") for number in range(3)]
    block = Branch("cond", 1, 2, "while/attention_form/cond")
    operations = [(Operation(str(n), "", "fusion", "", 8, (block, branch)), n) for n, branch in enumerate(place)]
    shares = branch_shares(operations, shares_of_forms(SMALL.replace(hybrid_blocks=(1,))))
    assert [weighted(operation, shares).executions for operation, _ in operations] == [0, 0, 4]


def test_collectives_of_a_compiled_program_are_what_its_shapes_say():
    mesh = Mesh(np.array(topology_devices("v5e:2x2")), ("x",))

    def part(x):
        for _ in range(2):
            x = x + jax.lax.psum_scatter(jax.lax.all_gather(x, "x", tiled=True), "x", tiled=True)

        def turn(x, _):
            return jnp.sin(jax.lax.ppermute(x, "x", [(n, (n + 1) % 4) for n in range(4)])), None

        return jax.lax.scan(turn, x, length=5)[0]

    with jax.set_mesh(mesh):
        function = jax.shard_map(part, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False)
        x = jax.ShapeDtypeStruct((4 * 1024, 128), jnp.float32)
        hlo = jax.jit(function).lower(x).compile().as_text()
    size = 1024 * 128 * 4
    sent = collective_bytes(executed_operations(hlo, of_fusions=True), 4)
    assert sent["all-gather"] == 2 * 3 * size
    assert sent["collective-permute"] == 5 * size
    # Of a scattered sum XLA may make a sum for all and a slice of it.
    assert sent["reduce-scatter"] + sent["all-reduce"] in (2 * 3 * size, 2 * 2 * 3 * size)


def test_what_a_compiled_program_must_move_is_what_its_shapes_say():
    """A scan of a stack of arrays reads and writes a slice of it each time; products are left out."""

    def program(stack, x, weights):
        def layer(x, row):
            return jnp.sin(x) + row, jnp.cos(x)

        x, outputs = jax.lax.scan(layer, x, stack)
        return x @ weights, outputs

    mesh = Mesh(np.array(topology_devices("v5e:2x2")[:1]), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = [(5, 65536, 1024), (65536, 1024), (1024, 1024)]  # too large for VMEM
    x = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated) for shape in shapes]
    hlo = jax.jit(program, out_shardings=replicated).lower(*x).compile().as_text()
    operations = list(executed_operations(hlo, of_fusions=True))
    moved = memory_bytes(operations)
    size = 65536 * 1024 * 4
    total = sum(
        operation.executions * moved.get(operation.name, 0) for operation in operations if is_estimated(operation)
    )
    # Each of five layers reads x and a row, and writes x and an output; what is made around the loop depends on XLA.
    assert 5 * 4 * size <= total <= (5 * 5 + 2 + 5) * size
    products = [operation for operation in operations if is_estimated(operation) and operation.name not in moved]
    assert len(products) == 1 and "f32[65536,1024]" in products[0].result


def is_estimated(operation: Operation) -> bool:
    return not operation.fusion and operation.estimated_cycles is not None


def test_slices_and_updates_in_place_move_no_more_than_themselves():
    hlo = """HloModule example

%read (stack: f32[10,16,256], n: s32[]) -> f32[1,16,256] {
  %stack = f32[10,16,256]{2,1,0:T(8,128)} parameter(0)
  %n = s32[] parameter(1)
  ROOT %row = f32[1,16,256]{2,1,0:T(8,128)} dynamic-slice(%stack, %n), dynamic_slice_sizes={1,16,256}
}

%write (stack: f32[10,16,256], row: f32[1,16,256], n: s32[]) -> f32[10,16,256] {
  %old = f32[10,16,256]{2,1,0:T(8,128)} parameter(0)
  %new = f32[1,16,256]{2,1,0:T(8,128)} parameter(1)
  %m = s32[] parameter(2)
  ROOT %all = f32[10,16,256]{2,1,0:T(8,128)} dynamic-update-slice(%old, %new, %m)
}

%again (row: f32[1,16,256], n: s32[]) -> f32[1,16,256] {
  %one = f32[1,16,256]{2,1,0:T(8,128)} parameter(0)
  %unused = s32[] parameter(1)
  ROOT %sine = f32[1,16,256]{2,1,0:T(8,128)} sine(%one)
}

%inner (a: f32[16,256]) -> f32[16,16] {
  %a = f32[16,256]{1,0:T(8,128)} parameter(0)
  ROOT %product = f32[16,16]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_oi->bf
}

%outer (a: f32[16,256]) -> f32[16,16] {
  %b = f32[16,256]{1,0:T(8,128)} parameter(0)
  ROOT %nested = f32[16,16]{1,0:T(8,128)} fusion(%b), kind=kOutput, calls=%inner
}

ENTRY %main (stack: f32[10,16,256], n: s32[]) -> f32[10,16,256] {
  %given = f32[10,16,256]{2,1,0:T(8,128)} parameter(0)
  %here = s32[] parameter(1)
  %reading = f32[1,16,256]{2,1,0:T(8,128)} fusion(%given, %here), kind=kLoop, calls=%read
  %thin = bf16[3,5]{0,1:T(8,128)(2,1)} copy(%narrow)
  %fetched = f32[1,16,256]{2,1,0:T(8,128)S(1)} dynamic-slice(%given, %here), dynamic_slice_sizes={1,16,256}
  %near = f32[1,16,256]{2,1,0:T(8,128)S(1)} negate(%fetched)
  %far = f32[1,16,256]{2,1,0:T(8,128)} fusion(%near, %here), kind=kLoop, calls=%again
  %chosen = f32[1,16,256]{2,1,0:T(8,128)} conditional(%here, %far, %far), branch_computations={%inner, %inner}
  %placed = f32[10,16,256]{2,1,0:T(8,128)} dynamic-update-slice(%given, %chosen, %here)
  %square = f32[16,16]{1,0:T(8,128)} fusion(%reading), kind=kOutput, calls=%outer
  ROOT %writing = f32[10,16,256]{2,1,0:T(8,128)} fusion(%given, %reading, %here), kind=kLoop, calls=%write
}
"""
    moved = memory_bytes(executed_operations(hlo, of_fusions=True))
    row, number = 16 * 256 * 4, 4
    assert moved["reading"] == 2 * row + number
    assert moved["writing"] == 2 * row + number
    assert moved["thin"] == 8 * 128 * 2  # a whole tile, its rows the second axis
    assert "square" not in moved
    # In VMEM a row costs nothing.
    assert (moved["fetched"], moved["near"], moved["far"]) == (row + number, 0, row)
    assert moved["placed"] == 10 * row + number  # how large the update is cannot be seen


# --------------------------------------------------------------------------------------------------------------- chips
@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v5p:4x4x4", 64), ("tpu7x:2x2x1", 8)])
def test_topologies_have_the_devices_of_jax(topology, devices):
    assert device_count(topology) == devices
    assert device_count(larger_topology(topology)) == 2 * devices


def test_clocks_are_those_of_the_chips():
    # Google's own figures, in GHz, where there are any: 1.5 for v5e and 1.75 for v5p (the JAX scaling book).
    assert [round(chip.clock / 1e9, 2) for chip in CHIPS.values() if not chip.is_gpu] == [1.5, 1.75, 1.75, 2.2]


def test_a_kernel_takes_as_long_as_its_memory_at_least():
    chip = chip_of("v5e:2x2")
    kernels = [SimpleNamespace(name=name, calls=3, cycles=600) for name in ("computes", "copies")]
    moved = {"computes": 100, "copies": int(1000 / chip.clock * chip.hbm_bandwidth)}
    assert cycles_of_kernels(SimpleNamespace(kernels=kernels), moved, chip) == 600 + 3 * 1000


def test_a_step_takes_as_long_as_its_slowest_resource_at_least():
    chip = chip_of("v5e:2x2")
    sent = {"all-gather": int(chip.ici_bandwidth)}
    cost = TpuCost(
        cycles=0, least_cycles=0, kernel_cycles=0, collective_bytes=sent, hbm_traffic=0, host_bytes=0, chip=chip
    )
    assert cost.step_seconds == (1.0, 2.0)
    cost = dataclasses.replace(cost, cycles=int(3 * chip.clock), least_cycles=int(2 * chip.clock))
    assert cost.step_seconds == pytest.approx((2.0, 6.5))


def test_of_a_gpu_arithmetic_alone_is_known():
    chip = chip_of("h100:8")
    assert device_count("h100:8") == 8 and larger_topology("h100:8") is None and larger_topology("h200:4") == "h200:8"
    cost = GpuCost(
        flops=0.3 * chip.peak_flops, collective_bytes={"all-gather": 0}, hbm_traffic=0, host_bytes=0, chip=chip
    )
    assert cost.step_seconds == pytest.approx((0.4, 1.0))


# ---------------------------------------------------------------------------------------------------------- whole plans
def small_request(**changes) -> Request:
    config = default_config()
    changes = {"stage": "finetune", "init_from": "nowhere", "batch_size": 4} | changes
    config.update_from_flattened_dict(changes)
    wan = dataclasses.replace(
        SMALL, num_heads=1, hybrid_blocks="all", hybrid=HybridConfig(feature_map=FeatureMapConfig(features=128))
    )
    return Request(config, wan, (4, 8, 16), "v5e:2x2")


def test_a_small_run_is_planned_from_end_to_end(tmp_path, monkeypatch):
    plan = make_plan(small_request())
    data = json.loads(json.dumps(plan.to_json()))
    assert data["fits"] and data["devices"] == 4 and data["mesh"]["fsdp"] == 4
    assert data["hbm_bytes_peak"] == sum(data["memory"].values()) < data["hbm_bytes_limit"]
    # Two moments, and a few numbers on every device.
    assert 2 * data["memory"]["parameters"] <= data["memory"]["optimizer state"] <= 2.1 * data["memory"]["parameters"]
    assert data["memory"]["average (EMA)"] == data["memory"]["parameters"]
    # Gathered for either pass, in bfloat16.
    assert data["collective_bytes"]["all-gather"] > 0
    assert 0 < data["static_cycles_of_kernels"] < data["least_cycles"] < data["static_cycles"]
    assert 0 < data["step_seconds_low"] < data["step_seconds_high"]
    assert data["model_flops_utilization"]["high"] * data["step_seconds_low"] == pytest.approx(
        data["flops_per_step"] / (4 * 197e12)
    )
    assert data["hours"]["low"] == pytest.approx(1000 * data["step_seconds_low"] / 3600)
    run = "--config configs/small.py --topology v5e:2x2 --config.batch_size=4"
    runs = dataclasses.replace(table.TRAINING, page=tmp_path / "runs.md")
    runs.write_page([run, "--config configs/small.py --topology v5e:4x4"], {run: table.record(plan)})
    page = runs.page.read_text()
    assert "## `small`" in page and f"libtpu {data['versions']['libtpu']}" in page
    assert "| `--topology v5e:4x4` | not planned yet |" in page
    row = f"| `--topology v5e:2x2 --config.batch_size=4` | {data['hbm_bytes_peak'] / 2**20:.1f} MiB of 15.75 GiB |"
    assert f"{row} {data['static_cycles'] / 1e6:,.0f} M | {data['least_cycles'] / 1e6:,.0f} M |" in page


def test_a_plan_made_before_is_read_unless_the_code_has_changed(monkeypatch):
    program = dict(module="m", case={"a": 1}, topology="v5e:1x1", arguments={"parameters": 2**30}, devices=1, wan=None)
    asked = []

    @contextlib.contextmanager
    def compiled_for_tpu(case, *_, **__):
        asked.append(case)
        raise DoesNotFitError("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
        yield

    monkeypatch.setattr(compiled, "compiled_for_tpu", compiled_for_tpu)
    monkeypatch.setattr(compiled, "step_cost", lambda *_: None)
    plan = lambda **changes: compiled.compiled_outcome(**program | changes, flops=1.0, vmem_remedy="")
    first, again, other = plan(), plan(), plan(case={"a": 2})
    assert again == dataclasses.replace(first, is_earlier=True) and first.peak == int(20.5 * 2**30)
    assert not other.is_earlier and asked == ["m:lowered"] * 2

    (file,) = {compiled._file("m", {"a": 1}, "v5e:1x1")}
    file.write_text('{"memory": ')  # damaged
    assert plan() == dataclasses.replace(first, compile_seconds=plan().compile_seconds, is_earlier=False)
    monkeypatch.setattr(compiled, "_code", lambda: "other code")
    assert not plan().is_earlier


def test_the_outcome_of_a_program_that_fits_survives_its_file():
    chip = chip_of("v5e:1x1")
    sizes = dict(cycles=5, least_cycles=4, kernel_cycles=3, hbm_traffic=8, host_bytes=9)
    cost = TpuCost(**sizes, collective_bytes={"all-gather": 7}, chip=chip)
    outcome = compiled.Outcome({"program": 3}, 3, cost, 1.5)
    found = compiled.Outcome.from_json(json.loads(json.dumps(outcome.to_json())), chip)
    assert found == dataclasses.replace(outcome, is_earlier=True)


def test_a_small_run_is_planned_for_gpus(monkeypatch):
    # CI has no CUDA plugin; the program is then made for as many CPU devices.
    monkeypatch.setattr("rehyat_jax.planning.planner.devices_of", lambda topology: jax.devices())
    monkeypatch.setattr("rehyat_jax.planning.compiled.devices_of", lambda topology: jax.devices())
    plan = make_plan(dataclasses.replace(small_request(batch_size=8), topology="h100:8"))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["fits"] and data["devices"] == data["chips"] == 8 and data["mesh"]["fsdp"] == 8
    assert data["static_cycles"] is None and data["collective_bytes"]["all-gather"] > 0
    assert data["hbm_bytes_peak"] == sum(data["memory"].values()) and data["memory"]["temporaries"] > 0
    assert 0 < data["step_seconds_low"] < data["step_seconds_high"]
    told = report(plan)
    assert "arithmetic at 75% of the peak" in told and "static cycles" not in told


def too_large(request: Request, peak: float) -> Plan:
    arguments = {"parameters": 2**30, "optimizer state": 2 * 2**30, "average (EMA)": 2**30, "frozen teacher": 0}
    mesh = {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    return Plan(request, 4, mesh, arguments, Outcome({}, round(peak * 2**30), None, 1.0))


def test_the_smallest_change_that_fits_is_found_by_compiling_at_most_twice():
    plan = too_large(small_request(batch_size=16, **{"mesh.data": 2}), peak=20)
    asked = []

    def compile_plan(request):
        asked.append(request)
        cost = object() if len(asked) == 2 else None
        return dataclasses.replace(plan, request=request, outcome=dataclasses.replace(plan.outcome, cost=cost))

    remedy = smallest_remedy(plan, compile_plan)
    assert [request.config.remat for request in asked] == ["block", "block"]
    assert [request.config.accumulation_steps for request in asked] == [1, 2]
    assert str(remedy) == ("--topology v5e:2x2 --config.remat=block --config.accumulation_steps=2 (compiled: fits)")


def test_beyond_two_compilations_a_remedy_says_that_it_is_arithmetic():
    request = small_request(batch_size=4, remat="block", **{"mesh.data": 2})
    request = dataclasses.replace(request, wan=request.wan.replace(text_dim=64), latents=(24, 8, 16))
    plan = too_large(request, peak=60)
    remedy = smallest_remedy(plan, lambda request: plan)
    # Eight chunks of three frames: 4x4 and 4x8 are compiled, and among 16 devices half would have nothing to do.
    options = "--topology v5e:8x8 --config.mesh.data=1 --config.mesh.context=16"
    assert str(remedy).startswith(f"{options} (by arithmetic, 6.9 GiB a device; not compiled)")
    # What is on the host already stays there.
    request = small_request(batch_size=16, remat="attention_offload", **{"mesh.data": 2})
    plan = too_large(request, peak=60)
    fits = dataclasses.replace(plan.outcome, cost=object())
    remedy = smallest_remedy(plan, lambda request: dataclasses.replace(plan, request=request, outcome=fits))
    assert remedy.changes == {"remat": "offload"} and remedy.verified
    # The first compilation may say what rematerialisation leaves.
    request = small_request(batch_size=16, **{"mesh.data": 2})
    rematerialised = too_large(request.changed({"remat": "block"}), peak=40)
    remedy = smallest_remedy(too_large(request, peak=60), lambda request: rematerialised)
    assert remedy.changes == {"remat": "block", "accumulation_steps": 4, "mesh.data": 1} and not remedy.verified


@pytest.mark.parametrize("stage", ["distill", "velocity", "finetune", "consistency", "dmd"])
def test_every_stage_can_be_placed_on_devices_that_are_not_here(stage):
    """No array can be made on them, so a step must make none before it is traced."""
    assert placement(small_request(stage=stage)).arguments["parameters"] > 0


@pytest.mark.parametrize("steps", [1, 2])
def test_the_arithmetic_of_an_unchanged_run_is_its_own_peak(steps):
    request = small_request(batch_size=16, accumulation_steps=steps, **{"mesh.data": 2})
    plan = dataclasses.replace(too_large(request, peak=60), **placement(request)._asdict())
    assert estimated_peak(plan, request) == plan.peak
    # With more steps, every temporary but the gradients is half as large. One step has no sum of gradients.
    halved = request.changed({"accumulation_steps": 2 * steps})
    parameters, arguments = plan.arguments["parameters"], sum(placement(halved).arguments.values())
    others = plan.peak - sum(plan.arguments.values()) - steps * parameters
    assert estimated_peak(plan, halved) == arguments + 2 * parameters + others // 2


def test_a_video_of_two_chunks_cannot_be_cut_among_more_than_two_devices():
    plan = too_large(small_request(batch_size=4, remat="block", **{"mesh.data": 2}), peak=60)
    assert smallest_remedy(plan, lambda request: plan) is None


def test_what_the_mesh_cannot_cut_is_no_remedy():
    request = small_request(batch_size=4, remat="block", **{"mesh.data": 2})
    # Text embeddings of 48 cannot be cut in 64.
    plan = too_large(dataclasses.replace(request, latents=(24, 8, 16)), peak=60)
    assert smallest_remedy(plan, lambda request: plan) is None


def test_a_run_that_does_not_fit_ends_with_code_3(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("rehyat_jax.plan.make_plan", lambda request, report: too_large(request, peak=20))
    file = tmp_path / "plan.json"
    arguments = ["--config=configs/demo_teacher.py", "--topology=v5e:2x2", f"--json={file}"]
    assert main(arguments) == 3
    out = capsys.readouterr().out
    assert "20.00 GiB of 15.75 GiB" in out
    data = json.loads(file.read_text())
    assert data["fits"] is False and data["hbm_bytes_peak"] == 20 * 2**30 and "step_seconds_low" not in data
    assert "\nno change" in out if data["remedy"] is None else data["remedy"] in out


def test_the_table_keeps_every_plan_that_is_there_and_makes_the_others(monkeypatch, tmp_path, capsys):
    files = dict(records=tmp_path / "runs.json", page=tmp_path / "runs.md")
    monkeypatch.setattr(table, "TRAINING", dataclasses.replace(table.TRAINING, **files))
    planned = []

    def make_plan(request, report):
        planned.append(request)
        if request.topology.startswith("h100"):
            raise InputError("no plugin")
        if len(planned) == 4:
            raise KeyboardInterrupt
        return too_large(request, peak=20)

    monkeypatch.setattr("rehyat_jax.plan.make_plan", make_plan)
    assert main(["--table"]) == INTERRUPTED
    assert main(["--table"]) == 0
    runs = table.planned_runs()
    assert len(planned) == len(runs) + 1  # the fourth, which was stopped, twice
    # Every configuration of a real model lists runs; options and sizes are those of the command lines.
    assert {Path(run.split()[1]).stem for run in runs} == {path.stem for path in Path("configs").glob("wan_*.py")}
    assert {request.latents for request in planned} == {(21, 60, 104), (161, 60, 104), (21, 90, 160)}
    page = table.TRAINING.page.read_text()
    assert page.count("20.00 GiB of 15.75 GiB: does not fit") == sum("v5e" in run for run in runs)
    assert "`--topology h100:8` | not planned yet" in page and "no plugin" in capsys.readouterr().err

    planned.clear()
    before = table.TRAINING.read_records()
    again = next(run for run in runs if "v6e" in run)
    assert main(["--table", again]) == 0
    assert [request.topology for request in planned] == [again.split()[3]]
    assert table.TRAINING.read_records() == before

    assert main(["--table", "wan_1_3b_distil.py"]) == 2
    assert "found 'wan_1_3b_distil.py'; the closest run is '--config configs/wan_1_3b" in capsys.readouterr().err
    assert main(["--config=configs/demo_teacher.py", "--table"]) == 2
    assert "--table takes no other options" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["--table"]) == 2
    assert "PLANNED_RUNS" in capsys.readouterr().err


def test_what_the_compiler_says_of_memory_is_read():
    said = "RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ..."
    assert bytes_asked_for(said, 2**30) == int(20.5 * 2**30)
    said = "the total memory required for HLO temporaries (468.75G) exceeds available HBM (15.75G)."
    assert bytes_asked_for(said, 2**30) == int(469.75 * 2**30)
    assert bytes_asked_for("no idea", 2**30) is None


def test_a_kernel_that_does_not_fit_vmem_is_no_matter_of_hbm(monkeypatch):
    def compiled_for_tpu(*_, **__):
        raise DoesNotFitError("Ran out of memory in memory space vmem. Used 130.50M of 128.00M vmem.")

    monkeypatch.setattr(compiled, "compiled_for_tpu", compiled_for_tpu)
    monkeypatch.setattr(compiled, "_code", lambda: "code of no earlier plan")
    with pytest.raises(InputError, match="a kernel does not fit the chip's VMEM"):
        make_plan(small_request())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/demo_teacher.py"], "--topology is required: python -m rehyat_jax.plan"),
        (["--config=configs/demo_teacher.py", "--topology=v9:2x2"], "v5e, v5p, v6e, tpu7x"),
        (["--config=configs/demo_teacher.py", "--topology=v5e:big"], "expected NAME:SIZE, as v5e:4x4"),
        (["--config=configs/wan_1_3b_distill.py", "--topology=v5e:4x4", "--frames=80"], "nearest are 81 frames"),
        (["--config=configs/demo_finetune.py", "--topology=v5e:2x2", "--config.init_from=nowhere"], "hybrid.blocks"),
        (["--config=configs/demo_teacher.py", "--topology=v5e:2x2", "--config.batch=3"], "is not a field"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "topology", "message"),
    [
        ([], "v5e:3x5x7", "expected a name that libtpu knows"),
        (["--config.mesh.fsdp=3"], "v5e:2x2", "does not make 4 devices"),
        (["--config.batch_size=6"], "v5e:2x2", "data x fsdp of 1, 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(changes, topology, message, capsys):
    assert main(["--config=configs/demo_teacher.py", f"--topology={topology}", *changes]) == 2
    assert message in capsys.readouterr().err


def test_videos_are_measured_in_pixels():
    request, _ = parse_arguments(
        ["plan", "--config=configs/wan_1_3b_distill.py", "--topology=v5e:4x4", "--height=720", "--width=1280"]
    )
    assert request.latents == (21, 90, 160)
    request, _ = parse_arguments(["plan", "--config=configs/demo_teacher.py", "--topology=v5e:2x2"])
    assert request.latents == (21, 6, 6)


def test_a_hybrid_layer_moves_as_much_however_long_the_video_is():
    devices = topology_devices("v5e:2x2")
    form = dict(tokens_per_frame=128, chunk_frames=3, overlap_frames=1, causal=True, stabilizer="row_max")

    def moved(frames: int) -> dict[str, int]:
        def layer(query, key, value, phi_query, phi_key):
            return hybrid_attention_on_mesh(query, key, value, phi_query, phi_key, num_frames=frames, **form)

        with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "context": 4, "tensor": 1}, devices)):
            x = jax.ShapeDtypeStruct((1, frames * 128, 1, 128), jnp.bfloat16)
            hlo = jax.jit(layer).lower(x, x, x, x, x).compile().as_text()
        return collective_bytes(executed_operations(hlo, of_fusions=True), 4)

    found = moved(24)
    assert found == moved(48)
    # To the next device: keys and values of one frame, and one device's sums, as many features as head_dim, float32.
    halo, sums = 128 * 128 * 2, (128 + 1) * 128 * 4
    assert found["collective-permute"] == 2 * halo + sums
    assert found["all-gather"] == 3 * sums
