"""Section "plan": the plans of `rehyat_jax.plan` for the measured steps. It needs no GPU."""

from collections.abc import Iterator

import jax

from rehyat_jax.benchmarks.gpu_run.cases import train_case, train_cases
from rehyat_jax.benchmarks.gpu_run.machine import nvidia_smi
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes
from rehyat_jax.cost_model.chips import device_count
from rehyat_jax.planning.planner import Request, make_plan


def rows(sizes: Sizes) -> Iterator[Row]:
    """One row with the planned memory and time of each section of train steps."""
    jax.config.update("jax_platforms", "cpu")
    topology = sizes.topology or ("h200:1" if "H200" in (nvidia_smi() or "") else "h100:1")
    cases = train_cases()
    for name in sizes.planned or cases:
        config, *model = train_case(sizes, **cases[name])
        config.batch_size = device_count(topology)
        try:
            plan = make_plan(Request(config, *model, topology))
        except Exception as error:  # the other steps are still planned
            yield {
                "section": name,
                "topology": topology,
                "peak_bytes": None,
                "error": repr(error)[:500],
                "right": False,
            }
            continue
        low, high = plan.cost.step_seconds if plan.cost else (None, None)
        yield {
            "section": name,
            "topology": topology,
            "peak_bytes": plan.peak,
            "seconds_low": low,
            "seconds_high": high,
            "compile_seconds": plan.outcome.compile_seconds,
        }
