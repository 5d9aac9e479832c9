"""Memory per device: what is known exactly before compiling, and what the compiler says of the rest."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from t5x_like.planning.hlo import Instruction, Module
from t5x_like.sharding.layout import bytes_on_device
from t5x_like.training.job import Job

KINDS = ("activations", "gradients", "temporaries")
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])", re.MULTILINE
)
_PASSED_ON = frozenset({"tuple", "get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "opt-barrier"})


@dataclass(frozen=True)
class Buffer:
    """An array in the memory that the compiler reserves for what a step computes.

    Attributes:
      scope: where in the code it is made.
      shape: with dtype.
      bytes: of the array.
      kind: `gradients`, `activations` (kept for the backward pass) or `temporaries`.
    """

    scope: str
    shape: str
    bytes: int
    kind: str


@dataclass
class Memory:
    """Bytes on one device, the largest share of any.

    Attributes:
      exact: what the program is given, by name (parameters, optimizer state, ...): from shapes and shardings.
      arguments: the compiler's size of all it is given; None where nothing was compiled.
      working: what it reserves beside that, by kind. Memory that serves arrays of several kinds one after the other
        counts for the first of KINDS.
      total: arguments, results and everything between them.
      buffers: the largest beside the arguments, none in another's place.
    """

    exact: dict[str, int]
    arguments: int | None
    working: dict[str, int]
    total: int
    buffers: list[Buffer] = field(default_factory=list)


def bytes_per_device(tree: Any) -> int:
    """Bytes that the device with the largest share holds of a tree of shapes with shardings."""
    return sum(map(bytes_on_device, jax.tree.leaves(tree)))


def exact_parts(job: Job) -> dict[str, int]:
    """What the step is given: parameters, optimizer state (with the step's number), their average, a batch."""
    state = job.state
    parts = {
        "parameters": state.params,
        "optimizer state": (state.step, state.opt_state, state.guard),
        "averaged parameters": state.ema,
        "batch": job.batch,
    }
    return {name: size for name, part in parts.items() if (size := bytes_per_device(part))}


def from_compiler(job: Job, module: Module, assignment: str, stats: Any) -> Memory:
    """What the compiler reserved.

    Args:
      job: what was compiled.
      module: its program.
      assignment: the dump `*buffer-assignment.txt`.
      stats: `compiled.memory_analysis()`, or None if it ran out of memory.
    """
    given = results = reserved = 0
    values: list[tuple[int, int, Buffer]] = []
    kinds = _Kinds(job, module)
    for facts, size, body in _allocations(assignment):
        if "parameter" in facts:
            given += size
        elif "preallocated-temp" in facts:
            reserved += size
            values += _values(module, kinds, body)
        elif "maybe-live-out" in facts:
            results += size
    working = _by_kind(values)
    # What no array has is gaps between arrays.
    working["temporaries"] += results + reserved - sum(working.values())
    if stats is not None and stats.generated_code_size_in_bytes:
        working["program"] = stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes if stats is not None else given
    return Memory(exact_parts(job), arguments, working, given + sum(working.values()), _largest(values, 12))


def _allocations(text: str) -> Iterator[tuple[str, int, str]]:
    """Facts, bytes and values of each allocation in main memory (colour 0)."""
    for size, facts, body in re.findall(r"^allocation \d+: size (\d+), (.*)\n((?: .*\n)*)", text, re.MULTILINE):
        if not re.match(r"color [1-9]", facts):
            yield facts, int(size), body


def _values(module: Module, kinds: "_Kinds", body: str) -> list[tuple[int, int, Buffer]]:
    """(offset, end, array) of everything that an allocation holds at one time or another."""
    values = []
    for name, index, size, offset, shape in _VALUE.findall(body):
        instruction = kinds.instructions.get(name)
        if instruction is not None:
            kind = kinds.of(instruction, index.partition(",")[0], shape)
            buffer = Buffer(module.scope(instruction), shape, int(size), kind)
            values.append((int(offset), int(offset) + int(size), buffer))
    return values


def _by_kind(values: list[tuple[int, int, Buffer]]) -> dict[str, int]:
    """Bytes of the allocation by kind: each address counts once."""
    taken = 0
    sizes = {}
    covered: list[tuple[int, int]] = []
    for kind in KINDS:
        covered = _union([*covered, *((start, end) for start, end, buffer in values if buffer.kind == kind)])
        total = sum(end - start for start, end in covered)
        sizes[kind], taken = total - taken, total
    return sizes


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _largest(values: list[tuple[int, int, Buffer]], count: int) -> list[Buffer]:
    """The largest arrays, none of which overlaps another."""
    chosen: list[tuple[int, int, Buffer]] = []
    for start, end, buffer in sorted(values, key=lambda v: (-v[2].bytes, KINDS.index(v[2].kind))):
        if len(chosen) < count and all(end <= other or start >= stop for other, stop, _ in chosen):
            chosen.append((start, end, buffer))
    return [buffer for _, _, buffer in chosen]


class _Kinds:
    """Tells gradients and kept activations from other arrays, by JAX's names of transformations."""

    def __init__(self, job: Job, module: Module):
        self.instructions = {name: i for computation in module.computations.values() for name, i in computation.items()}
        self.users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                self.users[operand].append(instruction)
        params = jax.tree.leaves(job.state.params)
        self.gradients = {_text(a.dtype, shape) for a in params for shape in (a.shape, a.sharding.shard_shape(a.shape))}

    def of(self, instruction: Instruction, index: str, shape: str) -> str:
        """What a value is for: result number `index` of the instruction, or all of it."""
        forward = "jvp(" in instruction.op_name and "transpose(" not in instruction.op_name
        if forward and not self._reaches_backward(instruction.name, index, 4):
            return "temporaries"
        # In a parameter's shape: a gradient, also where the loss makes it in the forward pass.
        return "gradients" if shape in self.gradients else "activations" if forward else "temporaries"

    def _reaches_backward(self, name: str, index: str, depth: int) -> bool:
        for user in self.users[name]:
            if index and user.opcode == "get-tuple-element" and user.attribute(r"index=(\d+)") != index:
                continue
            if "transpose(" in user.op_name and user.opcode not in _PASSED_ON:
                return True
            if depth and user.opcode in _PASSED_ON and self._reaches_backward(user.name, "", depth - 1):
                return True
        return False


def _text(dtype: Any, shape: tuple[int, ...]) -> str:
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return f"{names.get(str(dtype), dtype)}[{','.join(map(str, shape))}]"
