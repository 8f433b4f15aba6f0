"""What the members do in the test of training by plan."""

import random
import warnings
from dataclasses import replace
from typing import Any

import torch

from parallel.clipping import clipped
from parallel.graph import KEPT, Graph, Role
from parallel.plans import Plan
from parallel.training import Training
from tests.harness.peer import Peer
from tests.parallel.layouts import mesh_of
from tests.parallel.random_plans import draw_plan, gpt

STEPS = 5
CLIP = 0.5


def batches(step: int) -> dict[str, torch.Tensor]:
    """Four samples of a step's own, and its learning rate."""
    text = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(step))
    rate = torch.tensor(0.01 / (1 + step), dtype=torch.float64)
    return {"batch.0": text[:, :-1], "batch.1": text[:, 1:], "lr.0": rate}


def graph() -> Graph:
    return clipped(gpt(torch.float64)[0].graph, CLIP)


def undisturbed() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of one process, and the state that it ends with."""
    captured, inputs = graph(), gpt(torch.float64)[1]
    state, losses = dict(inputs), []
    for step in range(STEPS):
        results = captured.run({**state, **batches(step)})
        losses.append(results[Role.LOSS, "loss"].item())
        state.update({name: tensor for (role, name), tensor in results.items() if role in KEPT})
    return losses, state


def planner(ranks: int) -> Plan:
    """Any plan; most parameters and states are split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without signatures
        return replace(draw_plan(graph(), mesh_of(ranks), random.Random(ranks)), redundancy=1)


def train(peer: Peer) -> dict[str, Any]:
    losses, expected = undisturbed()  # before joining: it takes its time
    planner(3), planner(2)
    with peer.join() as comm:
        training = Training(comm, planner, gpt(torch.float64)[1], redundancy=1)
        errors, copied = list[float](), len(training.plan.replicas)
        for step in range(STEPS):
            if step == 2:
                peer.say("halfway", rank=comm.rank)
                peer.hear("go", timeout=180.0)
            before = comm.meter.total
            results = training.step(batches(step))
            if step == 1:
                sent, plan = comm.meter.total - before, training.plan
                planned = sum(reshard.nbytes for reshard in plan.reshards), sum(copy.nbytes for copy in plan.replicas)
                peer.say("sent", sent=sent, planned=planned)
            errors.append(abs(results[Role.LOSS, "loss"].item() - losses[step]))
        found = training.whole()
        worst = max(float((found[name] - expected[name]).abs().max()) for name in found)
        return {"errors": max(errors), "state": worst, "size": comm.size, "tensors": len(found), "copied": copied}
