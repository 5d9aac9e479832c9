"""Reads the text of a compiled XLA program: instructions, how often each runs, where in the model it is from."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PACKAGE = "t5x_like/"


@dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
      name: unique in the module.
      shape: of the result, as text.
      opcode: e.g. `fusion`, `all-gather-start`.
      operands: names of the instructions it reads.
      rest: everything after the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Size of the result (all parts of a tuple), without padding."""
        return shape_bytes(self.shape)

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def op_name(self) -> str:
        """Path of transformations and primitives in JAX."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes, e.g. `body`."""
        names = []
        for key in keys:
            if group := self.attribute(rf"\b{key}=\{{([^}}]*)\}}"):
                names += [name.strip().lstrip("%") for name in group.split(",")]
            elif single := self.attribute(rf"\b{key}=%?([\w.\-]+)"):
                names.append(single)
        return names


@dataclass
class Module:
    """A program: computations by name, and the stack frames that its metadata refers to.

    Attributes:
      computations: instructions by name, in their order of execution.
      entry: name of the computation that the program starts with.
      frames: names of this package's functions on the call stack, outermost first, and "file:line" of the last, by id.
    """

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""
    frames: dict[int, tuple[list[str], str]] = field(default_factory=dict)

    def scope(self, instruction: Instruction) -> str:
        """Where in the code the instruction is from: `MLP > Linear (models/parameters.py:127)`."""
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        if frame and int(frame) in self.frames:
            functions, place = self.frames[int(frame)]
            return f"{' > '.join(functions[-2:])} ({place})"
        return instruction.op_name.rpartition("/")[2] or instruction.opcode

    def turns(self, loop: Instruction, outer: float | None) -> float:
        """How often a `while` runs its body; assumed where that depends on data.

        Such is the loop over keys in chunked attention: under a causal mask it takes half of them on average.

        Args:
          loop: the instruction.
          outer: turns of the loop around it.
        """
        known = self.trip_count(loop)
        return known if known is not None else ((outer or 1) + 1) / 2

    def branch(self, instruction: Instruction) -> str:
        """The computation that a `call` or a `conditional` runs: of several the one of most cycles, or the longest."""
        branches = instruction.called("to_apply", "branch_computations", "true_computation", "false_computation")
        size = lambda name: (sum(i.cycles for i in self.computations[name].values()), len(self.computations[name]))
        return max(branches, key=size)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What a fusion or the start of an asynchronous call stands for, also behind calls of its own."""
        for name in instruction.called("calls", "to_apply"):
            for inner in self.computations.get(name, {}).values():
                yield inner
                if inner.opcode in ("call", "fusion"):
                    yield from self.inside(inner)

    def executions(
        self, name: str | None = None, times: float = 1, outer: float | None = None
    ) -> Iterator[tuple[Instruction, float]]:
        """All instructions that run on their own (not within a fusion), and how often; see `turns`."""
        for instruction in self.computations[name or self.entry].values():
            yield instruction, times
            if instruction.opcode == "while":
                turns = self.turns(instruction, outer)
                yield from self.executions(instruction.called("body")[0], times * turns, turns)
            elif instruction.opcode in ("call", "conditional"):
                yield from self.executions(self.branch(instruction), times, outer)

    def cycles(self) -> float:
        """The compiler's estimate of one run, without Pallas kernels, of which it has none."""
        return sum(times * i.cycles for i, times in self.executions() if i.opcode != "custom-call")

    def assumed_loops(self) -> int:
        """Loops of which `turns` is assumed."""
        return sum(i.opcode == "while" and self.trip_count(i) is None for i, _ in self.executions())

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None if that depends on data."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations.get(loop.called("condition")[0], {})
        root = list(condition.values())[-1] if condition else None
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        bound = condition.get(root.operands[1])
        if bound is not None and bound.opcode == "get-tuple-element":
            bound = self._initial(loop, int(bound.attribute(r"index=(\d+)")))
        value = re.match(r"(\d+)", bound.rest) if bound is not None and bound.opcode == "constant" else None
        return int(value[1]) if value else None

    def _initial(self, loop: Instruction, index: int) -> Instruction | None:
        """What a loop's element is before the first turn, through copies."""
        for computation in self.computations.values():
            if loop.name not in computation:
                continue
            start = computation.get(loop.operands[0])
            if start is None or start.opcode != "tuple":
                return None
            value = computation.get(start.operands[index])
            while value is not None and value.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
                value = computation.get(value.operands[0])
            return value
        return None


def parse_module(text: str) -> Module:
    """Reads what `--xla_dump_hlo_as_text` writes, or `compiled.as_text()` returns."""
    module = Module(frames=_parse_frames(text))
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            # `%name (parameters) -> type {`, and ENTRY before it for the first one to run.
            if line.endswith("{") and " -> " in line and (found := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = module.computations.setdefault(found[2], {})
                module.entry = found[2] if found[1] else module.entry
        elif line == "}" or line.startswith("}, execution_thread="):
            current = None  # a kernel's configuration may have lines that begin alike
        elif (instruction := _parse_instruction(line)) is not None:
            current[instruction.name] = instruction
    return module


def _parse_instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    text = line[head.end() :]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opcode, _, text = text.partition("(")
    close = _closing(f"({text}", 0) - 1
    inside, rest = text[:close], text[close + 1 :]
    if opcode == "constant":
        return Instruction(head[1], shape, opcode, (), inside)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"([\w.\-]+)(?:,|$)", inside))
    if opcode == "parameter":
        rest = f"number={inside}{rest}"
    return Instruction(head[1], shape, opcode, operands, rest)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def shape_bytes(shape: str) -> int:
    """Bytes of a shape such as `bf16[8,128]{1,0}` or a tuple of such, without padding."""
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        sizes = [int(size.lstrip("<=")) for size in dims.split(",") if size]
        bits = re.search(r"\d+", dtype)
        width = BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
        total += math.ceil(math.prod(sizes) * width)
    return total


def _parse_frames(text: str) -> dict[int, tuple[str, str]]:
    files = {int(n): name for n, name in _table(text, "FileNames", r'(\d+) "(.*)"')}
    functions = {int(n): name for n, name in _table(text, "FunctionNames", r'(\d+) "(.*)"')}
    pattern = r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    places = {
        int(n): (int(file), int(function), line) for n, file, function, line in _table(text, "FileLocations", pattern)
    }
    pattern = r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
    rows = {int(n): (int(place), int(parent or 0)) for n, place, parent in _table(text, "StackFrames", pattern)}
    frames = {}
    for start in rows:
        functions_here, place_here, current = [], None, start
        while current in rows:
            place, parent = rows[current]
            file, function, line = places[place]
            if _PACKAGE in files[file]:
                place_here = place_here or f"{files[file].rpartition(_PACKAGE)[2]}:{line}"
                functions_here.append(_short(functions[function]))
            # The text counts parents from 1 as it does frames, and a frame without one names itself.
            current = parent - 1 if parent - 1 < current else 0
        if place_here is not None:
            frames[start] = (list(dict.fromkeys(reversed(functions_here))), place_here)
    return frames


def _short(function: str) -> str:
    """`MLP.__call__` -> `MLP`; `make_train_step.<locals>.train_step` -> `train_step`."""
    return function.removesuffix(".__call__").rpartition("<locals>.")[2]


def _table(text: str, title: str, pattern: str) -> Iterator[tuple[str, ...]]:
    """Rows of one of the numbered tables in front of the program."""
    found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    for line in found[1].splitlines() if found else ():
        if row := re.match(pattern, line):
            yield row.groups()
