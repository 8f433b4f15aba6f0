"""What each rank does in the tests of planned steps, as a thread or as a process."""

import random
import warnings
from typing import Any

import torch

from collectives.communicator import Communicator
from parallel.execute import Executor, shards_of
from parallel.graph import Role
from parallel.layout import Layout
from parallel.plan import Plan
from parallel.reshard import reshard
from tests.parallel.layouts import mesh_of
from tests.parallel.random_plans import draw_plan, gpt


def drawn(grid: list[int], seed: int, dtype: str = "float64") -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without signatures
        return draw_plan(gpt(getattr(torch, dtype))[0].graph, mesh_of(*grid), random.Random(seed))


def errors(comm: Communicator, plan: Plan, dtype: str = "float64") -> tuple[float, str]:
    """Run a step of the training job's model; the largest error against one process, and of what."""
    step, inputs = gpt(getattr(torch, dtype))
    expected = step.graph.run(inputs)
    found = Executor(plan, comm).run(shards_of(plan, inputs, comm.rank))
    wrong = (0.0, "")
    for out, placed in zip(plan.graph.outputs, plan.ends, strict=True):
        everywhere = reshard(Layout(plan.mesh, placed), Layout.replicated(plan.mesh), out.value.shape, comm.size)
        whole, right = everywhere.run(comm, found[out.role, out.name]), expected[out.role, out.name]
        assert torch.isfinite(whole).all(), f"{out.role} {out.name}"
        wrong = max(wrong, (float((whole.double() - right.double()).abs().max()), f"{out.role} {out.name}"))
    return wrong


def step_of_processes(comm: Communicator, grid: list[int], seed: int) -> dict[str, Any]:
    """Run a plan; the bytes that this rank sent for the step alone, and its loss beside that of one process."""
    step, inputs = gpt(torch.float64)
    plan = drawn(grid, seed)
    executor, shards, before = Executor(plan, comm), shards_of(plan, inputs, comm.rank), comm.meter.total
    found = executor.run(shards)
    sent = comm.meter.total - before
    error, of = errors(comm, plan)
    return {
        "sent": sent,
        "planned": sum(reshard.nbytes for reshard in plan.reshards),
        "error": error,
        "of": of,
        "loss": found[Role.LOSS, "loss"].item(),
        "right": step.graph.run(inputs)[Role.LOSS, "loss"].item(),
    }
