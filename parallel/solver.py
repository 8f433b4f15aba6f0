"""Solves a `Program` by HiGHS through scipy: the linear relaxation first, branch and bound where it is not integral."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import vstack

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

    Attributes:
        relaxed: whether the linear relaxation was integral by itself.
        whole: whether the solution is integral.
        worth: of the linear relaxation: seconds that each row of `program.limits` costs, relaxed by all of it (its
            multiplier). Empty where branch and bound found the solution.

    """

    values: Vector
    objective: float
    bound: float
    relaxed: bool
    whole: bool
    worth: Vector


def relax(program: Program, toll: Vector | None = None) -> Solution | None:
    """Solve the linear relaxation; None if it has no solution.

    Args:
        program: to be minimized.
        toll: by variable: instead of keeping the rows of `program.limits`, pay so many seconds more. The objective of
            the solution is without; there is no bound then.

    Raises:
        Unsolved: the solver gave up.

    """
    scale = _SCALE / program.least
    objective, matrix = np.array(program.objective), program.matrix().tocsr()
    low, high = np.array(program.low), np.array(program.high)
    paid = objective
    if toll is not None:
        paid = objective + toll
        high[program.limits] = np.inf
    equal, above, below = low == high, np.isfinite(high) & (low != high), np.isfinite(low) & (low != high)
    found = linprog(
        paid * scale,
        A_ub=vstack([matrix[above], -matrix[below]]) if (above | below).any() else None,
        b_ub=np.concatenate([high[above], -low[below]]) if (above | below).any() else None,
        A_eq=matrix[equal],
        b_eq=low[equal],
        bounds=(0.0, None),
        method="highs",
    )
    if found.status == 2:
        return None
    if found.x is None or found.fun is None:
        raise Unsolved(f"the solver gave up: {found.message}")
    values = np.asarray(found.x)
    multipliers = np.zeros(len(low))
    if above.any():
        multipliers[above] = -np.asarray(found.ineqlin.marginals)[: above.sum()] / scale
    whole = np.array(program.binary)
    integral = bool(np.abs(values - values.round())[whole].max(initial=0.0) < _INTEGRAL)
    bound = float(found.fun) / scale if toll is None else 0.0
    proven = integral and toll is None
    return Solution(values, float(objective @ values), bound, proven, integral, multipliers[program.limits])


def branch(program: Program, seconds: float, at_most: float = np.inf, gap: float = 1e-5) -> Solution | None:
    """Solve a program by branch and bound; None if it has no solution.

    Args:
        program: to be minimized.
        seconds: that it may take.
        at_most: seconds of the objective beyond which a solution is of no use.
        gap: relative, between the best solution and the bound, at which it may stop.

    Raises:
        Unsolved: no solution was found in that time.

    """
    scale = _SCALE / program.least
    objective, binary = np.array(program.objective), np.array(program.binary)
    rows = [LinearConstraint(program.matrix(), np.array(program.low), np.array(program.high))]
    if np.isfinite(at_most):
        rows.append(LinearConstraint(objective[None] * scale, -np.inf, at_most * scale))
    found = milp(
        objective * scale,
        constraints=rows,
        bounds=Bounds(0.0, 1.0),
        integrality=binary.astype(np.int8),
        options={"time_limit": max(seconds, 0.0), "mip_rel_gap": gap},
    )
    if found.status == 2:
        return None
    if found.x is None:
        raise Unsolved(f"no plan was found within {seconds:.0f} s of solving; allow more time, or take a smaller mesh")
    return Solution(found.x, float(objective @ found.x), found.mip_dual_bound / scale, False, True, np.zeros(0))
