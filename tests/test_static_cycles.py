"""Static cycles, counted in real programs of the TPU compiler whose counts are known by construction."""

import gzip
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.benchmarks import splash_blocks, tpu_cases, tpu_report, tpu_static, vae_static
from rehyat_jax.cost_model import tpu_compile, tpu_kernels
from rehyat_jax.cost_model.static_cycles import StaticProgram
from rehyat_jax.cost_model.tpu_bundles import LISTINGS, Kernel, listing_file
from rehyat_jax.cost_model.tpu_compile import DoesNotFitError, compiled_for_tpu
from rehyat_jax.cost_model.tpu_kernels import KernelCall, kernel_calls, list_kernels
from rehyat_jax.cost_model.tpu_scalar import ScalarProgram
from rehyat_jax.cost_model.tpu_target import running
from rehyat_jax.errors import InputError

ROWS, COLUMNS, DEPTH = 512, 256, 256


@pytest.fixture(autouse=True)
def _cases_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def compiled(case: str, topology: str, **keywords) -> StaticProgram:
    with compiled_for_tpu(f"{Path(__file__).stem}:{case}", keywords, topology) as program:
        return StaticProgram(program)


def matrix_product_kernel(*, heads: int = 1, trips: int = 4, parallel: bool = False, reads_flag: bool = False):
    """A grid [heads, 4, 4] whose products are made where j // 3 * 3 <= i, in `trips` parts; again where a flag is 1."""

    pltpu.get_tpu_info()  # raises unless cases are made for the chip, as what chooses its blocks by the chip needs

    def kernel(flag, x, w, y, total):
        i, j = pl.program_id(1), pl.program_id(2)

        @pl.when(j == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def add():
            def part(n, _):
                rows = pl.ds(n * (ROWS // trips), ROWS // trips)
                total[rows, :] += jnp.dot(x[rows, :], w[...], preferred_element_type=jnp.float32)

            jax.lax.fori_loop(0, trips, part, None)

        pl.when(j // 3 * 3 <= i)(add)
        if reads_flag:
            pl.when(flag[0] == 1)(add)

        @pl.when(j == 3)
        def _():
            y[...] = total[...].astype(y.dtype)

    def call(flag, x, w):
        return pl.pallas_call(
            kernel,
            grid=(heads, 4, 4),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((None, ROWS, DEPTH), lambda h, i, j: (h, i, j)),
                pl.BlockSpec((None, DEPTH, COLUMNS), lambda h, i, j: (h, j, 0)),
            ],
            out_specs=pl.BlockSpec((None, ROWS, COLUMNS), lambda h, i, j: (h, i, 0)),
            out_shape=jax.ShapeDtypeStruct((heads, 4 * ROWS, COLUMNS), jnp.bfloat16),
            scratch_shapes=[pltpu.VMEM((ROWS, COLUMNS), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel" if parallel else "arbitrary", "arbitrary", "arbitrary")
            ),
            name="products",
        )(flag, x, w)

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    return call, (
        array(1, dtype=jnp.int32),
        array(heads, 4 * ROWS, 4 * DEPTH),
        array(heads, 4 * DEPTH, COLUMNS),
    )


# Of the 16 grid steps of a head: i = 0, 1, 2 run j = 0, 1, 2, and i = 3 runs all.
RUNS = 3 + 3 + 3 + 4


def mxu_cycles(steps: int, products_a_cycle: int) -> int:
    return steps * ROWS * COLUMNS * DEPTH // products_a_cycle


# bfloat16 multiplications of one core in a cycle, of the chips' published peaks.
PRODUCTS_A_CYCLE = {"v5e:2x2": 65_536, "v6e:2x2": 262_144, "tpu7x:2x2x1": 262_144}


@pytest.mark.parametrize("topology", PRODUCTS_A_CYCLE)
def test_a_kernels_predicates_and_loops_are_counted_as_they_run(topology):
    (kernel,) = compiled("matrix_product_kernel", topology).cost().kernels
    # Exactly: the shapes fill the matrix units.
    assert kernel.mxu_cycles == mxu_cycles(RUNS, PRODUCTS_A_CYCLE[topology])
    assert kernel.inner_loop.times == RUNS * 4
    # Zeroing and writing the sums: once for every i.
    assert {region.times for region in kernel.regions if region.end - region.start > 20} >= {4, RUNS * 4}
    assert kernel.cycles == sum(region.cycles for region in kernel.regions)


def test_both_ways_of_a_kernel_that_looks_at_its_data_are_counted():
    program = compiled("matrix_product_kernel", "v5e:2x2", reads_flag=True)
    assert program.depends_on_data
    found = [program.cost(data).kernels[0].mxu_cycles for data in (0.0, 1.0)]
    assert found == [mxu_cycles(steps, PRODUCTS_A_CYCLE["v5e:2x2"]) for steps in (RUNS, RUNS + 16)]


def test_cores_divide_only_what_is_declared_parallel():
    mxu = {
        parallel: compiled("matrix_product_kernel", "v5p:2x2x1", heads=2, parallel=parallel)
        .cost()
        .kernels[0]
        .mxu_cycles
        for parallel in (False, True)
    }
    one_head = mxu_cycles(RUNS, PRODUCTS_A_CYCLE["v5e:2x2"])  # a core of v5p is one of v5e
    assert mxu == {False: 2 * one_head, True: one_head}


def equal_kernels_in_a_loop():
    """The same kernel twice, and five times with a cosine."""

    def kernel(x, y):
        y[...] = x[...] * 2

    def double(x):
        block = pl.BlockSpec((256, 256), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, grid=(4,), in_specs=[block], out_specs=block, out_shape=shape, name="double")(x)

    def function(x):
        x = double(jnp.sin(double(x)))
        return jax.lax.scan(lambda x, _: (jnp.cos(double(x)), None), x, None, length=5)[0]

    return function, (jax.ShapeDtypeStruct((1024, 256), jnp.float32),)


def test_loops_multiply_kernels_and_estimates():
    cost = compiled("equal_kernels_in_a_loop", "v5e:2x2").cost()
    assert sorted(kernel.calls for kernel in cost.kernels) == [1, 1, 5]
    # Two that have their arrays in the same memories have the same bundles.
    assert len({kernel.cycles // kernel.calls for kernel in cost.kernels}) == 2
    executions = {operation.kind: operation.executions for operation in cost.xla}
    assert (executions["sine"], executions["cosine"]) == (1, 5)
    assert cost.xla_cycles == sum(operation.executions * operation.estimated_cycles for operation in cost.xla)
    assert cost.cycles == cost.kernel_cycles + cost.xla_cycles


def kernels_with_arrays_in_vmem():
    """A kernel, and one whose result takes the memory of its operand; XLA keeps their arrays in VMEM."""

    def add(x, y, total):
        total[...] = x[...] + y[...]

    def call(x, y, **options):
        block = pl.BlockSpec((256, 256), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(add, grid=(4,), in_specs=[block] * 2, out_specs=block, out_shape=shape, **options)(x, y)

    def function(x):
        once = call(jnp.sin(x), x, name="once")
        return jnp.cos(call(once, jnp.cos(x), name="in_place", input_output_aliases={0: 0}))

    return function, (jax.ShapeDtypeStruct((1024, 256), jnp.float32),)


def test_a_kernel_has_the_same_bundles_alone_as_in_its_program(tmp_path):
    topology, case = "v5e:2x2", "kernels_with_arrays_in_vmem"
    label = LISTINGS[1]  # the slots in use in every bundle
    options = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={label}"
    program = [sys.executable, "-m", tpu_compile.__name__, f"{Path(__file__).stem}:{case}", "{}", topology]
    with running([*program, str(tmp_path), "one"], tmp_path / "log.txt", options) as process:
        assert process.wait() == 0, (tmp_path / "log.txt").read_text()
    calls = kernel_calls(json.loads((tmp_path / "result.json").read_text())["hlo"])
    assert [bool(call.aliases) for call in calls.values()] == [False, True]
    assert all(call.is_placed for call in calls.values())
    with compiled_for_tpu(f"{Path(__file__).stem}:{case}", {}, topology) as alone:
        for name, call in calls.items():
            (listed,) = tmp_path.glob(f"*-{name}-*-{label}.txt")
            file = listing_file(alone.directory, call.digest("v5e"), label)
            assert gzip.decompress(file.read_bytes()).decode() == listed.read_text(), name


def test_listings_come_from_the_cache_unless_they_are_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tpu_kernels, "running", lambda *_: pytest.fail("compiled"))
    call = KernelCall([], "f32[8]", [], {"custom_call_config": {"body": ""}}, 0)
    monkeypatch.setattr(tpu_kernels, "kernel_calls", lambda hlo: {"kernel": call})
    digest, cache = call.digest("v5e"), tmp_path / "rehyat_jax" / "kernels"
    cache.mkdir(parents=True)
    for label in LISTINGS:
        listing_file(cache, digest, label).write_bytes(gzip.compress(label.encode()))
    directory = tmp_path / "listings"
    directory.mkdir()
    list_kernels("", "v5e:2x2", directory)
    assert gzip.decompress(listing_file(directory, digest, LISTINGS[0]).read_bytes()).decode() == LISTINGS[0]

    damaged = listing_file(cache, digest, LISTINGS[1])
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(pytest.fail.Exception, match="compiled"):
        list_kernels("", "v5e:2x2", directory)


def too_large():
    """Needs 64 GiB, twice what v6e has."""
    return (lambda x: jnp.sin(x)[:, ::-1] + 1), (jax.ShapeDtypeStruct((2**18, 2**15), jnp.float32),)


def test_a_program_that_does_not_fit_is_told_apart():
    with pytest.raises(DoesNotFitError, match="RESOURCE_EXHAUSTED"):
        compiled("too_large", "v6e:2x2")


def test_an_unknown_instruction_is_refused_only_where_a_branch_depends_on_it():
    def times(predicate: str) -> list[int]:
        bundles = [
            "%s1_s1 = sfrobnicate.u32 3  ;;  %s2_s2 = smov.u32 7",
            f"%p3_p1 = scmp.eq.s32.totalorder {predicate}, 7",
            "%4 = sbr.rel (%p3_p1) target bundleno = 8 (0x8), region = 1",
            *[""] * 6,
        ]
        return ScalarProgram(Kernel(bundles, [], None, None, delay_slots=4)).times_issued().tolist()

    assert times("%s2_s2") == [1, 1, 1, 1, 1, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="sfrobnicate"):
        times("%s1_s1")


@pytest.mark.parametrize(
    "direction, kernels",
    [
        ("forward", {"hybrid_states", "hybrid_attend"}),
        ("backward", {"hybrid_readout_backward", "hybrid_states_backward", "hybrid_window_backward"}),
        ("phi_backward", {"hybrid_readout_backward", "hybrid_states_backward"}),
    ],
)
def test_a_hybrid_case_holds_the_kernels_of_its_direction_alone(direction, kernels):
    function, arguments = tpu_cases.hybrid(2, 128, 6, 64, implementation="pallas_tpu", direction=direction)
    called = set(re.findall(r"name=(hybrid_\w+)", str(jax.make_jaxpr(function)(*arguments))))
    assert called == kernels


def test_command_line_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ["--preset", "tiny", "--frames", "3", "--tokens-per-frame", "16", "--implementations", "xla"]
    assert tpu_static.main([*options, "--details", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        ("forward", "splash"),
        ("backward", "splash_fused"),
        ("backward", "splash_unfused"),
        ("forward", "softmax"),
        ("backward", "softmax"),
        ("forward", "xla"),
        ("backward", "xla"),
        ("phi_backward", "xla"),
    ]
    forward, fused, unfused, _, _, hybrid, backward, phi_backward = rows
    assert {(row["topology"], row["preset"], row["frames"]) for row in rows} == {("v5e:2x2", "tiny", 3)}
    assert forward["ratio_to_splash"] == 1
    assert forward["cycles"] == forward["kernel_cycles"] + forward["xla_cycles"]
    assert 0 < forward["mxu_utilization"] < 1 and hybrid["mxu_utilization"] is None
    assert hybrid["ratio_to_splash"] == forward["cycles"] / hybrid["cycles"]
    faster = min(fused["cycles"], unfused["cycles"])
    assert backward["ratio_to_splash"] == faster / backward["cycles"]
    assert phi_backward["cycles"] < backward["cycles"]
    assert "slots in use" in capsys.readouterr().out


def test_forms_are_chosen_by_their_names(capsys):
    assert tpu_static.chosen_forms([]) == list(tpu_cases.FORMS)
    assert tpu_static.chosen_forms(["strided", "linear only", "decay"])[0] == "hybrid, decay"
    assert tpu_static.main(["--forms", "nothing"]) == 2
    assert "--forms nothing: expected texts of softmax, hybrid, " in capsys.readouterr().err


def test_softmax_as_a_form_takes_at_least_the_cycles_of_its_products():
    shape = dict(heads=1, head_dim=128, frames=8, tokens_per_frame=128)
    case = tpu_static.Case("v5e:2x2", "", "softmax", "form", shape | {"name": "softmax", "direction": "forward"})
    fixed_shift, running_maximum = (result.cost.cycles for result in tpu_static.costs(case))
    assert running_maximum > fixed_shift > 4 * (8 * 128) ** 2 * 128 / 131_072  # FLOP a cycle


def test_a_clip_of_the_vae_is_told_with_what_its_products_need():
    cost = {
        "cycles": 3 * 10**8,
        "cycles_of": {"kernels": 2, "products": 2, "layout": 1, "rest": 0},
        "peak_bytes": 2**31,
    }
    row = vae_static.row("v5e:2x2", "decode", 480, 832, 21, 1, cost)
    # 275 and 164 TF are in the literature of ports; a v5e makes 131,072 FLOP a cycle.
    assert row["frames"] == 81 and round(row["flops"] / 1e12) == 275
    assert row["ratio"] == pytest.approx(21 * 3e8 * 131_072 / row["flops"])
    unfit = vae_static.row("v5e:2x2", "encode", 480, 832, 21, 21, None)
    assert round(unfit["flops"] / 1e12) == 164 and "21 | does not fit into memory" in vae_static.line(unfit)
    assert "480x832x81 | 1 | 300.0 | 100.0 | 3.00 " in vae_static.line(row)


def test_growth_is_told_as_an_exponent():
    row = dict.fromkeys(("topology", "preset", "direction", "implementation", "run_time_data"), "x")
    rows = [row | {"frames": n, "cycles": 7 * n**2, "total_bytes": 5 * n} for n in (40, 10, 20)]
    unfit = row | {"frames": 80, "cycles": None, "total_bytes": None}
    (line,) = tpu_report.growth([*rows, unfit])
    assert line.endswith("10 to 40 frames: cycles as frames^2.00, total bytes as frames^1.00")


def test_the_search_finds_the_best_blocks_that_can_be_compiled():
    def cycles(keywords):
        sizes = keywords["blocks"].values()
        if math.prod(list(sizes)[:2]) > 2**21:
            return None
        # Least where every size is 1024, as far as it may be.
        return sum(abs(math.log2(size) - 10) for size in sizes)

    start = {"forward": (256, 256, 128), "dkv": (128, 4096, 512), "dq": (4096, 256)}
    found = splash_blocks.search(cycles, start)
    assert found == {"forward": (1024, 1024, 1024), "dkv": (1024, 1024, 1024), "dq": (1024, 1024)}


def test_missing_compiler_and_unknown_topology_are_told_in_one_line(monkeypatch, capsys):
    assert tpu_static.main(["--topology", "v9:2x2"]) == 2
    assert "v9:2x2: expected one that begins with v5e, v5p, v6e, tpu7x" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tpu_static.main([]) == 2
    assert "pip install 'rehyat-jax[tpu]'" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"rehyat-jax\[tpu\]"):
        compiled("too_large", "v5e:2x2")
