"""The scalar instructions of a TPU kernel: their notation in libtpu's listing, and their results."""

import dataclasses
import re
import struct
from collections.abc import Callable

_WORD = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A scalar instruction. It reads literals and values; names of values begin with %.

    Attributes:
      bundle: number of its bundle.
      name: its name as listed, with its types, except for "core_id" and "data" (see `parse`).
      result, register: the value it returns, and the register that holds it.
      operands: the inputs of its computation.
      address: the terms of the address in scalar memory that it loads or stores.
      predicate, expected: condition of its execution: the value `predicate` is equal to `expected`.
      otherwise: its result if it is not executed.
      target: the bundle to branch to.
    """

    bundle: int
    name: str
    result: str
    register: str
    operands: tuple[str, ...]
    address: tuple[str, ...]
    predicate: str | None
    expected: bool
    otherwise: str | None
    target: int | None

    @property
    def is_phi(self) -> bool:
        """True if its result is one of several values, chosen by control flow; one register holds all of them."""
        return self.name.endswith("phi")

    @property
    def is_data(self) -> bool:
        """True if the result may exist only when the kernel runs: an operand, memory, or a value from a vector."""
        return self.name in ("data", "spop") or (self.name == "sld" and self.cell == "any")

    @property
    def cell(self) -> str | None:
        """The scalar memory that it reads or writes: a spilled register's own, or "any"; None if there is none."""
        if not self.address:
            return None
        return self.address[0] if self.address[0].endswith("_spill") else "any"

    @property
    def reads(self) -> set[str]:
        names = {*self.operands, *self.address, self.predicate, self.otherwise} - {None}
        return {name for name in names if not is_literal(name)}


_INSTRUCTION = re.compile(r"(%[sp]?\d+)(?:_([sp]\d+))? = ([\w.]+)(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?)(%p\d+)\w*(?:, (%[sp]\d+)\w*)?\),?")
_ADDRESS = re.compile(r"\[smem:\[(.*?)\]\]")
_TARGET = re.compile(r"target bundleno = (\d+)")


def parse(bundle: int, text: str) -> Instruction | None:
    """One instruction; None if it neither returns a scalar, nor writes scalar memory, nor branches.

    Raises:
      ValueError: it branches to a bundle that only the running program knows.
    """
    match = _INSTRUCTION.match(text.strip())
    if match is None:
        return None
    result, register, name, rest = match.groups()
    stem = name.split(".")[0]
    if result[1:].isdigit() and stem not in ("sst", "sdivrem", "sbr"):
        return None
    predicate, address, target = _PREDICATE.search(rest), _ADDRESS.search(rest), _TARGET.search(rest)
    if stem == "sbr" and target is None:
        raise ValueError(f"bundle {bundle:#x}: expected a branch to a known bundle, found {text.strip()!r}")
    if stem == "inlined_call_operand":
        # A scalar operand is given as its value, an array as its address.
        name, rest = ("data" if "<no memory space>" in text else stem), ""
    operands = _TARGET.split(_ADDRESS.sub("", _PREDICATE.sub("", rest)))[0]
    return Instruction(
        bundle=bundle,
        name=name,
        result=result,
        register=f"%register {register}",
        operands=_names(operands),
        address=_names(address.group(1)) if address else (),
        predicate=predicate and predicate.group(2),
        expected=not (predicate and predicate.group(1)),
        otherwise=predicate and predicate.group(3),
        target=target and int(target.group(1)),
    )


def _names(text: str) -> tuple[str, ...]:
    words = (word.strip(" []\n") for word in re.split(r",|\+", text))
    return tuple(word.split("_")[0] if word.startswith("%") else word for word in words if word)


def is_literal(operand: str) -> bool:
    return not operand.startswith("%")


def literal(text: str) -> int | float:
    """The value of a literal operand: a word, a float, or the address of an allocation."""
    if text.startswith("#allocation"):
        # Invented addresses, far enough from one another.
        return int(re.search(r"\d+", text).group()) << 14
    text = text.removeprefix("$")
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def operation(name: str) -> Callable | None:
    """The function that an instruction computes from its operands: words (Python integers), predicates or floats.

    None for an unknown instruction.
    """
    stem, *types = name.split(".")
    if stem == "scmp":
        compare, convert = _COMPARE[types[0]], _CONVERT[types[1]]
        return lambda a, b: compare(convert(a), convert(b))
    if stem in _ARITHMETIC and types[0] in _CONVERT:
        compute, convert = _ARITHMETIC[stem], _CONVERT[types[0]]
        result = float if types[0] == "f32" else _word
        return lambda a, b: result(compute(convert(a), convert(b)))
    if stem == "sdivrem":
        return _DIVIDE.get(types[0])
    return _OPERATIONS.get(name) or _OPERATIONS.get(stem)


def _word(value: int | float) -> int:
    """The 32 bits of an integer. A float stands for data of an unknown type, and is clamped to a signed integer."""
    return int(min(max(value, -(2**31)), 2**31 - 1) if isinstance(value, float) else value) & _WORD


def _signed(value: int | float) -> int:
    word = _word(value)
    return word - 2**32 if word >> 31 else word


def _float(value: int | float) -> float:
    return value if isinstance(value, float) else struct.unpack("<f", struct.pack("<I", value))[0]


def _on_words(compute: Callable) -> Callable:
    return lambda *values: compute(*map(_word, values)) & _WORD


_CONVERT = {"s32": _signed, "u32": _word, "f32": _float}
_COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ARITHMETIC = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "smin": min,
    "smax": max,
}
_DIVIDE = {
    "DivAndRem": lambda a, b: (a // b, a % b),
    "Div": lambda a, b: (a // b,),
    "Rem": lambda a, b: (a % b,),
}
_OPERATIONS = {
    "smov": lambda a: a,
    "pmov": lambda a: a,
    "scalar_select": lambda predicate, a, b: a if predicate else b,
    "por": lambda a, b: bool(a or b),
    "pand": lambda a, b: bool(a and b),
    "pxor": lambda a, b: bool(a) != bool(b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pneg": lambda a: not a,
    "sand": _on_words(lambda a, b: a & b),
    "sor": _on_words(lambda a, b: a | b),
    "sxor": _on_words(lambda a, b: a ^ b),
    "sshll": _on_words(lambda a, b: a << b),
    "sshrl": _on_words(lambda a, b: a >> b),
    "sshra": lambda a, b: _signed(a) >> b & _WORD,
    "smulhi": _on_words(lambda a, b: a * b >> 32),
    "sc": lambda a, b: _word(a) + _word(b) > _WORD,
    "spop.drf": lambda division, index: division[index],
    "scalar_lea": lambda *parts: sum(parts) & _WORD,
    "int_to_ptr": lambda a: a,
    "inlined_call_operand": lambda: 0,
}
