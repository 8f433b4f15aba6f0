"""What each rank does in the tests of planned steps, as a thread or as a process."""

import random
import warnings
from typing import Any

import torch

from collectives.communicator import Communicator
from parallel.executing import Results, execute
from parallel.graph import Role
from parallel.layout import Layout
from parallel.plans import Plan
from parallel.resharding import reshard
from tests.parallel.layouts import mesh_of
from tests.parallel.random_plans import draw_plan, gpt


def drawn(grid: list[int], seed: int, dtype: str = "float64") -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without signatures
        return draw_plan(gpt(getattr(torch, dtype))[0].graph, mesh_of(*grid), random.Random(seed))


def errors(comm: Communicator, plan: Plan, found: Results, dtype: str = "float64") -> tuple[float, str]:
    """The largest error of what a step gave, against one process, and of what."""
    step, inputs = gpt(getattr(torch, dtype))
    expected, wrong = step.graph.run(inputs), (0.0, "")
    for out, placed in zip(plan.graph.outputs, plan.ends, strict=True):
        everywhere = reshard(Layout(plan.mesh, placed), Layout.replicated(plan.mesh), out.value.shape, comm.size)
        whole, right = everywhere.run(comm, found[out.role, out.name]), expected[out.role, out.name]
        assert torch.isfinite(whole).all(), f"{out.role} {out.name}"
        wrong = max(wrong, (float((whole.double() - right.double()).abs().max()), f"{out.role} {out.name}"))
    return wrong


def step_of_processes(comm: Communicator, grid: list[int], seed: int) -> dict[str, Any]:
    """Run a plan; the bytes that this rank sent for the step alone, and its loss beside that of one process."""
    step, inputs = gpt(torch.float64)
    plan, before = drawn(grid, seed), comm.meter.total
    found = execute(plan, comm, inputs)
    sent = comm.meter.total - before
    error, of = errors(comm, plan, found)
    return {
        "sent": sent,
        "planned": sum(reshard.nbytes for reshard in plan.reshards),
        "error": error,
        "of": of,
        "loss": found[Role.LOSS, "loss"].item(),
        "right": step.graph.run(inputs)[Role.LOSS, "loss"].item(),
    }
