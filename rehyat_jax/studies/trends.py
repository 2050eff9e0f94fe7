"""Sentences that a study's figures give: the best variant, and the comparison with published scores.

A pair of variants has an order if their means differ. It has the same order in every seed if each seed that both
finished agrees: variants with the same seed share their data and noise. Three seeds are too few for a test of
significance.
"""

import itertools

from rehyat_jax.studies.definition import Trend
from rehyat_jax.studies.measure import METRICS
from rehyat_jax.studies.record import FIGURE, Record, statistics


def sentences(record: Record) -> list[str]:
    """The sentences of a study; none as long as no two variants have figures."""
    best = best_and_next(record)
    found = [best_variant(record, *best)] if best else []
    return found + [text for trend in record.trends if (text := compared(record, trend))]


def best_variant(record: Record, first: str, second: str) -> str:
    """Names the best variant by the headline, `first`, and the one after it."""
    metric = METRICS[record.headline]
    seeds = _shared_seeds(record, first, second)
    wins = sum(_badness(record, first, seed) < _badness(record, second, seed) for seed in seeds)
    return (
        f"Best {metric.title}: {shown_mean(record, first)} ({first}). Next: {shown_mean(record, second)} ({second}). "
        f"The first is better in {wins} of {len(seeds)} seeds."
    )


def compared(record: Record, trend: Trend) -> str:
    """Compares the order of the variants with their published order; "" unless two of them have figures."""
    labels = _from_worse_to_better(record, trend)
    pairs, as_published = _pairs(record, trend)
    if not pairs:
        return ""
    contradicting = [pair for pair in pairs if pair not in as_published]
    certain = sum(_in_every_seed(record, *pair) for pair in as_published)
    scores = "; ".join(f"{label}: {trend.scores[label]:g}" for label in labels)
    title = METRICS[record.headline].title
    found = "; ".join(f"{label}: {shown_mean(record, label)}" for label in labels)
    text = f"Published {trend.title}, from worse to better: {scores}. Here, {title}: {found}. "
    if not contradicting:
        order = "The pair has" if len(pairs) == 1 else f"All {len(pairs)} pairs of variants have"
        return text + f"{order} the published order" + _certainty(certain, len(pairs))
    if not as_published:
        order = "The pair has" if len(pairs) == 1 else f"All {len(pairs)} pairs of variants have"
        return text + f"{order} the opposite order."
    exceptions = "; ".join(f"{worse} and {better}" for worse, better in contradicting)
    return (
        text + f"{len(as_published)} of {len(pairs)} pairs of variants have the published order"
        f"{_certainty(certain, len(as_published))} The exceptions: {exceptions}."
    )


def agreement(record: Record) -> str:
    """How many pairs of variants have the published order, all trends together; "" if nothing is published."""
    found = [_pairs(record, trend) for trend in record.trends]
    pairs, as_published = (sum(len(lists[number]) for lists in found) for number in range(2))
    return f"{as_published} of {pairs}" if pairs else ""


def _from_worse_to_better(record: Record, trend: Trend) -> list[str]:
    """The variants with figures and a published score, in the published order."""
    labels = sorted((label for label in trend.scores if label in _finished(record)), key=trend.scores.__getitem__)
    return labels[::-1] if trend.lower_is_better else labels


def _pairs(record: Record, trend: Trend) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The pairs (worse, better) with a published order, and those of them that have this order here."""
    labels = _from_worse_to_better(record, trend)
    pairs = [pair for pair in itertools.combinations(labels, 2) if len({trend.scores[label] for label in pair}) == 2]
    return pairs, [pair for pair in pairs if _badness(record, pair[0]) > _badness(record, pair[1])]


def best_and_next(record: Record) -> tuple[str, str] | None:
    """The best variant by the headline and the one after it; None as long as no two variants have figures."""
    labels = sorted(_finished(record), key=lambda label: _badness(record, label))
    return (labels[0], labels[1]) if len(labels) > 1 else None


def shown_mean(record: Record, label: str) -> str:
    """A variant's mean of the headline, as tables show it."""
    return f"{statistics(record.values(label, record.headline)).mean:{FIGURE}}"


def _certainty(certain: int, pairs: int) -> str:
    if certain == pairs:
        return ", in every seed."
    return f", {certain} of them in every seed." if pairs > 1 else ", but not in every seed."


def _finished(record: Record) -> list[str]:
    return [label for label in record.variants if record.values(label, record.headline)]


def _shared_seeds(record: Record, first: str, second: str) -> list[int]:
    return sorted(record.values(first, record.headline).keys() & record.values(second, record.headline).keys())


def _in_every_seed(record: Record, worse: str, better: str) -> bool:
    seeds = _shared_seeds(record, worse, better)
    return bool(seeds) and all(_badness(record, worse, seed) > _badness(record, better, seed) for seed in seeds)


def _badness(record: Record, label: str, seed: int | None = None) -> float:
    """The headline of a variant, negated if a higher value is better: its mean, or its value with one seed."""
    values = record.values(label, record.headline)
    value = statistics(values).mean if seed is None else values[seed]
    return value if METRICS[record.headline].lower_is_better else -value
