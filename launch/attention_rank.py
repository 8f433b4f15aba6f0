"""One rank of `ringhold attention`: checks each scheme against one process, times it, and tells the numbers.

`measure` is what a process does, whoever started it (`attention_child`, or a launcher); rank 0 alone tells.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from collectives.communicator import Communicator
from collectives.gather_bytes import gather_bytes
from collectives.options import Options
from collectives.simulate import simulate
from collectives.topology import Link, Topology, mesh
from collectives.topology_file import load
from collectives.transports.emulated import PREFIX
from launch.attention_check import Check
from launch.attention_request import RUN, AttentionRequest
from launch.bench_rank import Place
from launch.data import load as load_text
from launch.model import Block, Shape, build
from parallel.attention.api import attention_forward
from parallel.attention.choice import choose, seconds_of
from parallel.attention.formulas import total_bytes
from parallel.attention.kernels import Binder
from parallel.attention.layout import Layout, Problem, layout
from parallel.attention.local import partial_dtype
from parallel.attention.shares import Balance, Run, Share

Tell = Callable[[dict[str, Any]], None]
DTYPES = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}
_PATIENCE = 10.0
_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Errors that pass even where one process happens to make none."""


def measure(request: AttentionRequest, place: Place, tell: Tell) -> int:
    """Do all that is asked; return how many schemes were wrong, on all ranks alike."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ringhold-attention-") as folder:
        options = _options(request, place, Path(folder))
        with Communicator.join(place.coordinators[RUN], RUN, place.token, request.transport, options) as comm:
            return _Rank(request, comm, tell, options.topology).run()


def _options(request: AttentionRequest, place: Place, folder: Path) -> Options:
    options = Options.resolve({"trace": request.trace_to} if request.trace_to else None)
    if "RINGHOLD_HEARTBEAT_TIMEOUT" not in os.environ:
        options = replace(options, heartbeat_timeout=_PATIENCE)
    if not request.transport.startswith(PREFIX):
        return options
    path = request.topology
    if not path:
        link = {"latency": request.latency, "bandwidth": request.bandwidth}
        path = str(folder / "mesh.json")
        Path(path).write_text(json.dumps({"kind": "mesh", "ranks": place.ranks, "link": link}))
    return replace(options, topology=path)


@dataclass(slots=True)
class _Case:
    """A pass of a scheme: its problem, its error and that allowed; how long kernels take, runs took, and bytes sent."""

    asked: str
    problem: Problem
    backward: bool
    error: float
    allowed: float
    took: dict[str, float]
    times: list[float] = field(default_factory=list)
    sent: int = 0


class _Rank:
    """What a rank knows."""

    def __init__(self, request: AttentionRequest, comm: Communicator, tell: Tell, topology: str) -> None:
        self._request, self._comm, self._tell = request, comm, tell
        self._balance = Balance(request.balance)
        self._dtype = DTYPES[request.dtype]
        link = Link(request.latency, request.bandwidth)
        self._network: Topology = load(Path(topology)) if topology else mesh(comm.size, link)
        self._text = _embedded(request, self._dtype)

    def run(self) -> int:
        """Check all schemes, then time them in turns; how many were wrong."""
        cases = [case for scheme in self._request.schemes for case in self._cases(scheme)]
        for number in range(self._request.rounds):
            self._progress(f"timing {self._request.seq} rows, round {number + 1}")
            for case in cases:
                self._time(case)
        rows = [self._row(case) for case in cases]
        if self._comm.rank == 0:
            for row in rows:
                self._tell({"type": "row", "row": row})
        return sum(not row["correct"] for row in rows)

    def _cases(self, scheme: str) -> list["_Case"]:
        """Check a scheme against one process; a case for each pass."""
        request = self._request
        problem = self._problem(scheme, request.seq)
        if scheme == "auto":
            problem = choose(problem, self._network)
        self._progress(f"{problem.scheme}: checking {request.checked} rows")
        short = self._problem(problem.scheme, request.checked, problem.columns)
        found = Check(short, request.checked, self._balance, self._comm, self._text).run(request.backward)
        cases = []
        for backward, errors in zip((False, True), found, strict=False):
            took = self._modelled(layout(problem, backward)) if request.modelled else {}
            allowed = max(2 * errors.single, _FLOOR[self._dtype])
            cases.append(_Case(scheme, problem, backward, errors.ours, allowed, took))
        return cases

    def _row(self, case: "_Case") -> dict[str, Any]:
        """What there is to tell of a pass."""
        formula = total_bytes(case.problem, self._balance.name, case.backward)
        return {
            **self._figures(case),
            "max_error": case.error,
            "allowed_error": case.allowed,
            "bytes_sent": case.sent,
            "bytes_formula": formula,
            "correct": case.error <= case.allowed and case.sent == formula,
        }

    def _problem(self, scheme: str, rows: int, columns: int | None = None) -> Problem:
        request, world = self._request, self._comm.size
        shares = self._balance.shares(rows, world)
        queries = shares
        if scheme == "tree":
            queries = tuple(Share((Run(0, 1, rows - 1, 1, 0),), (1,)) for _ in range(world))
        return Problem(
            request.batch,
            request.heads,
            request.kv_heads,
            request.head_dim,
            self._dtype,
            queries,
            shares,
            request.causal,
            request.head_dim**-0.5,
            "ring" if scheme == "auto" else scheme,
            columns or request.columns,
            request.parts,
        )

    def _mine(self, problem: Problem, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of q, k and v of the text."""
        world, rank = self._comm.size, self._comm.rank
        if problem.scheme == "tree":
            q = self._text(torch.tensor([rows - 1]))[0]
            return q, *(self._text(self._balance.indices(rows, world, rank))[1:])
        return self._text(self._balance.indices(rows, world, rank))

    def _time(self, case: "_Case") -> None:
        """Run a pass once, and note how long it took and how many bytes all ranks sent."""
        binder = Binder(layout(case.problem, case.backward), self._comm.rank)
        q, k, v = self._mine(case.problem, self._request.seq)
        source = binder.source(self._backward_of(case, q, k, v) if case.backward else (q,), (k, v))
        del q, k, v
        kernels = {name: self._kernel(name, kernel, case.took) for name, kernel in binder.kernels.items()}
        self._comm.barrier()
        before, begun = self._comm.meter.total, time.monotonic()
        self._comm.redistribute(binder.layout.schedule, source, kernels=kernels)
        sent = self._comm.meter.total - before
        case.times.append(self._span(begun, time.monotonic()))
        total = self._comm.all_reduce(torch.tensor([sent], dtype=torch.int64)).result
        assert total is not None
        case.sent = int(total)

    def _backward_of(self, case: "_Case", q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes with queries in the backward pass: a gradient, out and lse; any, where nothing is computed."""
        if self._request.modelled:
            return q, q, q, q.new_zeros(q.shape[:3], dtype=partial_dtype(q.dtype))
        out, lse = attention_forward(q, k, v, case.problem, self._comm)
        return q, torch.ones_like(q), out.to(q.dtype), lse

    def _span(self, begun: float, ended: float) -> float:
        """From when the last rank began until the last one ended, by the host's clock."""
        edges = self._comm.all_reduce(torch.tensor([begun, ended], dtype=torch.float64), "max").result
        assert edges is not None
        return float(edges[1] - edges[0])

    def _kernel(self, name: str, kernel: Callable[..., object], took: dict[str, float]) -> Callable[..., object]:
        if self._request.modelled:
            return lambda *_: time.sleep(took[name])

        def timed(*views: Tensor) -> None:
            begun = time.perf_counter()
            kernel(*views)
            took[name] = time.perf_counter() - begun

        return timed

    def _modelled(self, plan: Layout) -> dict[str, float]:
        """How long kernels are to sleep: so long that the busiest rank computes `ratio` times what it communicates."""
        known = seconds_of(plan)
        moving = self._simulated(plan, dict.fromkeys(known, 0.0))
        scale = self._request.ratio * moving / max(1e-9, _busiest(plan, known))
        return {name: seconds * scale for name, seconds in known.items()}

    def _everyones(self, took: Mapping[str, float]) -> dict[str, float]:
        parts = gather_bytes(self._comm, json.dumps(dict(took)).encode())
        return {name: seconds for part in parts.rows for name, seconds in json.loads(part).items()}

    def _simulated(self, plan: Layout, kernels: Mapping[str, float]) -> float:
        known = {name: kernels.get(name, 0.0) for name in plan.tasks}
        settings: dict[str, Any] = {"itemsize": 1, "kernel_seconds": known.__getitem__}
        return simulate(plan.schedule, self._network, **settings).time

    def _figures(self, case: "_Case") -> dict[str, Any]:
        """Times, and how well computation and communication overlap; as measured and as simulated."""
        plan, took = layout(case.problem, case.backward), min(case.times)
        kernels = self._everyones(case.took)
        emulated = self._request.transport.startswith(PREFIX)
        predicted = self._simulated(plan, kernels) if emulated else None
        moving = self._simulated(plan, {}) if emulated else None
        computing = _busiest(plan, kernels)
        return {
            "scheme": case.problem.scheme,
            "asked": case.asked,
            "pass": "backward" if case.backward else "forward",
            "columns": case.problem.columns,
            "ranks": self._comm.size,
            "seq": self._request.seq,
            "checked_seq": self._request.checked,
            "compute": "modelled" if self._request.modelled else "real",
            "time_s": took,
            "predicted_s": predicted,
            "compute_s": computing,
            "communicate_s": moving,
            "eta": None if moving is None else overlap(took, computing, moving),
            "predicted_eta": None if moving is None or predicted is None else overlap(predicted, computing, moving),
        }

    def _progress(self, text: str) -> None:
        if self._comm.rank == 0:
            self._tell({"type": "progress", "text": text})


def overlap(time: float, compute: float, communicate: float) -> float | None:
    """Efficiency: what of the possible overlap was had; 1: all, 0: none. None: there is nothing to overlap."""
    possible = min(compute, communicate)
    return (compute + communicate - time) / possible if possible > 0 else None


def _busiest(plan: Layout, kernels: Mapping[str, float]) -> float:
    """Seconds that the rank with most work computes."""
    work = [0.0] * plan.problem.world
    for index in range(len(plan.schedule)):
        computes = plan.schedule.step(index).computes
        for rank, kernel in zip(computes.rank.tolist(), computes.kernel.tolist(), strict=True):
            work[rank] += kernels.get(plan.schedule.kernels[kernel], 0.0)
    return max(work)


def _embedded(request: AttentionRequest, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The queries, keys and values that the main job's model makes of a text, for any of its rows."""
    shape = Shape(request.heads * request.head_dim, request.heads, 1)
    model = build(shape, request.seq, torch.float32, torch.Generator().manual_seed(0))
    text = load_text(request.data, 256, 1).train
    if len(text) < request.seq:
        text = text.repeat(-(-request.seq // len(text)))
    block = cast(Block, model.blocks[0])

    @torch.no_grad()
    def rows(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.stack([text.roll(-4096 * sample)[at] for sample in range(request.batch)]).long()
        x = F.embedding(ids, model.tokens) + model.positions[at]
        made = block.query_key_value(block.attention_norm(x))
        made = made.view(request.batch, len(at), 3, request.heads, request.head_dim).permute(2, 0, 3, 1, 4).to(dtype)
        return (
            made[0].contiguous(),
            made[1][:, : request.kv_heads].contiguous(),
            made[2][:, : request.kv_heads].contiguous(),
        )

    return rows
