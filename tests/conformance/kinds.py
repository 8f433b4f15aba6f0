"""The kinds of operations under loss: how to call each, what must come out, and what rule R6 promises.

The first word of a name is what fault points call the operation. `losses` runs them, `test_r6_losses` judges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collectives.algorithms import ring
from collectives.communicator import Communicator
from collectives.outcome import Outcome
from tests.conformance.values import exact, reduced

PATTERN = 997


def input_of(member: int, count: int, number: int) -> Tensor:
    """What a member gives to operation `number`: a pattern of exact values, over and over."""
    return _tiled(_pattern(member, number), count)


def average(members: Sequence[int], count: int, number: int) -> Tensor:
    """The average of their inputs."""
    return _reduced(members, count, number, "avg")


def _reduced(members: Sequence[int], count: int, number: int, op: str) -> Tensor:
    return _tiled(reduced([_pattern(member, number) for member in members], op), count)


def _pattern(member: int, number: int) -> Tensor:
    return exact(member, [PATTERN], torch.float32, "sum", number)


def _tiled(pattern: Tensor, count: int) -> Tensor:
    return pattern.repeat(-(-count // PATTERN))[:count]


class End(NamedTuple):
    """An operation that ended well: among whom, of what, and for which member."""

    who: Sequence[int]
    length: int
    number: int
    member: int
    root: int

    @property
    def rank(self) -> int:
        """Of the member."""
        return list(self.who).index(self.member)

    def inputs(self) -> list[Tensor]:
        """Of all contributors, by rank."""
        return [input_of(member, self.length, self.number) for member in self.who]

    def average(self) -> Tensor:
        """Of all inputs."""
        return average(self.who, self.length, self.number)


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        call: runs it on a member's tensor, with the id of a root.
        expect: what it must give to a member; None: nothing.
        elastic: the survivors run it again.
        in_place: the tensor is overwritten.
        whole: the tensor is moved whole to each peer, not in parts.
        alone: each member's result is another.
        never: fault points that a victim may not pass.
        first: more operations of the call follow, so that nobody has a result when the fault fires.
        gives: the victim's data are part of the result.
        algorithm: one in which every rank reduces.

    """

    call: Callable[..., Outcome]
    expect: Callable[[End], Tensor | None]
    elastic: bool = False
    in_place: bool = False
    whole: bool = False
    alone: bool = False
    never: tuple[str, ...] = ("reduce",)
    first: bool = False
    gives: bool = True
    algorithm: str = "ring"


