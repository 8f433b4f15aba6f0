"""How much memory a plan needs while the step runs, and the rows that keep a program within a limit.

A value is held from when it is made (or given) to its last use; parameters and optimizer state make room for their new
values at theirs. A resharded copy is held from the first operation that takes it to the last, a second copy for the
case that a rank is lost all the time. Memory is that of the rank that holds the most: shards of uneven splits count as
the largest.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from parallel.cost import Costs
from parallel.flows import Flow, Flows
from parallel.folding import Classes
from parallel.graph import Input, Role
from parallel.options import Options
from parallel.plans import Placements, Plan, Sharding
from parallel.program import Pair, Program, Vector

_COPIES = "second copies"
_GROUPS = {
    Role.PARAMETER: "parameters",
    Role.STATE: "optimizer",
    Role.BUFFER: "parameters",
    Role.GRADIENT: "gradients",
    Role.BATCH: "batch",
}


@dataclass(frozen=True)
class Profile:
    """Bytes held while each node runs, the last entry being the end of the step."""

    held: Vector
    at_peak: dict[str, int]
    """Bytes of parameters, optimizer state, gradients and all else at the peak."""

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return int(self.held.max())

    def worst(self, limit: float) -> list[int]:
        """Where the limit is passed by the most: in each of four parts of the step."""
        found = []
        for part in np.array_split(np.arange(len(self.held)), 4):
            if len(part) and self.held[part].max() > limit:
                found.append(int(part[self.held[part].argmax()]))
        return found


def profile(program: Program, plan: Plan) -> Profile:
    """Follow the memory of a plan through the step."""
    end = len(program.graph.nodes)
    change = np.zeros(end + 2)
    groups = _groups(program) | {_COPIES: _COPIES}
    spans: list[tuple[str, int, int, int]] = []
    for flow in program.flows.values:
        value = flow.value
        made = plan.made[value.name]
        spans.append((value.name, max(flow.born, 0), _last(flow, end), program.costs.local_bytes(value, made)))
        copies: dict[Placements, list[int]] = defaultdict(list)
        for use in flow.uses:
            placed = _taken(plan, flow, use.edge.slot, use.at)
            if placed != made:
                copies[placed].append(use.at)
        for placed, at in copies.items():
            spans.append((value.name, min(at), max(at), program.costs.local_bytes(value, placed)))
    for source, placed in zip(plan.graph.inputs, plan.starts, strict=True):
        spans.append((_COPIES, 0, end, program.costs.copy_bytes(source, placed)))
    for _, first, last, size in spans:
        change[first] += size
        change[last + 1] -= size
    held = np.cumsum(change)[: end + 1]
    peak = int(held.argmax())
    at_peak: dict[str, int] = defaultdict(int)
    for name, first, last, size in spans:
        if size and first <= peak <= last:
            at_peak[groups.get(name, "activations")] += size
    return Profile(held, dict(at_peak))


def limit(program: Program, at: int, nbytes: float) -> None:
    """Add rows that keep what is held while node `at` runs within so many bytes; the last is one of `limits`."""
    terms, scale = _terms(program, at), max(nbytes, 1.0)
    copies: dict[tuple[tuple[int, ...], tuple[int, ...], int], int] = defaultdict(int)
    for flow in program.flows.values:
        for pair, (before, now, after) in _copied(program, flow, at).items():
            size = program.costs.local_bytes(flow.value, pair[1])
            if now:
                copies[now, (), size] += 1
            elif before and after:
                copies[before, after, size] += 1
    for (before, after, size), count in copies.items():
        held = program.variable()
        terms[held] += size * count
        for one in before:
            if not after:
                program.row({held: 1.0, one: -1.0}, 0.0, np.inf)
            for other in after:
                program.row({held: 1.0, one: -1.0, other: -1.0}, -1.0, np.inf)
    row = program.row({number: size / scale for number, size in terms.items()}, -np.inf, 1.0)
    program.limits.append(row)


def toll(program: Program, at: int) -> dict[int, float]:
    """Bytes that each variable of a program adds to what is held while node `at` runs, about.

    A copy that is wanted before the node and after it is there if both are so; here each counts half. Choices and
    changes stand apart in it, so a program that pays for them is no harder than one without a limit.
    """
    terms = _terms(program, at)
    for flow in program.flows.values:
        for pair, (before, now, after) in _copied(program, flow, at).items():
            size = program.costs.local_bytes(flow.value, pair[1])
            for number in now:
                terms[number] += size / len(now)
            for number in (*before, *after) if before and after and not now else ():
                terms[number] += size / (len(before) + len(after))
    return terms


def _terms(program: Program, at: int) -> dict[int, float]:
    """Bytes that each choice adds to what is held while node `at` runs: of values where they are made."""
    terms: dict[int, float] = defaultdict(float)
    end = len(program.graph.nodes)
    for flow in program.flows.values:
        if max(flow.born, 0) <= at <= _last(flow, end):
            for placed, numbers in program.made(flow.maker, flow.output).items():
                size = program.costs.local_bytes(flow.value, placed)
                for number in numbers:
                    terms[number] += size
        source = program.classes.first[flow.maker]
        if isinstance(source, Input) and program.costs.redundancy:
            for placed, numbers in program.made(flow.maker, flow.output).items():
                for number in numbers:
                    terms[number] += program.costs.copy_bytes(source, placed)
    return terms


def burden(flows: Flows, classes: Classes, costs: Costs, options: Options, at: int) -> dict[int, Vector]:
    """Bytes that each option of a class adds to what is held while node `at` runs, but for resharded copies."""
    end = len(classes.node)
    found = {kind: np.zeros(len(every)) for kind, every in options.items()}
    for flow in flows.values:
        every, source = options[flow.maker], classes.first[flow.maker]
        if max(flow.born, 0) <= at <= _last(flow, end):
            made = [option.outputs[flow.output] if isinstance(option, Sharding) else option for option in every]
            found[flow.maker] += [costs.local_bytes(flow.value, placed) for placed in made]
        if isinstance(source, Input):
            found[flow.maker] += [costs.copy_bytes(source, o) for o in every if not isinstance(o, Sharding)]
    return found


def _copied(program: Program, flow: Flow, at: int) -> dict[Pair, tuple[tuple[int, ...], ...]]:
    """For each change of placement of a value: variables of its uses before, at and after a node."""
    found: dict[Pair, tuple[list[int], list[int], list[int]]] = {}
    if not flow.uses or not flow.uses[0].at <= at <= flow.uses[-1].at:
        return {}
    for use in flow.uses:
        when = (use.at >= at) + (use.at > at)
        for pair, number in program.pairs(use.edge).items():
            if pair[0] != pair[1]:
                found.setdefault(pair, ([], [], []))[when].append(number)
    return {pair: tuple(tuple(dict.fromkeys(numbers)) for numbers in when) for pair, when in found.items()}


def _taken(plan: Plan, flow: Flow, slot: int, at: int) -> Placements:
    if slot >= 0:
        return plan.nodes[at].inputs[slot]
    ends = zip(plan.graph.outputs, plan.ends, strict=True)
    return next(p for output, p in ends if output.value.name == flow.value.name and output.role != Role.GRADIENT)


def _last(flow: Flow, end: int) -> int:
    """The last node that needs the value where it was made."""
    return end if flow.kept else max([use.at for use in flow.uses] or [max(flow.born, 0)])


def _groups(program: Program) -> dict[str, str]:
    """What the values of inputs and outputs count as."""
    graph = program.graph
    given = [(source.value.name, source.role) for source in graph.inputs]
    given += [(output.value.name, output.role) for output in graph.outputs]
    return {name: _GROUPS[role] for name, role in given if role in _GROUPS}
