"""Calls that differ between the members of a healthy group (rule R9)."""

from collections.abc import Callable
from typing import Any

import torch

from collectives.algorithms import bidirectional, ring
from collectives.communicator import Communicator
from collectives.errors import DescriptorMismatch
from collectives.outcome import Outcome
from tests.conformance.losses import goes_on

Call = Callable[[Communicator], Any]

LARGE = 500_000
"""Elements that gloo moves; what it is sent too much ends its process."""


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def scatter_from(comm: Communicator, root: int) -> Outcome:
    return comm.scatter(ones(3), root, ones(comm.size, 3) if comm.member_id == root else None)


def sparse(*shape: int) -> torch.Tensor:
    """One entry."""
    return torch.sparse_coo_tensor(torch.zeros(len(shape), 1), ones(1), shape, check_invariants=True)


CASES: dict[str, tuple[Call, Call]] = {
    "kind, all_reduce and all_gather": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_gather(ones(8))),
    "kind, all_reduce and barrier": (lambda c: c.all_reduce(ones(8)), lambda c: c.barrier()),
    "kind, broadcast and barrier": (lambda c: c.broadcast(ones(8), c.members[0]), lambda c: c.barrier()),
    "kind, all_reduce and reduce_scatter": (
        lambda c: c.all_reduce(ones(12, LARGE // 12)),
        lambda c: c.reduce_scatter(ones(12, LARGE // 12)),
    ),
    "dtype of equal size": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_reduce(ones(8, dtype=torch.int32))),
    "dtype of other size": (
        lambda c: c.all_reduce(ones(LARGE)),
        lambda c: c.all_reduce(ones(LARGE, dtype=torch.float64)),
    ),
    "shape of equal count": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_reduce(ones(2, 4))),
    "shape, small and large": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_reduce(ones(LARGE))),
    "shape, large and larger": (lambda c: c.all_reduce(ones(LARGE)), lambda c: c.all_reduce(ones(LARGE + 900))),
    "shape of a row": (lambda c: c.all_gather(ones(LARGE)), lambda c: c.all_gather(ones(LARGE // 2))),
    "shape, empty": (lambda c: c.broadcast(ones(LARGE), c.members[0]), lambda c: c.broadcast(ones(0), c.members[0])),
    "op": (lambda c: c.all_reduce(ones(8), "sum"), lambda c: c.all_reduce(ones(8), "max")),
    "op of a large one": (
        lambda c: c.reduce_scatter(ones(60, 9000)),
        lambda c: c.reduce_scatter(ones(60, 9000), "avg"),
    ),
    "root": (lambda c: c.broadcast(ones(8), c.members[0]), lambda c: c.broadcast(ones(8), c.members[1])),
    "root of a large one": (
        lambda c: c.broadcast(ones(LARGE), c.members[0]),
        lambda c: c.broadcast(ones(LARGE), c.members[-1]),
    ),
    "algorithm": (
        lambda c: c.all_reduce(ones(LARGE), algorithm="ring"),
        lambda c: c.all_reduce(ones(LARGE), algorithm="bidirectional"),
    ),
    "algorithm, small": (
        lambda c: c.all_reduce(ones(8), algorithm="ring"),
        lambda c: c.all_reduce(ones(8), algorithm="doubling"),
    ),
    "root of a reduce": (
        lambda c: c.reduce(ones(LARGE), c.members[0]),
        lambda c: c.reduce(ones(LARGE), c.members[-1]),
    ),
    "root of a gather": (lambda c: c.gather(ones(8), c.members[0]), lambda c: c.gather(ones(8), c.members[1])),
    "root of a scatter": (lambda c: scatter_from(c, c.members[0]), lambda c: scatter_from(c, c.members[-1])),
    "blocks": (lambda c: c.all_to_all(ones(c.size, LARGE)), lambda c: c.all_to_all(ones(c.size, 7))),
    "blocks and rows": (lambda c: c.all_to_all(ones(c.size)), lambda c: c.all_to_all_v(ones(c.size), [1] * c.size)),
    "shape of uneven rows": (lambda c: c.all_gather_v(ones(3, 2)), lambda c: c.all_gather_v(ones(3, 3))),
    "counts, known and asked for": (
        lambda c: c.all_gather_v(ones(3)),
        lambda c: c.all_gather_v(ones(3), [3] * c.size),
    ),
    "counts": (
        lambda c: c.reduce_scatter_v(ones(LARGE), [LARGE, *[0] * (c.size - 1)]),
        lambda c: c.reduce_scatter_v(ones(LARGE), [*[0] * (c.size - 1), LARGE]),
    ),
    "list": (
        lambda c: c.all_reduce_coalesced([ones(2, 3), ones(4)]),
        lambda c: c.all_reduce_coalesced([ones(4), ones(2, 3)]),
    ),
    "list and tensor": (lambda c: c.all_reduce_coalesced([ones(8)]), lambda c: c.all_reduce(ones(8))),
    "buckets": (
        lambda c: c.all_reduce_coalesced([ones(4), ones(4)], bucket_bytes=4),
        lambda c: c.all_reduce_coalesced([ones(4), ones(4)]),
    ),
    "shape of a sparse one": (lambda c: c.all_reduce_sparse(sparse(3, 4)), lambda c: c.all_reduce_sparse(sparse(4, 3))),
    "sparse and pair": (
        lambda c: c.all_reduce_sparse(sparse(3)),
        lambda c: c.all_reduce_sparse((torch.arange(1), ones(1))),
    ),
    "schedule": (
        lambda c: c.run(ring.all_reduce(c.size, LARGE), ones(LARGE)),
        lambda c: c.run(bidirectional.all_reduce(c.size, LARGE), ones(LARGE)),
    ),
    "codec": (lambda c: c.all_reduce(ones(LARGE), codec="int8"), lambda c: c.all_reduce(ones(LARGE), codec="int4")),
    "codec and none": (lambda c: c.all_reduce(ones(LARGE)), lambda c: c.all_reduce(ones(LARGE), codec="bf16")),
    "rounding": (
        lambda c: c.all_reduce(ones(8), codec="int8"),
        lambda c: c.all_reduce(ones(8), codec="int8", rounding="stochastic"),
    ),
    "reproducible": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_reduce(ones(8), reproducible=True)),
    "on_loss": (lambda c: c.all_reduce(ones(8)), lambda c: c.all_reduce(ones(8), on_loss="raise")),
    "preallocated output": (
        lambda c: c.all_gather(ones(8)),
        lambda c: c.all_gather(ones(8), out=torch.zeros(c.size, 8)),
    ),
}


def disagree(comm: Communicator, case: str, odd: list[int]) -> dict[str, Any]:
    """Call the second of a case on the ranks `odd`, the first on the others; tell what came of it."""
    call = CASES[case][comm.rank in odd]
    members = comm.members
    try:
        call(comm)
    except DescriptorMismatch as error:
        said = str(error)
    else:
        said = ""
    return {"said": said, "same members": comm.members == members, "goes on": goes_on(comm)}
