"""Predicts a step's time: the compiler's schedule, played with its cycle estimates and the network's bandwidth."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from t5x_like.planning import collectives
from t5x_like.planning.hlo import Instruction, Module
from t5x_like.planning.topology import Chip

EFFICIENCY = 0.6
"""Share of the peak that matrix products are assumed to reach where no compiler has timed them (recorded: 0.39 to 0.65
of model FLOPs alone on TPUs and GPUs)."""
KERNEL_EFFICIENCY = 0.5
"""Share of the peak that is assumed of Pallas kernels, of which the compiler knows no cycles (attention on v5p: 40-70 %
forward, 45-60 % backward by public records)."""

FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "broadcast",
        "copy-start",
        "copy-done",
        "async-start",
        "async-update",
        "async-done",
        "add-dependency",
        "opt-barrier",
        "domain",
        "dynamic-update-slice",
    }
)
"""Operations without a time of their own where the compiler estimates none: nothing to do, done in place or beside
others, or timed through what they call."""


@dataclass
class Collective:
    """All collectives of one kind along the same axes.

    Attributes:
      kind: `all-gather`, ...
      axes: of the mesh, `data+fsdp`.
      count: how many run in a step.
      bytes: per device and step.
      seconds: that the network needs for them.
      exposed: the part of `seconds` in which nothing is computed.
      overlapped: how many of `count` run while something is computed.
    """

    kind: str
    axes: str
    count: float = 0
    bytes: float = 0
    seconds: float = 0
    exposed: float = 0
    overlapped: float = 0


@dataclass(frozen=True)
class Segment:
    """A piece of the timeline of a step.

    Attributes:
      name: scope of a computation, or kind and axes of a collective.
      kind: `compute` or `collective`.
      start: seconds from the beginning of the step.
      seconds: length.
    """

    name: str
    kind: str
    start: float
    seconds: float


@dataclass
class Timing:
    """A predicted step.

    Attributes:
      seconds: of the whole step.
      compute: the part in which something is computed.
      kernels: the part of `compute` in Pallas kernels (their cost estimates at KERNEL_EFFICIENCY).
      collectives: by kind and axes, the longest first.
      scopes: seconds of computation by place in the code, the longest first.
      timeline: the segments of the step's outermost computation and, within loops, of one turn stretched to all.
      assumed_loops: loops whose number of turns depends on data; see `Module.executions`.
    """

    seconds: float = 0
    compute: float = 0
    kernels: float = 0
    collectives: list[Collective] = field(default_factory=list)
    scopes: dict[str, float] = field(default_factory=dict)
    timeline: list[Segment] = field(default_factory=list)
    assumed_loops: int = 0


def predict(module: Module, network: collectives.Network) -> Timing:
    """Plays the schedule: computations one after the other, collectives on the network beside them.

    A synchronous collective holds everything up. An asynchronous one runs from its start; its end waits for it. What is
    fused with a computation runs beside it.
    """
    player = _Player(module, network)
    seconds = player.play(module.entry, 1.0, None, 0.0, 1.0)
    ranked = sorted(player.collectives.values(), key=lambda c: -c.seconds)
    scopes = dict(sorted(player.scopes.items(), key=lambda item: -item[1]))
    timeline = _merged(player.timeline, seconds)
    return Timing(seconds, sum(scopes.values()), player.kernels, ranked, scopes, timeline, module.assumed_loops())


@dataclass
class _Moves:
    """What an instruction does with collectives: ends and starts asynchronous ones, by key, or runs whole ones."""

    ends: list[str] = field(default_factory=list)
    starts: dict[str, Instruction] = field(default_factory=dict)
    whole: list[Instruction] = field(default_factory=list)


class _Player:
    def __init__(self, module: Module, network: collectives.Network):
        self.module, self.network = module, network
        self.chip: Chip = network.topology.chip
        self.collectives: dict[tuple[str, str], Collective] = {}
        self.scopes: dict[str, float] = defaultdict(float)
        self.kernels = 0.0
        self.timeline: list[Segment] = []
        self._seconds: dict[str, float] = {}

    def play(self, name: str, times: float, outer: float | None, offset: float, stretch: float) -> float:
        """Seconds of one run of a computation; accounts for `times` runs.

        Args:
          name: of the computation.
          times: runs in a step.
          outer: turns of the loop around it.
          offset: when the (first) run begins.
          stretch: turns that the timeline shows as one.
        """
        now, network_free = 0.0, 0.0
        flying: dict[str, tuple[float, Collective, float]] = {}

        def wait(total: Collective, until: float) -> float:
            total.exposed += (until - now) * times
            label, length = f"{total.kind} {total.axes}", (until - now) * stretch
            self.timeline.append(Segment(label, "collective", offset + now * stretch, length))
            return until

        for instruction, moves in self._moves(self.module.computations[name]):
            for key in moves.ends:
                end, total, begin = flying.pop(key)
                total.overlapped += times if now > begin else 0
                now = wait(total, end) if end > now else now
            for key, collective in moves.starts.items():
                total, seconds = self._account(collective, times)
                network_free = max(network_free, now) + seconds
                flying[key] = (network_free, total, now)
            at = offset + now * stretch
            if instruction.opcode == "fusion":
                now += self._compute(instruction, moves.whole, times, at, stretch)
            elif moves.whole:
                total, seconds = self._account(instruction, times)
                now = network_free = wait(total, max(now, network_free) + seconds)
            elif instruction.opcode in ("while", "conditional", "call"):
                now += self._nested(instruction, times, outer, at, stretch)
            elif not moves.starts and not moves.ends:
                now += self._compute(instruction, [], times, at, stretch)
        return now

    def _moves(self, computation: dict[str, Instruction]) -> Iterator[tuple[Instruction, _Moves]]:
        """Each instruction, and its collectives.

        A collective is one instruction, or a pair of start and end, around a call where it runs on a SparseCore, or a
        chain of fusions of one channel, which carry it on beside what they compute.
        """
        inside = {name: self._collectives_inside(instruction) for name, instruction in computation.items()}
        chains: dict[str, list[str]] = defaultdict(list)
        for name, instruction in computation.items():
            for channel in {_channel(collective) for collective in inside[name] if instruction.opcode == "fusion"}:
                chains[channel].append(name)
        started: set[str] = set()
        for name, instruction in computation.items():
            moves = _Moves()
            if instruction.opcode.endswith("-done") and instruction.operands[0] in started:
                moves.ends.append(instruction.operands[0])
            for channel, collective in {_channel(collective): collective for collective in inside[name]}.items():
                if instruction.opcode.endswith("-start"):
                    moves.starts[name] = collective
                elif instruction.opcode != "fusion" or len(chains[channel]) == 1:
                    moves.whole.append(collective)
                elif name == chains[channel][0]:
                    moves.starts[channel] = collective
                elif name == chains[channel][-1]:
                    moves.ends.append(channel)
            started |= moves.starts.keys()
            yield instruction, moves

    def _collectives_inside(self, instruction: Instruction) -> list[Instruction]:
        """The collectives that an instruction is, fuses, or starts beside the computation."""
        if collectives.kind_of(instruction) is not None:
            return [instruction]
        if instruction.opcode not in ("fusion", "async-start"):
            return []
        return [inner for inner in self.module.inside(instruction) if collectives.kind_of(inner) is not None]

    def _nested(self, instruction: Instruction, times: float, outer: float | None, at: float, stretch: float) -> float:
        if instruction.opcode == "while":
            turns = self.module.turns(instruction, outer)
            body = instruction.called("body")[0]
            return turns * self.play(body, times * turns, turns, at, stretch * turns)
        return self.play(self.module.branch(instruction), times, outer, at, stretch)

    def _compute(
        self, instruction: Instruction, fused: list[Instruction], times: float, at: float, stretch: float
    ) -> float:
        seconds = self._seconds_of(instruction)
        hidden = 0.0
        for collective in fused:
            total, needed = self._account(collective, times)
            total.overlapped += times
            hidden += needed
            total.exposed += max(0.0, needed - seconds) * times
        if seconds:
            scope = self.module.scope(instruction)
            self.scopes[scope] += seconds * times
            self.timeline.append(Segment(scope, "compute", at, seconds * stretch))
        if instruction.opcode == "custom-call":
            self.kernels += seconds * times
        return max(seconds, hidden)

    def _account(self, instruction: Instruction, times: float) -> tuple[Collective, float]:
        kind = collectives.kind_of(instruction)
        group = collectives.first_group(instruction, len(self.network.coords))
        axes, size = self.network.axes_of(group), collectives.bytes_of(instruction)
        seconds = self.network.seconds(kind, size, group)
        total = self.collectives.setdefault((kind, axes), Collective(kind, axes))
        total.count += times
        total.bytes += size * times
        total.seconds += seconds * times
        return total, seconds

    def _seconds_of(self, instruction: Instruction) -> float:
        if instruction.cycles:
            return instruction.cycles / self.chip.clock
        if instruction.opcode in FREE:
            return 0.0
        if instruction.opcode == "custom-call":
            return self._kernel_seconds(instruction)
        # Without an estimate: read and written once at the memory's bandwidth.
        return 2 * instruction.bytes / self.chip.memory_bandwidth

    def _kernel_seconds(self, instruction: Instruction) -> float:
        """Of a Pallas kernel, by its own estimate of FLOPs and bytes."""
        numbers = {name: float(n) for name, n in re.findall(r'"(flops|bytes_accessed)":"?(\d+)', instruction.rest)}
        flops = numbers.get("flops", 0) / self.chip.peak_flops
        return max(flops, numbers.get("bytes_accessed", 0) / self.chip.memory_bandwidth) / KERNEL_EFFICIENCY


def _channel(collective: Instruction) -> str:
    return collective.attribute(r"channel_id=(\d+)") or collective.name


def _merged(segments: list[Segment], seconds: float, most: int = 400) -> list[Segment]:
    """Neighbours of one name joined and the shortest left out, so that a page can show the rest."""
    joined: list[Segment] = []
    for segment in sorted(segments, key=lambda s: s.start):
        last = joined[-1] if joined else None
        if (
            last
            and (last.name, last.kind) == (segment.name, segment.kind)
            and segment.start <= last.start + last.seconds * 1.001
        ):
            end = max(last.start + last.seconds, segment.start + segment.seconds)
            joined[-1] = Segment(last.name, last.kind, last.start, end - last.start)
        else:
            joined.append(segment)
    longest = sorted(joined, key=lambda s: -s.seconds)[:most]
    return sorted((s for s in longest if s.seconds > seconds / 5000), key=lambda s: s.start)
