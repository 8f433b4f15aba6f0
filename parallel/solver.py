"""Solves a `Program` by HiGHS through scipy: the linear relaxation first, branch and bound where it is not integral."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from collectives.errors import RingholdError
from parallel.program import Program, Vector

_SCALE = 1e6
"""What all operations take at their fastest, to the solver, whose tolerances are absolute."""
_INTEGRAL = 1e-6


class Unsolved(RingholdError):
    """The solver ended without a plan, within its time."""


@dataclass(frozen=True, slots=True)
class Solution:
    """Values of all variables; seconds of the objective, and the least that it can be.

    `relaxed`: whether the linear relaxation was integral by itself.
    """

    values: Vector
    objective: float
    bound: float
    relaxed: bool


def solve(program: Program, seconds: float, gap: float = 1e-5) -> Solution | None:
    """Solve a program; None if it has no solution.

    Args:
        program: to be minimized.
        seconds: that branch and bound may take.
        gap: relative, between the best solution and the bound, at which it may stop.

    Raises:
        Unsolved: no solution was found in that time.

    """
    scale = _SCALE / program.least
    objective, binary = np.array(program.objective), np.array(program.binary)
    rows = LinearConstraint(program.matrix(), np.array(program.low), np.array(program.high))
    relaxed = milp(objective * scale, constraints=rows, bounds=Bounds(0.0, 1.0))
    if relaxed.status == 2:
        return None
    if relaxed.x is not None and np.abs(relaxed.x - relaxed.x.round())[binary].max(initial=0.0) < _INTEGRAL:
        return Solution(relaxed.x, float(objective @ relaxed.x), relaxed.fun / scale, True)
    found = milp(
        objective * scale,
        constraints=rows,
        bounds=Bounds(0.0, 1.0),
        integrality=binary.astype(np.int8),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    if found.status == 2:
        return None
    if found.x is None:
        raise Unsolved(f"no plan was found within {seconds:.0f} s of solving; allow more time, or take a smaller mesh")
    return Solution(found.x, float(objective @ found.x), found.mip_dual_bound / scale, False)
