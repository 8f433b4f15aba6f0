"""Planned steps: the numbers of one process, and the bytes of the plan."""

import pytest
import torch

from collectives.communicator import Communicator
from collectives.errors import LayoutMismatch, UsageError
from parallel.executing import Executor, execute
from parallel.plans import Plan
from tests.harness.residents import Residents
from tests.parallel import execute_programs as programs
from tests.parallel.pretend import together
from tests.parallel.random_plans import gpt

CASES = [([2], 0), ([3], 1), ([4], 2), ([2, 2], 4), ([3, 2], 5)]


def largest_error(plan: Plan, dtype: str = "float64") -> float:
    """Of all outputs on all ranks; the bytes that moved are those of the plan."""
    inputs = gpt(getattr(torch, dtype))[1]
    results, moved = together(plan.mesh.size, lambda comm: execute(plan, comm, inputs))
    assert moved == sum(reshard.nbytes for reshard in plan.reshards) > 0
    found, _ = together(plan.mesh.size, lambda comm: programs.errors(comm, plan, results[comm.rank], dtype))
    return max(found)[0]


@pytest.mark.parametrize(("grid", "seed"), CASES)
def test_any_plan_gives_the_numbers_of_one_process_for_the_bytes_planned(grid: list[int], seed: int) -> None:
    plan = programs.drawn(grid, seed)
    assert largest_error(plan) <= 1e-10
    kinds = {reshard.boxing.kind for reshard in plan.reshards}
    assert {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "local"} <= kinds


def test_fp32_differs_by_rounding_only() -> None:
    assert 0 < largest_error(programs.drawn([4], 8, "float32"), "float32") <= 2e-4


@pytest.mark.timeout(240)
def test_processes_send_what_was_planned() -> None:
    with Residents(2, transport="sockets") as group:
        group.start(programs.step_of_processes, grid=[2], seed=2)
        found = group.collect(timeout=180.0)  # each captures the step, for which torch imports its compiler
    assert sum(member["sent"] for member in found) == found[0]["planned"] > 0
    for member in found:
        assert member["error"] <= 1e-10, member["of"]
        assert abs(member["loss"] - member["right"]) <= 1e-10


def test_what_does_not_fit_the_plan_is_refused() -> None:
    _, inputs = gpt(torch.float64)
    with Communicator.solo() as comm:
        with pytest.raises(UsageError, match=r"mesh axis0=2 of ranks .*plan for a mesh of all of them"):
            Executor(programs.drawn([2], 1), comm)
        executor = Executor(programs.drawn([1], 1), comm)
        with pytest.raises(UsageError, match=r"the step needs the parameter 'norm\.weight'"):
            executor.run({name: tensor for name, tensor in inputs.items() if name != "norm.weight"})
        with pytest.raises(LayoutMismatch, match=r"rank 0 needs a shard of norm\.weight of shape \[32\]"):
            executor.run({**inputs, "norm.weight": torch.zeros(3)})
