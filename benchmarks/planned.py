"""A planned step beside the same step in c10d calls by hand and in eager DTensor, in turns, in the same processes.

    python -m benchmarks.planned --peers 2 --batch 1024 --hidden 512

Two layers without biases, a ReLU between, mean squared error, SGD; placed as data parallelism and as Megatron's
column-row tensor parallelism. The plan runs over a communicator's shared memory and over sockets, the others over
torch's gloo. All forms end each step with the same loss, which is checked; the plan's bytes are counted as well.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import functional as F

from benchmarks.figures import table
from collectives.communicator import Communicator
from launch.crew import Crew, Desk
from parallel.capturing import Step, capture
from parallel.executing import Executor, shard_of, shards_of
from parallel.export import device_mesh, dtensor_placements
from parallel.graph import Role
from parallel.layout import Broadcast, Layout, Mesh, Split
from parallel.models.examples import MLP
from parallel.planner import plan
from parallel.plans import Placements, Plan

RATE = 1e-3
FORMS = ("planned", "c10d", "DTensor")
_ROWS, _COLUMNS, _ALL = (Split(0),), (Split(1),), (Broadcast(),)
PLACED: dict[str, dict[str, Placements]] = {
    "data": {"batch.0": _ROWS, "batch.1": _ROWS, "up.weight": _ALL, "down.weight": _ALL},
    "tensor": {"batch.0": _ALL, "batch.1": _ALL, "up.weight": _ROWS, "down.weight": _COLUMNS},
}
"""What is pinned, by the kind of parallelism."""
_PATIENCE = 120.0

Run = Callable[[], float]
"""Takes a step and returns its loss."""


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error."""
    x, target = batch
    return F.mse_loss(model(x), target)


class Case:
    """The step, its plan and its tensors, made before the peers are forked."""

    def __init__(self, kind: str, peers: int, batch: int, hidden: int) -> None:
        torch.manual_seed(0)
        self.kind, self.mesh = kind, Mesh((("x", peers),))
        self.model = MLP(hidden)
        self.batch = (torch.randn(batch, hidden), torch.randn(batch, hidden))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.step: Step = capture(loss_of, self.model, optimizer, self.batch)
        self.inputs = {name: t.detach() for name, t in self.step.inputs(self.model, optimizer, self.batch).items()}
        self.plan: Plan = plan(self.step, self.mesh, pins=PLACED[kind])

    def layout(self, name: str) -> Layout:
        """Where a tensor is pinned."""
        return Layout(self.mesh, PLACED[self.kind][name])

    def shard(self, name: str, rank: int) -> Tensor:
        """A rank's own part of it."""
        return shard_of(self.inputs[name], self.layout(name), rank).clone()


def planned(case: Case, comm: Communicator) -> Run:
    """By the executor."""
    executor = Executor(case.plan, comm)
    state = {name: shard.clone() for name, shard in shards_of(case.plan, case.inputs, comm.rank).items()}

    def run() -> float:
        results = executor.run(state)
        state.update({name: tensor for (role, name), tensor in results.items() if role == Role.PARAMETER})
        return results[Role.LOSS, "loss"].item()

    return run


def by_hand(case: Case, rank: int) -> Run:
    """By autograd and `all_reduce` of torch.distributed."""
    weights = [case.shard(name, rank).requires_grad_() for name in ("up.weight", "down.weight")]
    x, target = (case.shard(name, rank) for name in ("batch.0", "batch.1"))
    elements = case.inputs["batch.1"].numel()

    def run() -> float:
        out = F.linear(F.relu(F.linear(x, weights[0])), weights[1])
        if case.kind == "tensor":
            whole = out.detach().clone()
            dist.all_reduce(whole)
            difference = whole - target
            gradients = torch.autograd.grad(out, weights, 2 / elements * difference)
            loss = difference.square().sum() / elements
        else:
            loss = (out - target).square().sum() / elements
            gradients = torch.autograd.grad(loss, weights)
            for gradient in gradients:
                dist.all_reduce(gradient)
            loss = loss.detach()
            dist.all_reduce(loss)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=RATE)
        return loss.item()

    return run


