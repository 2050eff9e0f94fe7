"""Studies as Markdown: one section each, on a page of its own or together with others."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import check_path
from rehyat_jax.files.write import check_place, reported_write_errors, written_whole
from rehyat_jax.studies.measure import METRICS
from rehyat_jax.studies.plots import save_study
from rehyat_jax.studies.record import FIGURE, Record, read_record, statistics
from rehyat_jax.studies.trends import agreement, best_and_next, sentences, shown_mean

PICTURES = "pictures"
"""The folder next to a page of several studies that has their pictures."""

HEADER = """# Results of the studies

Each study trains variants of the demo with several seeds and measures them on held-out digits. [studies.md](studies.md)
says how a study is run, and what the figures mean. A figure is the mean over seeds ± the standard deviation.

This command writes the page and its pictures from the studies' records:

    python -m rehyat_jax.study --render {page} {files}
"""


def section(record: Record, picture: str) -> str:
    """The section of one study, with a level-two title.

    Args:
      record: the study.
      picture: path of its picture, relative to the page.
    """
    lines = [f"## {record.title}", "", _wrapped(record.question), "", _wrapped(f"Published: {record.published}"), ""]
    lines += [*_table(record), ""]
    if found := sentences(record):
        lines += ["\n\n".join(map(_wrapped, found)), ""]
    lines += [f"![{record.title}]({picture})", "", f"    {record.command}", "", _wrapped(_made_with(record)), ""]
    lines += [f"{run.variant}, seed {run.seed}, failed: {run.failure}\n" for run in record.runs if run.failure]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(record: Record) -> list[str]:
    headline, *others = record.metrics() or [record.headline]
    direction = "lower" if METRICS[headline].lower_is_better else "higher"
    titles = ["variant", "changes", f"{METRICS[headline].title} ({direction} is better)", "lowest to highest", "seeds"]
    rows = [[*titles, *(METRICS[name].title for name in others)]]
    for label, changes in record.variants.items():
        values = record.values(label, headline)
        if not values:
            rows.append([label, changes, "not measured", "", "0", *[""] * len(others)])
            continue
        found = statistics(values)
        cells = [str(found), f"{found.low:{FIGURE}} to {found.high:{FIGURE}}", str(found.count)]
        rows.append([label, changes, *cells, *(_mean(record, label, name) for name in others)])
    if record.teacher:
        shown = [f"{record.teacher[name]:{FIGURE}}" if name in record.teacher else "" for name in (headline, *others)]
        rows.append(["teacher", "", shown[0], "", "", *shown[1:]])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _mean(record: Record, label: str, metric: str) -> str:
    values = record.values(label, metric)
    return str(statistics(values)) if values else ""


def _made_with(record: Record) -> str:
    """One line about the machine, the time and the versions."""
    finished = [run for run in record.runs if run.values]
    machines = sorted({run.hardware for run in finished})
    codes = sorted({run.code for run in finished}) or [record.versions["rehyat_jax"]]
    minutes = sum(run.seconds for run in record.runs) / 60
    return (
        f"{len(finished)} of {len(record.runs)} runs; {minutes:.0f} minutes, summed over processes that may have "
        "shared their cores; "
        f"{'; '.join(machines) or 'no machine yet'}; rehyat_jax {' and '.join(codes)}; {record.date}."
    )


def _overview(records: Sequence[Record]) -> str:
    """The table of all studies: the best two variants, and how many pairs of variants have the published order."""
    rows = ["| study | figure | best | next | pairs in the published order |", "|---|---|---|---|---|"]
    for record in records:
        anchor = re.sub(r"[^\w -]", "", record.title.lower()).replace(" ", "-")
        best = best_and_next(record) or ("", "")
        shown = [f"{label}: {shown_mean(record, label)}" if label else "" for label in best]
        cells = [f"[{record.title}](#{anchor})", METRICS[record.headline].title, *shown, agreement(record)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*rows, ""])


def write_page(record: Record, workdir: Path) -> Path:
    """Writes `study.md` and `study.png` of one study; returns the page's path. Raises InputError if that fails."""
    page, picture = workdir / "study.md", workdir / "study.png"
    with reported_write_errors(page):
        save_study(record, picture)
        with written_whole(page) as temporary:
            temporary.write_text(section(record, picture.name).replace("## ", "# ", 1), encoding="utf-8")
    return page


def write_results(files: Sequence[Path], page: Path) -> None:
    """Writes a page of several studies, and their pictures into the folder `pictures` next to it.

    Args:
      files: records of the studies, in the order of the page.
      page: the Markdown file.

    Raises:
      InputError: a file is no record, two records are of one study, or something cannot be written.
    """
    for path in (page, *files):
        check_path(path)
    check_place(page)
    records = [read_record(file) for file in files]
    names = [record.name for record in records]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--render: expected different studies, found {repeated[0]!r} twice; leave one of them out")
    with reported_write_errors(page):
        for record in records:
            save_study(record, page.parent / PICTURES / f"study_{record.name}.png")
        sections = [section(record, f"{PICTURES}/study_{record.name}.png") for record in records]
        header = HEADER.format(page=page, files=" ".join(map(str, files)))
        with written_whole(page) as temporary:
            temporary.write_text("\n".join([header, _overview(records), *sections]), encoding="utf-8")
