"""The best plan of one program that keeps within the memory, with a bound. Called by `parallel.planner`.

Memory is looked at in plans, and rows are added where one passes the limit (`parallel.liveness`). With such rows the
linear relaxation is seldom integral; but the program that pays for memory instead of keeping it is (Lagrange), and what
memory is worth follows from where its plans pass the limit. So a plan that fits is there early; branch and bound takes
what time is left.
"""

from dataclasses import dataclass, replace
from time import monotonic

import numpy as np

from collectives.errors import RingholdError, UsageError
from parallel import liveness
from parallel.graph import Graph, Role
from parallel.liveness import Profile
from parallel.plans import Option, Placements, Plan, Sharding
from parallel.program import Program, Vector
from parallel.solver import Solution, Unsolved, branch, relax

_ROUNDS = 40
"""Of adding memory rows where the last plans pass the limit."""
_PAYMENTS = 40
"""Programs that pay for memory, at most."""
_EAGER, _GROWTH = 0.05, 1.3
"""The first step of what memory is worth, as a share of the plan's time for a limit passed twofold, and its growth."""
_POLYAK = 0.7
_ENOUGH = 1e-4
"""Share of the time from the bound at which branch and bound is not begun."""


class NoPlan(RingholdError):
    """No plan meets what was asked for: a memory limit, or pins that contradict each other."""


@dataclass(frozen=True)
class Fit:
    """A plan without figures, and what is known of it.

    Attributes:
        chosen: the option of each class.
        held: bytes through the step.
        objective: seconds, with ties.
        bound: seconds that no plan of the program can be below.
        relaxed: whether the linear relaxation was integral by itself.
        worth: seconds that the memory limit costs while a node runs, by its number.

    """

    plan: Plan
    chosen: dict[int, Option]
    held: Profile
    objective: float
    bound: float
    relaxed: bool
    worth: dict[int, float]


