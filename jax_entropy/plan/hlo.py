"""Reads a compiled program: what it sends over the network and moves through memory, with loops counted by their turns.

The compiler's own counts take the body of a loop once, and a model is a loop over its layers.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](?:\{(?:[^{}]*?S\((\d+)\))?[^{}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "while", "call", "conditional", "async-start", "optimization-barrier",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


class Instruction(NamedTuple):
    """One line of a computation; `shape` and `rest` as written."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclasses.dataclass
class Collective:
    """All collectives of one kind: how often a step calls them, the bytes that a device sends, elements of results."""

    calls: float = 0
    sent: float = 0
    sizes: set[int] = dataclasses.field(default_factory=set)


class Program:
    """The text of a compiled module, taken apart into computations."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if not line.startswith(" "):
                if head := _HEAD.match(line):
                    current = self.computations[head[1]] = {}
                    self.entry = head[1] if line.startswith("ENTRY") else self.entry
            elif match := _LINE.match(line):
                instruction = _instruction(match, line[match.end() :])
                current[instruction.name] = instruction

    def executed(self) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, turns) of everything that a step runs; fusions are single instructions."""
        yield from self._walk(self.entry, 1.0, 1.0)

    def _walk(self, computation: str, turns: float, last_trip: float) -> Iterator[tuple[str, Instruction, float]]:
        for instruction in self.computations[computation].values():
            yield computation, instruction, turns
            if instruction.opcode == "while":
                trip = self._trip(computation, instruction, last_trip)
                yield from self._walk(_called(instruction, "body"), turns * trip, trip)
            elif instruction.opcode in ("call", "async-start"):
                name = _called(instruction, "calls") or _called(instruction, "to_apply")
                yield from self._walk(name, turns, last_trip)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)", instruction.rest)
                for name in re.findall(r"%([\w.-]+)", branches[1] if branches else ""):
                    yield from self._walk(name, turns, last_trip)

    def _trip(self, computation: str, loop: Instruction, outer: float) -> float:
        """How often a loop turns; where that depends on the loop around it, as under a causal mask, half as often."""
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
            return float(known[1])
        scope, condition = self.computations[computation], self.computations[_called(loop, "condition")]

        def number(name: str) -> int | None:
            """What a value is when the loop begins, if that is known here."""
            value = condition.get(name)
            if value and value.opcode == "get-tuple-element":
                given = scope[loop.operands[0]].operands
                value = scope.get(given[int(re.search(r"index=(\d+)", value.rest)[1])]) if given else None
            while value and value.opcode in ("copy", "bitcast"):
                value = scope.get(value.operands[0])
            constant = value and value.opcode == "constant" and re.match(r"-?\d+", value.rest)
            return int(constant[0]) if constant else None

        compared = next((i for i in condition.values() if i.opcode == "compare" or "compare" in i.name), None)
        ends = [number(name) for name in compared.operands[:2]] if compared else [None]
        return (outer + 1) / 2 if None in ends else float(abs(ends[1] - ends[0]))

    def collectives(self) -> dict[str, Collective]:
        """What a device sends in one step, by kind; in ring algorithms, as TPUs and NCCL use for large arrays."""
        found: dict[str, Collective] = collections.defaultdict(Collective)
        for kind, instruction, scope, turns in self._communication():
            n = _group_size(instruction.rest)
            size = sum(_size(scope[name].shape) for name in instruction.operands if name in scope)
            share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
            found[kind].calls += turns
            found[kind].sent += turns * size * share
            shapes = [dims.split(",") for _, dims, _ in _ARRAY.findall(instruction.shape) if dims]
            found[kind].sizes.add(max((math.prod(map(int, dims)) for dims in shapes), default=1))
        return dict(found)

    def _communication(self) -> Iterator[tuple[str, Instruction, dict[str, Instruction], float]]:
        """(kind, instruction, its computation, turns) of every collective, those inside of fusions too."""
        for computation, instruction, turns in self.executed():
            if instruction.opcode != "fusion":
                scope, scattered, parts = self.computations[computation], False, [instruction]
            else:  # a TPU's reduce-scatter is an all-reduce inside of a fusion
                name = _called(instruction, "calls")
                scattered = "reduce-scatter" in instruction.name or "all-reduce-scatter" in name
                scope = self.computations[name]
                parts = scope.values()
            for part in parts:
                if kind := _kind(part.opcode):
                    yield "reduce-scatter" if scattered and kind == "all-reduce" else kind, part, scope, turns

    def traffic(self) -> float:
        """Bytes that a device reads from and writes to its main memory in one step; slices count as what they touch."""
        total = 0.0
        for computation, instruction, turns in self.executed():
            if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
                continue
            total += turns * self._moved(instruction, self.computations[computation])
        return total

    def launches(self) -> int:
        """Kernels that a GPU starts in one step: fusions, products, copies and what else computes or moves."""
        launched = (
            turns for _, instruction, turns in self.executed()
            if instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update"))
        )  # fmt: skip
        return round(sum(launched))

    def _moved(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
        shapes = [scope[name].shape if name in scope else "" for name in instruction.operands]
        if instruction.opcode == "fusion":
            name = _called(instruction, "calls")
            read = sum(self._read(name, i, _size(shape, True)) for i, shape in enumerate(shapes))
            return read + _written(self.computations[name], instruction.shape)
        if instruction.opcode in _SLICES:
            return 2 * _size(instruction.shape, True)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _size(shapes[1 if instruction.opcode == "dynamic-update-slice" else -1], True)
        if instruction.opcode == "custom-call" and "AllocateBuffer" in instruction.rest:
            return 0
        if instruction.opcode == "copy-start":  # (to, from, …)
            return _size(instruction.shape, True)
        if instruction.opcode == "slice-start":  # ((from), to, …)
            piece = _balanced(instruction.shape[1:])[1]
            return _size(piece) + _size(piece, True)
        if instruction.opcode.endswith("-start"):
            return 2 * sum(_size(shape, True) for shape in shapes)
        return sum(_size(shape, True) for shape in shapes) + _size(instruction.shape, True)

    def _read(self, fusion: str, index: int, size: float) -> float:
        """Bytes that a fusion reads of an operand: of one that it slices, the slices; of one that it updates, none."""
        read = 0.0
        for user, name in self._users(fusion, self._parameter(fusion, index)) if size else ():
            if user.opcode in _SLICES:
                read += _size(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return min(read, size)

    def _users(self, computation: str, name: str) -> Iterator[tuple[Instruction, str]]:
        """Who reads a value, and under which name: past bitcasts, and within fusions and behind those that hand it on.

        Where it leaves the computation, the last to name it counts as a reader.
        """
        inside = self.computations[computation]
        if inside[name].root:
            yield inside[name], ""
        for user in (instruction for instruction in inside.values() if name in instruction.operands):
            if user.opcode == "bitcast":
                yield from self._users(computation, user.name)
            elif user.opcode == "fusion":
                called = _called(user, "calls")
                for inner, inner_name in self._users(called, self._parameter(called, user.operands.index(name))):
                    if inner_name:
                        yield inner, inner_name
                    else:
                        yield from self._users(computation, user.name)
            else:
                yield user, name

    def _parameter(self, computation: str, index: int) -> str:
        inside = self.computations[computation].values()
        return next(i.name for i in inside if i.opcode == "parameter" and i.rest.startswith(f"{index})"))


def _instruction(match: re.Match, text: str) -> Instruction:
    shape, rest = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, rest_ = _balanced("(" + rest)
    if opcode in ("constant", "parameter"):
        return Instruction(match[2], shape, opcode, (), rest, bool(match[1]))
    return Instruction(match[2], shape, opcode, tuple(re.findall(r"%([\w.-]+)", operands)), rest_, bool(match[1]))


def _balanced(text: str) -> tuple[str, str]:
    """A parenthesised beginning, and what follows it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _called(instruction: Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%?([\w.-]+)", instruction.rest)
    return found[1] if found else ""


def _kind(opcode: str) -> str:
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in _COLLECTIVES else ""


def _size(shape: str, main_memory: bool = False) -> int:
    """Bytes of a shape; of those in main memory only, where a layout puts them on the chip (S(1) and up)."""
    total = 0
    for dtype, dims, space in _ARRAY.findall(shape):
        if not (main_memory and space not in ("", "0")):
            width = _BYTES.get(dtype) or (1 if dtype.startswith("f8") else max(1, int(re.sub(r"\D", "", dtype)) // 8))
            total += width * math.prod(map(int, dims.split(","))) if dims else width
    return total


def _group_size(rest: str) -> int:
    """How many devices take part in each group of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    return 2


def _written(inside: dict[str, Instruction], shape: str) -> float:
    """Bytes that a fusion writes; where it updates an array in place, the update."""
    root = next(i for i in inside.values() if i.root)
    results = [inside[name] for name in root.operands if name in inside] if root.opcode == "tuple" else [root]
    shapes = [match[0] for match in _ARRAY.finditer(shape)]
    total = 0.0
    for result, written in zip(results, shapes, strict=False):
        while result.opcode == "bitcast" and result.operands[0] in inside:
            result = inside[result.operands[0]]
        size = _size(written, True)
        if result.opcode == "dynamic-update-slice":
            size = min(size, _size(inside[result.operands[1]].shape))
        total += size
    return total
