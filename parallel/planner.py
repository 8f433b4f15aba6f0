"""The planner: where every tensor of a captured step should live, found by integer programming, with its bound.

`plan` is what users call; `ringhold plan` prints what it returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

import numpy as np

from parallel import liveness
from parallel.bound import Bound
from parallel.capturing import Step
from parallel.cost import Costs
from parallel.fitting import Fit, Fitting, NoPlan
from parallel.flows import trace
from parallel.folding import fold
from parallel.graph import Graph, Input
from parallel.layout import Broadcast, Mesh, Placement
from parallel.machine import CPU, Machine
from parallel.options import Options, check_pins, of_classes
from parallel.plans import Figures, Option, Placements, Plan, Sharding
from parallel.program import Program, changes, price
from parallel.solver import Unsolved

__all__ = ["NoPlan", "Search", "plan", "plans"]

_AT_ONCE = 40_000
"""Changes of placement up to which a program is solved with all options of both axes."""
_GAIN = 1e-6
"""Share of the time below which an improvement is none."""
_SWEEPS = 96
"""Of raising the bound for all options of both axes, at most."""
_PROVEN = 1e-4
"""Share of the time from the bound at which a plan of some options is good enough."""


def plan(
    step: Step | Graph,
    mesh: Mesh,
    memory: float | None = None,
    pins: Mapping[str, Placements] | None = None,
    machine: Machine = CPU,
    tied: bool = True,
    seconds: float = 20.0,
    redundancy: int = 0,
) -> Plan:
    """Find the plan with the least predicted time.

    Args:
        step: captured.
        mesh: of ranks, of one axis or two.
        memory: bytes that a rank may hold at any moment; None: as many as it takes.
        pins: by the user's names of inputs (parameters, state, batch), placements that they must have, one for each
            axis of the mesh.
        machine: what operations and messages take.
        tied: whether equal layers are planned alike.
        seconds: that branch and bound may take for a plan; it is not needed where the linear relaxation is integral.
        redundancy: 1: count the second copies that `parallel.training` then keeps of state which a rank holds alone.

    Raises:
        UsageError: a pin names nothing, or a placement that the tensor cannot have.
        NoPlan: nothing keeps within the memory, or with the pins.
        Unsolved: no plan was found in that time; if one was, it is returned, with what is proven of it.

    """
    return plans(step, mesh, 1, memory, pins, machine, tied, seconds, redundancy)[0]


def plans(
    step: Step | Graph,
    mesh: Mesh,
    count: int,
    memory: float | None = None,
    pins: Mapping[str, Placements] | None = None,
    machine: Machine = CPU,
    tied: bool = True,
    seconds: float = 20.0,
    redundancy: int = 0,
) -> list[Plan]:
    """The best plans, the fastest first; each next one places some parameter, state or batch tensor otherwise.

    Arguments and errors are those of `plan`; fewer are returned where there are no more.
    """
    graph = step.graph if isinstance(step, Step) else step
    pins = dict(pins or {})
    check_pins(graph, mesh, pins)
    search = Search(graph, Costs(mesh, machine, redundancy), pins, memory, tied, seconds)
    first, options = search.best()
    return [first, *search.others(options, count - 1)]


@dataclass
class Search:
    """Solves programs of one step: with all its options, or along one axis of the mesh at a time."""

    graph: Graph
    costs: Costs
    pins: Mapping[str, Placements]
    memory: float | None
    tied: bool
    seconds: float

    def __post_init__(self) -> None:
        self.classes = fold(self.graph, self.pins, self.tied)
        self.flows = trace(self.graph, self.classes)
        self.all = of_classes(self.classes, self.costs.mesh, self.pins)

    def best(self) -> tuple[Plan, Options]:
        """The best plan, and the options of the program in which it was found. NoPlan: there is none."""
        options = self.all
        some = len(self.costs.mesh.axes) > 1 and changes(self.flows, options) > _AT_ONCE
        if some:
            options = self._axis_by_axis()
        found = self._solve(self._program(options))
        if found is None:
            raise self._impossible()
        if some:
            return self._proven(found, options)
        return self._figured(found), options

    def others(self, options: Options, count: int) -> list[Plan]:
        """The next best plans, each of which places some input otherwise than all before."""
        program = self._program(options)
        found: list[Plan] = []
        solved = self._solve(program) if count else None
        while solved is not None and len(found) < count:
            numbers = []
            for kind, member in enumerate(self.classes.first):
                unit, _ = program.units.place[kind]
                if isinstance(member, Input) and len(program.units.joints[unit]) > 1:
                    numbers.append(program.first[unit] + program.units.joints[unit].index((solved.chosen[kind],)))
            if not numbers:
                break
            program.row(dict.fromkeys(numbers, 1.0), -np.inf, len(numbers) - 1.0)
            solved = self._solve(program)
            if solved is not None:
                found.append(self._figured(solved))
        return found

    def _axis_by_axis(self) -> Options:
        """The options that are worth looking at together.

        Plans are improved along one axis while the other stays as it is, in turns until nothing is gained, from three
        starts: both axes alike, and each axis alone. What any of these plans chose is worth looking at.
        """
        seen: dict[int, dict[Option, None]] = {kind: {} for kind in self.all}
        until = monotonic() + self.seconds
        for start in (_alike, partial(_idle, 0), partial(_idle, 1)):
            options = {kind: tuple(filter(start, every)) or every[:1] for kind, every in self.all.items()}
            best, axis, stuck = np.inf, 0, 0
            while stuck < 2:
                found = self._quick(self._program(options), self.seconds / 4)
                if found is None or monotonic() > until:
                    break
                time, chosen = found.objective, found.chosen
                stuck = 0 if time < best * (1 - _GAIN) else stuck + 1
                best, axis = min(best, time), 1 - axis
                for kind, option in chosen.items():
                    seen[kind][option] = None
                options = {
                    kind: tuple(option for option in every if _along(option, axis) == _along(chosen[kind], axis))
                    for kind, every in self.all.items()
                }
        return {kind: tuple(found) or self.all[kind] for kind, found in seen.items()}

    def _quick(self, program: Program, seconds: float) -> Fit | None:
        """The best plan of a program, if one is found in that time."""
        try:
            return Fitting(program, self.memory, seconds).best()
        except (Unsolved, NoPlan):
            return None

    def _proven(self, found: Fit, options: Options) -> tuple[Plan, Options]:
        """A plan of some options, or a better one of others that may be better, with a bound that holds for all."""
        best, bound = self._figured(found), self._bound(found)
        assert best.figures is not None
        for share in (1.0, 0.5, 0.25, 0.125):
            figures = best.figures
            if bound.value >= figures.time * (1 - _PROVEN):
                break
            near = self._near(bound, (figures.time - bound.value) * share, options)
            if changes(self.flows, near) > _AT_ONCE:
                continue
            other = self._quick(self._program(near), self.seconds)
            if other is not None and other.objective < found.objective * (1 - _GAIN):
                found, options = other, near
                best = self._figured(found)
            break
        assert best.figures is not None
        least = min(bound.value, best.figures.time)
        gap = 1 - least / best.figures.time
        return replace(best, figures=replace(best.figures, gap=gap, bound=least, relaxed=False, by_axis=True)), options

    def _bound(self, found: Fit) -> Bound:
        """A bound of all options, near the time of a plan if it can be; memory counts with what it is worth."""
        worth = {at: seconds for at, seconds in found.worth.items() if seconds > 0}
        burdens = [
            (seconds, liveness.burden(self.flows, self.classes, self.costs, self.all, at))
            for at, seconds in worth.items()
        ]
        alone = {}
        for kind, every in self.all.items():
            alone[kind] = np.array([price(self.classes, self.costs, kind, option) for option in every])
            for seconds, burden in burdens:
                alone[kind] += seconds * burden[kind] / (self.memory or 1.0)
        bound = Bound(self.costs, self.flows, self.all, alone, sum(worth.values()))
        until, goal = monotonic() + self.seconds, found.objective * (1 - _PROVEN)
        for _ in range(_SWEEPS):
            if bound.value >= goal or monotonic() > until:
                break
            bound.rise()
        return bound

    def _near(self, bound: Bound, slack: float, options: Options) -> Options:
        """The options whose price is within so much of their class's least, and those that are known."""
        near = {}
        for kind, every in self.all.items():
            prices = bound.priced(kind)
            chosen = [every[number] for number in np.flatnonzero(prices <= prices.min() + slack)]
            near[kind] = tuple(dict.fromkeys((*options[kind], *chosen)))
        return near

    def _program(self, options: Options) -> Program:
        return Program(self.graph, self.costs, self.classes, self.flows, options)

    def _solve(self, program: Program) -> Fit | None:
        """The best plan of a program that keeps within the memory; None: there is none."""
        return Fitting(program, self.memory, self.seconds).best()

    def _figured(self, found: Fit) -> Plan:
        plan_, costs = found.plan, self.costs
        compute, talk, copying = costs.parts(plan_)
        gap = max(0.0, found.objective - found.bound) / found.objective if found.objective else 0.0
        figures = Figures(
            compute=compute,
            communication=talk,
            copying=copying,
            memory=found.held.peak,
            at_peak=found.held.at_peak,
            gap=gap,
            bound=min(found.bound, compute + talk + copying),
            relaxed=found.relaxed,
            tied=len(self.classes.first) < len(plan_.graph.nodes) + len(plan_.graph.inputs),
            machine=costs.machine.name,
        )
        return replace(plan_, figures=figures)

    def _impossible(self) -> NoPlan:
        mesh = self.costs.mesh
        if self.memory is None:
            return NoPlan(
                f"no plan on mesh {mesh} keeps all pins: what they ask for contradicts itself; take some back"
            )
        return NoPlan(
            f"no plan on mesh {mesh} keeps within {self.memory:.0f} bytes a rank: parameters, optimizer state and "
            f"batch alone need {self._least()}, split as far as they can be; allow more memory or take a larger mesh"
        )

    def _least(self) -> int:
        """Bytes that the inputs need at least."""
        total = 0
        for kind, member in enumerate(self.classes.first):
            if isinstance(member, Input):
                sizes = (
                    self.costs.local_bytes(member.value, placed) + self.costs.copy_bytes(member, placed)
                    for placed in self.all[kind]
                    if not isinstance(placed, Sharding)
                )
                total += self.classes.count[kind] * min(sizes)
        return total


def _along(option: Option, axis: int) -> tuple[Placement, ...]:
    """What an option is along one axis."""
    if isinstance(option, Sharding):
        return tuple(placed[axis] for placed in (*option.inputs, *option.outputs))
    return (option[axis],)


def _alike(option: Option) -> bool:
    return _along(option, 0) == _along(option, 1)


def _idle(axis: int, option: Option) -> bool:
    return all(isinstance(placement, Broadcast) for placement in _along(option, axis))
