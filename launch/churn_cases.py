"""The operations of a churn run, and what each of them must come to. Run by `launch.churn_peer`.

What a member contributes follows from (member, operation, index) alone, so every result can be computed from the
contributors that its outcome names, exactly: integers wrap, in any order. The values mix the index with the member in
a way that is not linear, so that a chunk which lands elsewhere, counts twice or is missing shows, whatever the others
add to it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from collectives import choice
from collectives.algorithms import ring
from collectives.communicator import Communicator
from collectives.outcome import Outcome

SMALLEST, LARGEST = 1 << 8, 4 << 20
"""Bytes of an operation."""
DTYPES = (torch.int64, torch.int32)
_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "prod": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_ramps: dict[torch.dtype, Tensor] = {}

Expected = list[Tensor] | None
"""What an operation's results must be; None: it has none here."""


@dataclass(frozen=True, slots=True)
class Case:
    """Operation `number` of a run; the same on every member."""

    number: int
    kind: str
    elements: int
    dtype: torch.dtype
    op: str
    algorithm: str
    on_loss: str
    beside: bool
    """Whether a small all-reduce runs in another lane meanwhile."""


@dataclass(slots=True)
class Trial:
    """A case on one member: its inputs, which an error must leave as they are, the call, and what must come of it."""

    inputs: list[Tensor]
    call: Callable[[], Outcome]
    expected: Callable[[Outcome], Expected]
    shared: bool = True
    """Whether every member has the same results."""
    pristine: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.pristine = [tensor.clone() for tensor in self.inputs]

    def spoilt(self) -> bool:
        """Whether an input is not what it was."""
        return not all(map(torch.equal, self.inputs, self.pristine))


