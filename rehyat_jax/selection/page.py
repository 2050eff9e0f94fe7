"""Attention Surgery's result as a page with a picture: a table by block, and the Pareto fronts."""

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.selection.record import Result
from rehyat_jax.selection.solve import Choice


def write_page(result: Result, page: Path, picture: Path) -> None:
    """Writes the page and its picture. Raises InputError if that fails."""
    with reported_write_errors(page):
        save_fronts(result, picture)
        with written_whole(page) as temporary:
            temporary.write_text(markdown(result, picture.name), encoding="utf-8")


def markdown(result: Result, picture: str) -> str:
    """The page; `picture` is the picture's path relative to it."""
    about, choice = result.about, result.choice
    cost = f"{about['cost_words']} of attention to {about['latents']} latents"
    counts = ", ".join(f"{count} {label}" for label, count in Counter(result.labels).items())
    lines = [
        "# Attention Surgery: a form of attention for every block",
        "",
        f"Budget: {result.budget:g} of the {cost}, all blocks softmax. Chosen: {counts}. "
        f"The choice costs {choice.cost:.4f} and leaves a mean error of {_mean(result, choice):.4f}. "
        f"HiGHS: {choice.status} Gap: {choice.gap:g}.",
        "",
        "## Error of every block",
        "",
        f"Relative L1 error of the block's attention after stage 1, on {about['examples']} held-out examples, with "
        "its 95% interval. The chosen form is bold. An error of softmax is 0.",
        "",
        *_blocks(result),
        "",
        "## Budgets",
        "",
        "Errors are means over all blocks. Homogeneous: the best choice that converts blocks to one form only, those "
        "of lowest error first.",
        "",
        *_budgets(result),
        "",
        f"![Pareto fronts]({picture})",
        "",
        "## One form only, at this budget",
        "",
        *_baselines(result),
        "",
        *[f"Skipped: {label}: {reason}.\n" for label, reason in about["skipped"].items()],
        "## Train this choice",
        "",
        *(f"    {command}" for command in about["next"]),
        "",
        f"Made by this command with {', '.join(f'{name} {text}' for name, text in about['versions'].items())} "
        f"on {about['date']}; {about['hardware']}:",
        "",
        f"    {about['command']}",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _blocks(result: Result) -> list[str]:
    problem, labels = result.problem, result.problem.labels
    rows = [["block", "form", *labels[1:]]]
    for block, chosen in enumerate(result.choice.forms):
        cells = []
        for form in range(1, len(labels)):
            low, high = result.intervals[form, block]
            cell = f"{problem.errors[form, block]:.3f} ({low:.3f} to {high:.3f})"
            cells.append(f"**{cell}**" if form == chosen else cell)
        rows.append([str(block), labels[chosen], *cells])
    relative = problem.costs / problem.costs[0]
    rows.append(["cost of softmax = 1", "", *(f"{relative[form].mean():.4f}" for form in range(1, len(labels)))])
    return _table(rows)


def _budgets(result: Result) -> list[str]:
    rows = [["budget", "error", "cost", "forms", "homogeneous: error", "cost", "forms"]]
    for row in result.rows:
        cells = [cell for choice in (row.best, row.homogeneous) for cell in _cells(result, choice)]
        rows.append([f"{row.budget:g}", *cells])
    return _table(rows)


def _baselines(result: Result) -> list[str]:
    rows = [["form", "error", "cost", "forms"]]
    rows += [[label, *_cells(result, choice)] for label, choice in result.baselines.items()]
    return _table(rows)


def _cells(result: Result, choice: Choice | None) -> list[str]:
    if choice is None:
        return ["too costly", "", ""]
    counts = Counter(result.problem.labels[form] for form in sorted(choice.forms))
    forms = ", ".join(f"{count} {label}" for label, count in counts.items())
    return [f"{_mean(result, choice):.4f}", f"{choice.cost:.4f}", forms]


def _mean(result: Result, choice: Choice) -> float:
    return choice.error / result.problem.errors.shape[1]


def save_fronts(result: Result, path: Path) -> None:
    """Writes a PNG: the mean error of a block by the budget, for the best choices and for those of one form."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained", dpi=110)
    axes = figure.subplots()

    def steps(choices: list[Choice], line: str, **style: Any) -> None:
        """A choice serves all budgets from its cost to that of the next one."""
        rising = sorted(choices, key=lambda one: one.cost)
        axes.step([one.cost for one in rising], [_mean(result, one) for one in rising], line, where="post", **style)

    for number, (label, choices) in enumerate(result.conversions.items()):
        if choices[-1].cost < 1:
            line = f".{'-' if number < 10 else '--'}"
            steps(choices, line, linewidth=1, alpha=0.8, color=f"C{number % 10}", label=f"only {label}")
    steps(result.front, "k-", linewidth=1.8, label="best choice")
    star = result.choice
    axes.plot(star.cost, _mean(result, star), "k*", markersize=14, label=f"budget {result.budget:g}")
    axes.axvline(result.budget, color="grey", linewidth=1, linestyle=":")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"budget: {result.about['cost_words']} of attention, all blocks softmax = 1")
    axes.set_ylabel("relative attention error, mean over blocks")
    axes.grid(alpha=0.3)
    for text in axes.legend(fontsize=7).get_texts():
        text.set_parse_math(False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")