def _rows(tensor: Tensor, member: int) -> Tensor:
    """As many rows of three as the member has in an uneven operation."""
    return tensor[: len(tensor) // 3 * 3].view(-1, 3)[: len(tensor) // 3 - 10 * member]


def _shares(world: int, count: int) -> list[int]:
    """Uneven counts that add up."""
    shares = [count // world + 5 * rank for rank in range(world)]
    return [*shares[:-1], count - sum(shares[:-1])]


def _uneven_blocks(tensor: Tensor, world: int) -> list[Tensor]:
    return list(torch.split(tensor, _shares(world, len(tensor))))


def _entries(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(tensor)) * 2, tensor


def _thirds(tensor: Tensor) -> list[Tensor]:
    return list(torch.tensor_split(tensor, 3))


def _reduce_list(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    """All-reduce of three tensors in three buckets."""
    outcome = comm.all_reduce_coalesced(_thirds(tensor), "avg", bucket_bytes=4, **how)
    assert [one.data_ptr() for one in outcome.results] == [one.data_ptr() for one in _thirds(tensor)]
    return outcome


def _scatter(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    rows = tensor.view(comm.size, -1)
    return comm.scatter(torch.zeros(rows.shape[1]), root, rows if comm.member_id == root else None, **how)


def _broadcast(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    return comm.broadcast(tensor, root, **how)


def _reduce(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    return comm.reduce(tensor, root, "avg", inplace=False, **how)


def _gather(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    return comm.gather(tensor, root, **how)


def _gather_uneven(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    return comm.all_gather_v(_rows(tensor, comm.member_id), **how)


def _gather_counted(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    counts = [len(_rows(tensor, member)) for member in comm.members]
    return comm.all_gather_v(_rows(tensor, comm.member_id), counts, **how)


def _exchange_uneven(comm: Communicator, tensor: Tensor, root: int, **how: Any) -> Any:
    return comm.all_to_all_v(tensor, _shares(comm.size, len(tensor)), **how)


def _at_root(expect: Callable[[End], Tensor]) -> Callable[[End], Tensor | None]:
    return lambda end: expect(end) if end.member == end.root else None


def _stacked(end: End) -> Tensor:
    return torch.stack(end.inputs())


def _uneven(end: End) -> Tensor:
    return torch.cat([_rows(one, member) for one, member in zip(end.inputs(), end.who, strict=True)])


def _roots(end: End) -> Tensor:
    return input_of(end.root, end.length, end.number)


def _part(end: End) -> Tensor:
    return end.average().view(len(end.who), -1)[end.rank]


def _received(end: End) -> Tensor:
    return torch.cat([_uneven_blocks(one, len(end.who))[end.rank] for one in end.inputs()])


ALL = ("transfer", "reduce")
_ALL_GATHER_V = Kind(_gather_uneven, _uneven, elastic=True, whole=True)
_ALL_TO_ALL_V = Kind(_exchange_uneven, _received, alone=True)
_SPARSE = Kind(
    lambda c, t, root, **how: c.all_reduce_sparse(_entries(t), "avg", **how), End.average, elastic=True, whole=True
)

KINDS: dict[str, Kind] = {
    "all_reduce": Kind(
        lambda c, t, root, **how: c.all_reduce(t, "avg", **how), End.average, elastic=True, in_place=True, never=()
    ),
    "all_reduce out of place": Kind(
        lambda c, t, root, **how: c.all_reduce(t, "avg", inplace=False, **how), End.average, elastic=True, never=()
    ),
    "reduce_scatter": Kind(lambda c, t, root, **how: c.reduce_scatter(t, "avg", **how), _part, alone=True, never=()),
    "all_gather": Kind(lambda c, t, root, **how: c.all_gather(t, **how), _stacked, elastic=True, whole=True),
    "all_gather to out": Kind(
        lambda c, t, root, **how: c.all_gather(t, out=torch.zeros(c.size, *t.shape), **how), _stacked, whole=True
    ),
    "broadcast from a survivor": Kind(_broadcast, _roots, elastic=True, in_place=True, whole=True, gives=False),
    "broadcast from the victim": Kind(_broadcast, _roots, in_place=True, whole=True, never=ALL),
    "barrier": Kind(lambda c, t, root, **how: c.barrier(**how), lambda end: None, elastic=True, never=ALL, gives=False),
    "exchange": Kind(
        lambda c, t, root, **how: c.run(ring.all_reduce(c.size, t.numel()), t, **how),
        lambda end: _reduced(end.who, end.length, end.number, "sum"),
        in_place=True,
        never=(),
    ),
    "reduce to a survivor": Kind(_reduce, _at_root(End.average), elastic=True, alone=True, never=ALL),
    "reduce to the victim": Kind(_reduce, _at_root(End.average), alone=True, never=(), algorithm="flat"),
    "gather at a survivor": Kind(_gather, _at_root(_stacked), elastic=True, alone=True, whole=True, never=ALL),
    "gather at the victim": Kind(_gather, _at_root(_stacked), alone=True, whole=True),
    "scatter from a survivor": Kind(
        _scatter, lambda end: _roots(end).view(len(end.who), -1)[end.rank], alone=True, gives=False
    ),
    "scatter from the victim": Kind(
        _scatter, lambda end: _roots(end).view(len(end.who), -1)[end.rank], alone=True, never=ALL
    ),
    "all_to_all": Kind(
        lambda c, t, root, **how: c.all_to_all(t.view(c.size, -1), **how),
        lambda end: torch.stack([one.view(len(end.who), -1)[end.rank] for one in end.inputs()]),
        alone=True,
    ),
    "reduce_scatter_v": Kind(
        lambda c, t, root, **how: c.reduce_scatter_v(t, _shares(c.size, len(t)), "avg", **how),
        lambda end: _uneven_blocks(end.average(), len(end.who))[end.rank],
        alone=True,
        never=(),
    ),
    "all_gather_v": _ALL_GATHER_V,
    "all_gather_v of known counts": Kind(_gather_counted, _uneven, elastic=True, whole=True),
    "numbers of all_gather_v": Kind(_gather_uneven, _uneven, elastic=True, whole=True, first=True),
    "all_to_all_v": _ALL_TO_ALL_V,
    "numbers of all_to_all_v": Kind(_exchange_uneven, _received, alone=True, first=True),
    "all_reduce_sparse": _SPARSE,
    "numbers of all_reduce_sparse": Kind(_SPARSE.call, _SPARSE.expect, elastic=True, whole=True, first=True),
    "all_reduce_coalesced": Kind(_reduce_list, End.average, elastic=True, in_place=True, never=(), first=True),
    "all_gather_coalesced": Kind(
        lambda c, t, root, **how: c.all_gather_coalesced(_thirds(t), **how), _stacked, elastic=True, whole=True
    ),
    "reduce_scatter_coalesced": Kind(
        lambda c, t, root, **how: c.reduce_scatter_coalesced([t], "avg", **how), _part, alone=True, never=()
    ),
}


def result_of(outcome: Outcome) -> Tensor | None:
    """The result as one tensor, also where it is several."""
    if not outcome.results:
        return outcome.result
    results = outcome.results
    if results[0].dtype == torch.int64:  # indices and values of a sparse one
        assert torch.equal(results[0], torch.arange(len(results[0])) * 2)
        return results[1]
    return torch.cat(results, dim=-1)
