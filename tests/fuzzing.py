"""Damage for readers of users' files: well-formed content, changed in a few places, as bytes and as JSON.

`FUZZ_EXAMPLES` says how many inputs each reader gets; `make fuzz` sets it far higher than the suite's own run.
"""

import contextlib
import copy
import json
import os
import resource
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rehyat_jax.errors import InputError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

fuzzed = settings(
    max_examples=EXAMPLES,
    # No input may hang a reader; the machine may be busy.
    deadline=10_000,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""Decorates a test of @given inputs."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf"), 1e308, -0.5])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["F32", "BF16", "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "9" * 5000]
        + [f"{'n' * 300}{suffix}" for suffix in (".safetensors", ".array_record")]
    )
)
_SMALL = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)
# Also longer than numpy has axes.
JSON = _SMALL | SCALARS.map(lambda value: [value] * 70)


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> Any:
    """`document` with one to three of its values, at any depth, replaced, removed, copied elsewhere or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(JSON)
        container, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "nudge", "remove", "copy", "add"])):
            case "replace":
                container[key] = draw(JSON)
            case "nudge" if type(container[key]) is int:
                container[key] += draw(st.integers(-2, 2))
            case "remove":
                del container[key]
            case "copy":
                other, other_key = draw(st.sampled_from(places))
                with contextlib.suppress(KeyError, IndexError):  # it may be gone with what was removed
                    container[key] = copy.deepcopy(other[other_key])
            case _ if isinstance(container, dict):
                container[draw(st.text(max_size=8))] = draw(JSON)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bytes changed, inserted and cut away; often with none."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["set", "flip", "insert", "cut", "end"])):
            case "set" if at < len(content):
                content[at] = draw(st.integers(0, 255))
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                content[at:at] = draw(st.binary(max_size=16))
            case "cut":
                del content[at : at + draw(st.integers(1, 16))]
            case "end":
                del content[at:]
    return bytes(content)


@st.composite
def damaged_json_text(draw: st.DrawFn, document: Any) -> bytes:
    """The text of a damaged document, perhaps damaged itself."""
    changed = draw(damaged_json(document) | st.just(document))
    text = draw(damaged_bytes(json.dumps(changed).encode("utf-8", "surrogatepass")))
    # Deeper than a parser that calls itself can go.
    return draw(st.just(text) | st.just(b"[" * 100_000) if draw(st.integers(0, 20)) == 0 else st.just(text))


@contextlib.contextmanager
def only_input_errors(*mentions: str) -> Iterator[None]:
    """What is inside may refuse its input, by an InputError whose message has one of `mentions`, but fail no other way.

    Nor may it take memory beyond what a small file can mean.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except InputError as error:
        assert not mentions or any(mention in str(error) for mention in mentions), f"says not where: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, f"took {grown / 1024:.0f} MiB"