def case_of(seed: int, number: int, kinds: Sequence[str], largest: int = LARGEST) -> Case:
    """Draw operation `number`; sizes are log-uniform up to `largest` bytes."""
    source = random.Random(f"churn case {seed} {number}")
    kind = source.choice(kinds)
    dtype = source.choice(DTYPES)
    size = SMALLEST * (largest / SMALLEST) ** source.random()
    algorithm = "auto"
    if kind in ("all_reduce", "broadcast", "all_gather") and source.random() < 0.3:
        algorithm = source.choice(choice.names(kind))
    return Case(
        number=number,
        kind=kind,
        elements=max(1, int(size) // dtype.itemsize),
        dtype=dtype,
        op=source.choice(tuple(_COMBINE)),
        algorithm=algorithm,
        on_loss="raise" if source.random() < 0.1 else "retry",
        beside=source.random() < 0.15,
    )


def contribution(member: int, number: int, count: int, dtype: torch.dtype) -> Tensor:
    """What `member` puts into operation `number`: `count` elements."""
    bits = dtype.itemsize * 8
    ramp = _ramps.get(dtype)
    if ramp is None or len(ramp) < count:
        wide = torch.arange(max(count, 1 << 16), dtype=torch.int64).mul_(_ODD)
        ramp = _ramps[dtype] = wide.to(dtype)
    start = random.Random(f"{member}/{number}").getrandbits(bits) - (1 << (bits - 1))
    mixed = ramp[:count] + start
    return mixed.bitwise_xor_(mixed >> (bits // 2 - 3))


class Workbench:
    """Makes the trial of a case for one member, as it sees the group."""

    def __init__(self, comm: Communicator, case: Case) -> None:
        self.comm, self.case = comm, case
        self.me, self.members = comm.member_id, comm.members
        self.root = min(self.members, key=lambda member: random.Random(f"{case.number} {member}").random())
        """Of all members' opinions of who is there, as many as possible name the same one."""
        self.how: dict[str, Any] = {"on_loss": case.on_loss, "algorithm": case.algorithm}

    def trial(self) -> Trial:
        """Make it."""
        return _TRIALS[self.case.kind](self)

    def of(self, member: int, count: int | None = None) -> Tensor:
        """The contribution of a member: as many elements as the case has, or `count`."""
        return contribution(member, self.case.number, self.case.elements if count is None else count, self.case.dtype)

    def share(self) -> int:
        """Elements of a part, where each member has one and all together have as many as the case."""
        return max(1, self.case.elements // len(self.members))

    def rows(self, member: int) -> int:
        """How many rows are a member's, where numbers are uneven."""
        return random.Random(f"rows {self.case.number} {member}").randrange(2 * self.share())

    def reduced(self, parts: Sequence[Tensor]) -> Tensor:
        """The reduction of these, by the case's op."""
        return reduce(_COMBINE[self.case.op], parts)


def side_trial(comm: Communicator, case: Case) -> Tensor:
    """The input of the all-reduce (sum) that runs beside a case."""
    return contribution(comm.member_id, -case.number, 257, torch.int64)


def side_expected(case: Case, contributors: Sequence[int]) -> Tensor:
    """What must come of it."""
    return torch.stack([contribution(member, -case.number, 257, torch.int64) for member in contributors]).sum(0)


def _all_reduce(w: Workbench) -> Trial:
    tensor = w.of(w.me)
    return Trial(
        [tensor],
        lambda: w.comm.all_reduce(tensor, w.case.op, **w.how),
        lambda outcome: [w.reduced([w.of(member) for member in outcome.contributors])],
    )


def _all_reduce_coalesced(w: Workbench) -> Trial:
    cuts = [w.case.elements // 3, w.case.elements // 7]
    sizes = [*cuts, w.case.elements - sum(cuts)]
    tensors = [part.clone() for part in torch.split(w.of(w.me), sizes)]
    return Trial(
        tensors,
        lambda: w.comm.all_reduce_coalesced(tensors, w.case.op, bucket_bytes=1 << 16, **w.how),
        lambda outcome: list(torch.split(w.reduced([w.of(member) for member in outcome.contributors]), sizes)),
    )


def _all_reduce_sparse(w: Workbench) -> Trial:
    count = min(w.case.elements, 4096)
    width = 4 * count

    def entries(member: int) -> tuple[Tensor, Tensor]:
        return torch.unique(w.of(member, count).to(torch.int64).remainder(width)), w.of(member, count)

    def mine() -> Outcome:
        indices, values = entries(w.me)
        outcome = w.comm.all_reduce_sparse((indices, values[: len(indices)]), **w.how)
        dense = torch.zeros(width, dtype=w.case.dtype).index_add_(0, *outcome.results)
        return Outcome(dense, outcome.contributors, outcome.epoch, outcome.attempts, outcome.from_staging)

    def expected(outcome: Outcome) -> Expected:
        dense = torch.zeros(width, dtype=w.case.dtype)
        for member in outcome.contributors:
            indices, values = entries(member)
            dense.index_add_(0, indices, values[: len(indices)])
        return [dense]

    return Trial([], mine, expected)


def _reduce(w: Workbench) -> Trial:
    tensor = w.of(w.me)
    return Trial(
        [tensor],
        lambda: w.comm.reduce(tensor, w.root, w.case.op, **w.how),
        lambda outcome: [w.reduced([w.of(m) for m in outcome.contributors])] if w.me == w.root else None,
        shared=False,
    )


def _broadcast(w: Workbench) -> Trial:
    tensor = w.of(w.me)
    return Trial([tensor], lambda: w.comm.broadcast(tensor, w.root, **w.how), lambda _: [w.of(w.root)])


def _barrier(w: Workbench) -> Trial:
    return Trial([], lambda: w.comm.barrier(on_loss=w.case.on_loss), lambda _: None)


def _all_gather(w: Workbench) -> Trial:
    count = max(1, w.case.elements // 4)
    tensor = w.of(w.me, count)
    return Trial(
        [tensor],
        lambda: w.comm.all_gather(tensor, **w.how),
        lambda outcome: [torch.stack([w.of(member, count) for member in outcome.contributors])],
    )


def _all_gather_coalesced(w: Workbench) -> Trial:
    count = max(1, w.case.elements // 4)
    tensors = [w.of(w.me, count), w.of(w.me, 3)]
    return Trial(
        tensors,
        lambda: w.comm.all_gather_coalesced(tensors, **w.how),
        lambda outcome: [torch.stack([w.of(m, size) for m in outcome.contributors]) for size in (count, 3)],
    )


def _all_gather_v(w: Workbench) -> Trial:
    tensor = w.of(w.me, w.rows(w.me))
    return Trial(
        [tensor],
        lambda: w.comm.all_gather_v(tensor, **w.how),
        lambda outcome: [torch.cat([w.of(member, w.rows(member)) for member in outcome.contributors])],
    )


def _gather(w: Workbench) -> Trial:
    count = max(1, w.case.elements // 4)
    tensor = w.of(w.me, count)
    return Trial(
        [tensor],
        lambda: w.comm.gather(tensor, w.root, **w.how),
        lambda outcome: [torch.stack([w.of(m, count) for m in outcome.contributors])] if w.me == w.root else None,
        shared=False,
    )


def _scatter(w: Workbench) -> Trial:
    share, rank = w.share(), w.members.index(w.me)
    rows = w.of(w.root, share * len(w.members)).view(len(w.members), share)
    tensor = w.of(w.me, share)
    given = rows.clone() if w.me == w.root else None
    return Trial(
        [tensor],
        lambda: w.comm.scatter(tensor, w.root, given, **w.how),
        lambda _: [rows[rank]],
        shared=False,
    )


def _reduce_scatter(w: Workbench) -> Trial:
    share, rank = w.share(), w.members.index(w.me)
    whole = share * len(w.members)
    tensor = w.of(w.me, whole)

    def expected(outcome: Outcome) -> Expected:
        return [w.reduced([w.of(m, whole)[rank * share : (rank + 1) * share] for m in outcome.contributors])]

    return Trial([tensor], lambda: w.comm.reduce_scatter(tensor, w.case.op, **w.how), expected, shared=False)


def _reduce_scatter_coalesced(w: Workbench) -> Trial:
    share, rank = w.share(), w.members.index(w.me)
    sizes = [share, 2]
    tensors = [w.of(w.me, size * len(w.members)) for size in sizes]

    def expected(outcome: Outcome) -> Expected:
        parts = [[w.of(m, s * len(w.members))[rank * s : (rank + 1) * s] for m in outcome.contributors] for s in sizes]
        return [w.reduced(part) for part in parts]

    return Trial(tensors, lambda: w.comm.reduce_scatter_coalesced(tensors, w.case.op, **w.how), expected, shared=False)


def _reduce_scatter_v(w: Workbench) -> Trial:
    counts = [w.rows(member) for member in w.members]
    rank = w.members.index(w.me)
    first, last = sum(counts[:rank]), sum(counts[: rank + 1])
    tensor = w.of(w.me, sum(counts))
    return Trial(
        [tensor],
        lambda: w.comm.reduce_scatter_v(tensor, counts, w.case.op, **w.how),
        lambda outcome: [w.reduced([w.of(m, sum(counts))[first:last] for m in outcome.contributors])],
        shared=False,
    )


def _all_to_all(w: Workbench) -> Trial:
    share, rank = w.share(), w.members.index(w.me)
    whole = share * len(w.members)
    tensor = w.of(w.me, whole)
    return Trial(
        [tensor],
        lambda: w.comm.all_to_all(tensor, **w.how),
        lambda outcome: [torch.cat([w.of(m, whole)[rank * share : (rank + 1) * share] for m in outcome.contributors])],
        shared=False,
    )


def _all_to_all_v(w: Workbench) -> Trial:
    def counts(member: int) -> list[int]:
        return [w.rows(1000 * member + other) for other in w.members]

    rank = w.members.index(w.me)
    tensor = w.of(w.me, sum(counts(w.me)))

    def expected(outcome: Outcome) -> Expected:
        return [torch.cat([torch.split(w.of(m, sum(counts(m))), counts(m))[rank] for m in outcome.contributors])]

    return Trial([tensor], lambda: w.comm.all_to_all_v(tensor, counts(w.me), **w.how), expected, shared=False)


def _exchange(w: Workbench) -> Trial:
    """Any schedule: a broadcast by a ring, from the rank of the root."""
    world, count = len(w.members), w.case.elements
    tensor = w.of(w.me)
    schedule = ring.broadcast(world, count, w.members.index(w.root))
    return Trial(
        [tensor],
        lambda: w.comm.run(schedule, tensor, on_loss=w.case.on_loss),
        lambda outcome: [w.of(w.root)],
    )


def _send_recv(w: Workbench) -> Trial:
    """A message between two; a barrier before it, so that all mean the same two."""
    w.comm.barrier()
    w = Workbench(w.comm, w.case)
    if len(w.members) < 2:
        return Trial([], w.comm.barrier, lambda _: None)
    source, target = w.root, w.members[w.members.index(w.root) - 1]
    tensor = w.of(w.me)
    calls: dict[int, Callable[[], Outcome]] = {
        source: lambda: w.comm.send(tensor, target),
        target: lambda: w.comm.recv(tensor, source),
    }
    here = Outcome(None, w.members, w.comm.epoch, 1, False)
    return Trial(
        [tensor] if w.me != target else [],
        calls.get(w.me, lambda: here),
        lambda _: [w.of(source)] if w.me == target else None,
        shared=False,
    )


_TRIALS: dict[str, Callable[[Workbench], Trial]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "barrier": _barrier,
    "all_gather": _all_gather,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "all_gather_v": _all_gather_v,
    "reduce_scatter_v": _reduce_scatter_v,
    "all_to_all_v": _all_to_all_v,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "all_gather_coalesced": _all_gather_coalesced,
    "reduce_scatter_coalesced": _reduce_scatter_coalesced,
    "all_reduce_sparse": _all_reduce_sparse,
    "exchange": _exchange,
    "send_recv": _send_recv,
}

KINDS_OF_OPERATIONS: tuple[str, ...] = tuple(_TRIALS)