class Fitting:
    """Solves one program, whose rows it adds to."""

    def __init__(self, program: Program, memory: float | None, seconds: float) -> None:
        self._program, self._memory = program, np.inf if memory is None else memory
        self._until = monotonic() + seconds
        self._seconds = seconds
        self._limited: list[int] = []
        self._worth: dict[int, float] = {}
        self._bound = 0.0
        self._kept: Fit | None = None
        self._last = Profile(np.zeros(1), {})
        self._tolled: list[dict[int, float]] = []

    def best(self) -> Fit | None:
        """The best plan; None if there is none.

        Raises:
            Unsolved: none was found in time.
            NoPlan: none was found in many rounds.

        """
        for _ in range(_ROUNDS):
            relaxed = self._relax()
            if relaxed is None:
                return self._end() if self._kept else None
            if not relaxed.relaxed:
                break
            over = self._tried(relaxed)
            if over is None or self._late():
                return self._end()
            self._limit(over)
        if self._limited and not self._done():
            self._pay()
            self._relax()
        while not self._done() and not self._late():
            try:
                at_most = np.inf if self._kept is None else self._kept.objective
                found = branch(self._program, self._until - monotonic(), at_most)
            except Unsolved:
                break
            if found is None:  # nothing is better than what is kept
                self._bound = at_most
                return self._end() if self._kept else None
            self._bound = max(self._bound, found.bound)
            over = self._tried(found)
            if over is None or not self._limit(over):
                break
        return self._end()

    def _relax(self) -> Solution | None:
        """The linear relaxation with all rows, for its bound and for what memory is worth."""
        relaxed = relax(self._program)
        if relaxed is not None:
            self._bound = max(self._bound, relaxed.bound)
            self._worth = dict(zip(self._limited, map(float, relaxed.worth), strict=True))
        return relaxed

    def _pay(self) -> None:
        """Look for plans by paying for memory instead of keeping it, more where it is passed and less where not.

        Subgradients: until a plan fits the steps grow; then they follow Polyak (1969).
        """
        worth, eager = np.array([self._worth[at] for at in self._limited]), _EAGER
        for _ in range(_PAYMENTS):
            found = relax(self._program, worth @ self._tolls())
            if found is None or self._late():
                return
            over = self._tried(found)
            if self._done():
                return
            if over is not None:
                self._limit(over)
                worth = np.concatenate([worth, np.zeros(len(self._limited) - len(worth))])
            passed = self._last.held[self._limited] / self._memory - 1.0
            if self._kept is None:
                step, eager = eager * found.objective, eager * _GROWTH
            else:
                step = _POLYAK * (self._kept.objective - self._bound) / max(float(passed @ passed), 1e-12)
            worth = np.maximum(worth + step * passed, 0.0)

    def _tolls(self) -> Vector:
        """What each variable adds to memory at each limited node, as a share of the limit."""
        for at in self._limited[len(self._tolled) :]:
            self._tolled.append(liveness.toll(self._program, at))
        found = np.zeros((len(self._tolled), len(self._program.objective)))
        for row, terms in enumerate(self._tolled):
            found[row, list(terms)] = np.array(list(terms.values())) / self._memory
        return found

    def _tried(self, solution: Solution) -> Profile | None:
        """Read a plan: keep it, if it fits and is the best; return what it holds if it does not fit."""
        plan = read(self._program, solution)
        held = self._last = liveness.profile(self._program, plan)
        if held.peak > self._memory:
            return held
        try:
            seconds = solution.objective if solution.whole else sum(self._program.costs.parts(plan))
        except UsageError:  # choices of a solution that is not integral may not go together
            return held
        if self._kept is None or seconds < self._kept.objective:
            chosen = self._program.chosen(solution.values)
            self._kept = Fit(plan, chosen, held, seconds, 0.0, solution.relaxed, {})
        return None

    def _limit(self, over: Profile) -> bool:
        """Add rows where a plan passes the limit; whether there were any to add."""
        new = [at for at in over.worst(self._memory) if at not in self._limited]
        for at in new:
            liveness.limit(self._program, at, self._memory)
        self._limited += new
        return bool(new)

    def _done(self) -> bool:
        kept = self._kept
        return kept is not None and kept.objective - self._bound <= _ENOUGH * kept.objective

    def _late(self) -> bool:
        return monotonic() > self._until

    def _end(self) -> Fit:
        if self._kept is not None:
            return replace(self._kept, bound=min(self._bound, self._kept.objective), worth=self._worth)
        if self._late():
            raise Unsolved(
                f"no plan {self._within()}was found in {self._seconds:.0f} s of solving; allow more time or more memory"
            )
        raise NoPlan(f"no plan {self._within()}was found in {_ROUNDS} rounds; allow more memory")

    def _within(self) -> str:
        return f"within {self._memory:.0f} bytes a rank " if np.isfinite(self._memory) else ""


def read(program: Program, solution: Solution) -> Plan:
    """The plan of an integral solution."""
    chosen = program.chosen(solution.values)
    classes = program.classes
    starts = {kind: option for kind, option in chosen.items() if not isinstance(option, Sharding)}
    nodes = {kind: option for kind, option in chosen.items() if isinstance(option, Sharding)}
    plan = Plan(
        program.costs.mesh,
        program.graph,
        tuple(starts[kind] for kind in classes.source),
        tuple(nodes[kind] for kind in classes.node),
        (),
        redundancy=program.costs.redundancy,
    )
    return replace(plan, ends=_ends(program, starts, plan))


def _ends(program: Program, starts: dict[int, Placements], plan: Plan) -> tuple[Placements, ...]:
    """Placements of the outputs: as their old values came, gradients as they were made, the loss everywhere."""
    graph: Graph = program.graph
    kinds = {(source.role, source.name): k for source, k in zip(graph.inputs, program.classes.source, strict=True)}
    ends = []
    for output in graph.outputs:
        if output.role == Role.GRADIENT:
            ends.append(plan.made[output.value.name])
        elif output.role == Role.LOSS:
            ends.append(program.costs.everywhere)
        else:
            ends.append(starts[kinds[output.role, output.name]])
    return tuple(ends)