def eager(case: Case) -> Run:
    """By DTensor, with the placements that the plan exports."""
    mesh = device_mesh(case.mesh)

    def placed(name: str) -> DTensor:
        tensor = case.inputs[name]
        return distribute_tensor(tensor, mesh, dtensor_placements(case.layout(name), tuple(tensor.shape)))

    weights = [nn.Parameter(placed(name)) for name in ("up.weight", "down.weight")]
    x, target = placed("batch.0"), placed("batch.1")
    elements = target.numel()

    def run() -> float:
        out = F.linear(F.relu(F.linear(x, weights[0])), weights[1])
        if case.kind == "tensor":
            out = out.redistribute(placements=[Replicate()])  # type: ignore[attr-defined]
        loss = (out - target).square().sum() / elements  # a mean's gradient would come out once for each rank
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient.redistribute(placements=weight.placements), alpha=RATE)  # type: ignore[attr-defined]
        return float(loss.full_tensor().item())  # type: ignore[attr-defined]

    return run


def member(desk: Desk, case: Case, transport: str, turns: int, store: str, clock: Callable[[], float]) -> None:
    """A peer's work: medians of the forms, the largest difference of their losses, and its bytes of a planned step."""
    torch.set_num_threads(1)
    with desk.join(transport=transport) as comm:
        files = dist.FileStore(store, comm.size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=files, rank=comm.rank, world_size=comm.size)
        forms = {"planned": planned(case, comm), "c10d": by_hand(case, comm.rank), "DTensor": eager(case)}
        samples: Mapping[str, list[float]] = {form: [] for form in FORMS}
        apart, sent = 0.0, 0
        for turn in range(turns + 2):
            losses = []
            for form, run in forms.items():
                comm.barrier()
                before, begun = comm.meter.total, clock()
                losses.append(run())
                if turn > 1:
                    samples[form].append(clock() - begun)
                sent = comm.meter.total - before if form == "planned" else sent
            apart = max(apart, max(losses) - min(losses))
        medians = [statistics.median(samples[form]) for form in FORMS]
        comm.barrier()
        dist.destroy_process_group()
        desk.report("done", medians=medians, apart=apart, sent=sent)


def measure(
    case: Case, peers: int, transport: str, turns: int, clock: Callable[[], float]
) -> tuple[list[float], float, int]:
    """Medians of the slowest peer by form, the difference of losses, the bytes of all peers."""
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Crew({"founders": peers, "heartbeat_timeout": 10.0}) as crew:
        store = str(Path(folder) / "store")
        for _ in range(peers):
            crew.start_peer(lambda desk: member(desk, case, transport, turns, store, clock))
        end = time.monotonic() + _PATIENCE
        while len(done) < peers:
            if time.monotonic() > end:
                raise TimeoutError(f"no result over {transport} in {_PATIENCE:g} s\n{crew.status()}")
            for _, message in crew.receive(1.0):
                if message["type"] == "failed":
                    raise RuntimeError(f"{message['error']}: {message['message']}")
                if message["type"] == "done":
                    done.append(message)
    medians = [max(times) for times in zip(*(message["medians"] for message in done), strict=True)]
    return medians, max(message["apart"] for message in done), sum(message["sent"] for message in done)


def main() -> int:
    """Print the table; 1 if losses or bytes are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--transport", nargs="+", default=["shm", "sockets"])
    parser.add_argument("--cpu", action="store_true", help="count processor time, as a busy machine needs it")
    given = parser.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    rows, wrong = [], False
    for kind in PLACED:
        case = Case(kind, given.peers, given.batch, given.hidden)
        planned_bytes = sum(reshard.nbytes for reshard in case.plan.reshards)
        for transport in given.transport:
            (ours, c10d, dtensor), apart, sent = measure(case, given.peers, transport, given.turns, clock)
            wrong |= apart > 1e-5 or sent != planned_bytes
            times = (f"{1e3 * seconds:.2f}" for seconds in (ours, c10d, dtensor))
            rows.append([kind, transport, *times, f"{ours / c10d:.2f}", f"{ours / dtensor:.2f}", sent, f"{apart:.0e}"])
    print(
        f"{given.peers} ranks, batch {given.batch}, hidden {given.hidden}; medians of {given.turns} steps, ms"
        f"{' of processor time' if given.cpu else ''}:"
    )
    print(table(["parallel", "over", *FORMS, "/ c10d", "/ DTensor", "bytes", "losses apart"], rows))
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
