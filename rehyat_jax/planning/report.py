"""A plan as a table for people."""

from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.planning.estimate import TpuCost
from rehyat_jax.planning.planner import Plan


def report(plan: Plan) -> str:
    """The plan as lines of text; sizes and cycles are of one device."""
    request, chip = plan.request, chip_of(plan.request.topology)
    config, wan = request.config, request.wan
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    frames, height, width = request.latents
    rows = [
        (
            "run",
            f"{config.stage}, {config.batch_size} videos a step, accumulation_steps {config.accumulation_steps}, "
            f"remat {config.remat}",
        ),
        ("model", f"{wan.num_layers} blocks of width {wan.width}, {forms_of(wan)}"),
        ("latents", f"{frames} frames of {height} x {width}"),
        ("devices", f"{plan.devices} ({plan.chips} chips), {mesh}"),
        ("", ""),
        *((kind, gib(size)) for kind, size in (plan.memory or plan.arguments).items()),
        ("HBM in all", f"{gib(plan.peak) if plan.peak else 'unknown'} of {gib(chip.hbm_bytes)}"),
        ("fits", "yes" if plan.fits else "NO"),
    ]
    if plan.cost is not None:
        rows += _cost_rows(plan)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
    if plan.outcome.is_earlier:
        lines += ["", EARLIER]
    return "\n".join([*lines, *(["", f"Nothing was run. Step time, {plan.cost.assumptions}."] if plan.fits else [])])


EARLIER = "An earlier plan compiled the same program with the same code and compiler; its result was read."
"""A line of the report of a plan that compiled nothing."""


def forms_of(wan: WanConfig) -> str:
    """The number of hybrid blocks; if their forms differ, the number of blocks with each form."""
    forms = wan.block_forms
    different = {forms.of_block[block] for block in forms.converted}
    if len(different) < 2:
        return f"{len(forms.converted)} {''.join(form.kind for form in different) or 'hybrid'}"
    return ", ".join(f"{forms.of_block.count(form)} {form.label}" for form in forms.forms)


def _cost_rows(plan: Plan) -> list[tuple[str, str]]:
    cost, data = plan.cost, plan.to_json()
    low, high = cost.step_seconds
    span = lambda values, form: f"{values['low']:{form}} to {values['high']:{form}}"
    use, recomputed = data["model_flops_utilization"], plan.recomputed_flops
    rows = [
        ("", ""),
        ("model FLOPs a step", f"{plan.model_flops / 1e12:,.3g} T, and {recomputed / 1e12:,.3g} T recomputed"),
    ]
    if isinstance(cost, TpuCost):
        cycles = (
            f"{cost.cycles / 1e6:,.0f} M, {cost.kernel_cycles / 1e6:,.0f} M of them in kernels; at least "
            f"{cost.least_cycles / 1e6:,.0f} M"
        )
        rows.append(("static cycles", cycles))
    return [
        *rows,
        *((kind, f"{size / 1e6:,.3g} MB") for kind, size in cost.collective_bytes.items() if size),
        *([("to the host and back", f"{gib(cost.host_bytes)} each, in none of the times")] if cost.host_bytes else []),
        (
            "seconds, each alone",
            f"compute {span(data['compute_seconds'], '.3g')}, HBM {cost.hbm_seconds:.3g}, links "
            f"{cost.collective_seconds:.3g}",
        ),
        ("step, seconds", f"{low:.3g} to {high:.3g}"),
        ("model FLOPs use", span(use, ".1%")),
        (f"hours, {plan.request.config.steps:,} steps", span(data["hours"], ",.3g")),
        ("chip-hours", span(data["chip_hours"], ",.4g")),
    ]


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
