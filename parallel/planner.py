"""The planner: where every tensor of a captured step should live, found by integer programming, with its bound.

`plan` is what users call; `ringhold plan` prints what it returns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

import numpy as np

from collectives.errors import RingholdError
from parallel import liveness
from parallel.capturing import Step
from parallel.cost import Costs
from parallel.flows import trace
from parallel.folding import Classes, fold
from parallel.graph import Graph, Input, Role
from parallel.layout import Broadcast, Mesh, Placement
from parallel.liveness import Profile
from parallel.machine import CPU, Machine
from parallel.options import Options, check_pins, of_classes
from parallel.plans import Figures, Option, Placements, Plan, Sharding
from parallel.program import Program, changes, cheapest
from parallel.solver import Solution, Unsolved, solve

_ROUNDS = 40
"""Of adding memory rows where the last solution passes the limit."""
_AT_ONCE = 40_000
"""Changes of placement up to which a program is solved with all options of both axes."""
_GAIN = 1e-6
"""Share of the time below which an improvement is none."""


class NoPlan(RingholdError):
    """No plan meets what was asked for: a memory limit, or pins that contradict each other."""


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
        Unsolved: no plan was found in that time.

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
        options, least = self.all, None
        if len(self.costs.mesh.axes) > 1 and changes(self.flows, options) > _AT_ONCE:
            options, least = self._axis_by_axis()
        found = self._solve(self._program(options))
        if found is None:
            raise self._impossible()
        return (found[0] if least is None else _bounded(found[0], least)), options

    def others(self, options: Options, count: int) -> list[Plan]:
        """The next best plans, each of which places some input otherwise than all before."""
        program = self._program(options)
        found: list[Plan] = []
        solved = self._solve(program) if count else None
        while solved is not None and len(found) < count:
            chosen = solved[1]
            numbers = []
            for kind, member in enumerate(self.classes.first):
                unit, _ = program.units.place[kind]
                if isinstance(member, Input) and len(program.units.joints[unit]) > 1:
                    numbers.append(program.first[unit] + program.units.joints[unit].index((chosen[kind],)))
            if not numbers:
                break
            program.row(dict.fromkeys(numbers, 1.0), -np.inf, len(numbers) - 1.0)
            solved = self._solve(program)
            if solved is not None:
                found.append(solved[0])
        return found

    def _axis_by_axis(self) -> tuple[Options, float]:
        """The options that are worth looking at together, and a bound.

        Plans are improved along one axis while the other stays as it is, in turns until nothing is gained, from three
        starts: both axes alike, and each axis alone. What any of these plans chose is worth looking at. The bound is
        that of operations which need not communicate.
        """
        seen: dict[int, dict[Option, None]] = {kind: {} for kind in self.all}
        for start in (_alike, partial(_idle, 0), partial(_idle, 1)):
            options = {kind: tuple(filter(start, every)) or every[:1] for kind, every in self.all.items()}
            best, axis, stuck = np.inf, 0, 0
            while stuck < 2:
                found = self._quick(self._program(options))
                if found is None:
                    break
                time, chosen = found
                stuck = 0 if time < best * (1 - _GAIN) else stuck + 1
                best, axis = min(best, time), 1 - axis
                for kind, option in chosen.items():
                    seen[kind][option] = None
                options = {
                    kind: tuple(option for option in every if _along(option, axis) == _along(chosen[kind], axis))
                    for kind, every in self.all.items()
                }
        worth = {kind: tuple(found) or self.all[kind] for kind, found in seen.items()}
        return worth, cheapest(self.all, self.classes, self.costs)

    def _quick(self, program: Program) -> tuple[float, dict[int, Option]] | None:
        """Seconds and choices of the best plan of a program, written out only where memory counts."""
        if self.memory is None:
            solution = solve(program, self.seconds)
            return None if solution is None else (solution.objective, program.chosen(solution.values))
        found = self._solve(program)
        if found is None:
            return None
        assert found[0].figures is not None
        return found[0].figures.time, found[1]

    def _program(self, options: Options) -> Program:
        return Program(self.graph, self.costs, self.classes, self.flows, options)

    def _solve(self, program: Program) -> tuple[Plan, dict[int, Option]] | None:
        """The best plan of a program and its choices; rows are added until it keeps within the memory."""
        until = monotonic() + self.seconds
        for _ in range(_ROUNDS):
            solution = solve(program, max(1.0, until - monotonic()))
            if solution is None:
                return None
            found = _read(program, solution)
            held = liveness.profile(program, found)
            if self.memory is None or held.peak <= self.memory:
                return replace(found, figures=_figures(program, found, held, solution)), program.chosen(solution.values)
            if monotonic() > until:
                raise Unsolved(
                    f"no plan within {self.memory:.0f} bytes a rank was found in {self.seconds:.0f} s of solving; "
                    f"allow more memory"
                )
            for at in held.worst(self.memory):
                liveness.limit(program, at, self.memory)
        raise NoPlan(f"no plan within {self.memory:.0f} bytes a rank was found in {_ROUNDS} rounds; allow more memory")

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


def _bounded(found: Plan, least: float) -> Plan:
    """A plan that was found among some options only, with a bound that holds for all."""
    assert found.figures is not None
    figures = found.figures
    gap = max(0.0, 1 - least / figures.time)
    return replace(found, figures=replace(figures, gap=gap, bound=least, relaxed=False, by_axis=True))


def _read(program: Program, solution: Solution) -> Plan:
    chosen = program.chosen(solution.values)
    classes = program.classes
    starts = {kind: option for kind, option in chosen.items() if not isinstance(option, Sharding)}
    nodes = {kind: option for kind, option in chosen.items() if isinstance(option, Sharding)}
    plan_ = Plan(
        program.costs.mesh,
        program.graph,
        tuple(starts[kind] for kind in classes.source),
        tuple(nodes[kind] for kind in classes.node),
        (),
        redundancy=program.costs.redundancy,
    )
    return replace(plan_, ends=_ends(program.graph, classes, starts, plan_.made, program.costs.everywhere))


def _ends(
    graph: Graph, classes: Classes, starts: Mapping[int, Placements], made: Mapping[str, Placements], whole: Placements
) -> tuple[Placements, ...]:
    """Placements of the outputs: as their old values came, gradients as they were made, the loss everywhere."""
    kinds = {(source.role, source.name): kind for source, kind in zip(graph.inputs, classes.source, strict=True)}
    ends = []
    for output in graph.outputs:
        if output.role == Role.GRADIENT:
            ends.append(made[output.value.name])
        elif output.role == Role.LOSS:
            ends.append(whole)
        else:
            ends.append(starts[kinds[output.role, output.name]])
    return tuple(ends)


def _figures(program: Program, found: Plan, held: Profile, solution: Solution) -> Figures:
    costs = program.costs
    compute = sum(
        costs.operation(node, sharding) for node, sharding in zip(found.graph.nodes, found.nodes, strict=True)
    )
    talk = sum(costs.reshard(reshard.value, reshard.boxing) for reshard in found.reshards)
    copying = sum(costs.refresh(copy.source, copy.layout.placements) for copy in found.replicas if copy.changed)
    gap = max(0.0, solution.objective - solution.bound) / solution.objective if solution.objective else 0.0
    return Figures(
        compute=compute,
        communication=talk,
        copying=copying,
        memory=held.peak,
        at_peak=held.at_peak,
        gap=gap,
        bound=min(solution.bound, compute + talk + copying),
        relaxed=solution.relaxed,
        tied=len(program.classes.first) < len(found.graph.nodes) + len(found.graph.inputs),
        machine=costs.machine.name,
    )
