"""State carried from one epoch to the next in memory, when members are lost. Called by `execute` and training loops.

Before the loss every tensor lives in a layout whose ranks are the old ones; afterwards it is wanted in another, on the
survivors. What a lost member held alone is taken from its buddy: with redundancy the shards of each rank are kept a
second time by another, by the layout that `buddy` gives, and refreshed with every change (`Replicas`). Without, such
state is gone from memory, and `carry` names the tensors for which the last checkpoint has to be read. What second
copies cost is `refreshing`; planners count it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from collectives.communicator import Communicator
from collectives.errors import StateLost, UsageError
from parallel.boxing import Boxing
from parallel.bundle import alike, bundle
from parallel.cells import Piece, cells_of, pieces
from parallel.layout import Layout, Mesh, Shard
from parallel.resharding import Change, flows_of, reshard, schedule_of

_MOST_TOLD = 6
"""Tensors that an error names."""


def buddy(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Where the second copies of a tensor's shards live: the same layout with every rank's place one further.

    None where no rank holds anything alone: where the tensor is replicated, or nobody else is there. A place is passed
    on along the last axis that cuts the tensor, so that it is another shard's rank that keeps it.

    Raises:
        UsageError: the tensor is partial.

    """
    held = pieces(layout, shape)
    if any(len(piece.terms) > 1 for piece in held):
        raise UsageError(f"a partial value is no state: {layout} cannot be kept a second time")
    if all(len(piece.terms[0]) > 1 for piece in held) or layout.mesh.size == 1:
        return None
    axes = [axis for axis in range(len(layout.mesh.axes)) if _cuts(layout, axis)]
    keeper = {line[at]: line[at - 1] for line in layout.mesh.groups(axes[-1]) for at in range(len(line))}
    return Layout(Mesh(layout.mesh.axes, tuple(keeper[rank] for rank in layout.mesh.ranks)), layout.placements)


@lru_cache(maxsize=1 << 14)
def refreshing(layout: Layout, shape: tuple[int, ...]) -> Boxing | None:
    """What it takes to bring the second copies of a tensor up to date, in closed form; None where there are none.

    Every shard goes to the next rank along one axis, so all elements are sent once. Errors: those of `buddy`.
    """
    if buddy(layout, shape) is None:
        return None
    axis = max(axis for axis in range(len(layout.mesh.axes)) if _cuts(layout, axis))
    return Boxing("exchange", (layout.mesh.names[axis],), math.prod(shape), 1)


def _cuts(layout: Layout, axis: int) -> bool:
    return layout.mesh.shape[axis] > 1 and str(layout.placements[axis]) != "B"


@dataclass
class Replicas:
    """Second copies of the shards that somebody holds alone, on the ranks that `buddy` names.

    Attributes:
        layouts: of the copies, by the tensor's name; tensors that need none are not there.
        shards: this rank's part of each.

    """

    layouts: dict[str, Layout] = field(default_factory=dict)
    shards: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]]) -> "Replicas":
        """Find out which tensors need copies; `refresh` makes them."""
        found = {name: buddy(layout, shapes[name]) for name, layout in layouts.items()}
        return cls({name: layout for name, layout in found.items() if layout is not None})

    def refresh(
        self,
        comm: Communicator,
        state: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Bring the copies up to date with the shards of `state`; every rank calls it. All of them change, or none.

        Small tensors of one dtype go together. Copies of tensors that `state` does not have stay as they are.

        Raises:
            MemberLost: somebody was lost; the copies are the old ones.

        """
        names = [name for name in self.layouts if name in state]
        moves = [reshard(layouts[name], self.layouts[name], shapes[name], comm.size) for name in names]
        fresh: dict[str, Tensor] = {}
        for group in alike(moves, [state[name].dtype for name in names]):
            moved = bundle(tuple(moves[at] for at in group)).run(comm, [state[names[at]] for at in group])
            fresh.update({names[at]: shard.clone() for at, shard in zip(group, moved, strict=True)})
        self.shards = {**self.shards, **fresh}


def carry(
    state: Mapping[str, Tensor],
    before: Mapping[str, Layout],
    after: Mapping[str, Layout],
    shapes: Mapping[str, tuple[int, ...]],
    members: Sequence[int],
    comm: Communicator,
    replicas: Replicas | None = None,
) -> dict[str, Tensor]:
    """Bring tensors to the layouts in which the members of now want them; every one of them calls it.

    Args:
        state: this member's shards by name.
        before: where each tensor was; its ranks are places in `members`.
        after: where it is wanted; its ranks are those of `comm`.
        shapes: of the whole tensors.
        members: ids of the members by their old ranks.
        comm: of now. Members that were not there before hold nothing and give empty tensors of the right dtype.
        replicas: second copies, if any were kept; like `state` of the last complete step.

    Returns:
        The shards by name.

    Raises:
        StateLost: parts of some tensors were held by nobody who is left; the message names them.
        MemberLost: another member was lost meanwhile; call again with the same state.

    """
    copies = replicas or Replicas()
    now = {member: rank for rank, member in enumerate(comm.members)}
    old_rank = members.index(comm.member_id) if comm.member_id in members else -1
    sources = {
        name: _left(layout, copies.layouts.get(name), shapes[name], members, now) for name, layout in before.items()
    }
    _refuse_if_lost(sources)
    carried = {}
    for name, source in sources.items():
        held = {} if old_rank < 0 else _held(old_rank, name, state, before, copies, shapes)
        change = _change(source, after[name], shapes[name], comm.size)
        carried[name] = change.move(comm, held, state[name].dtype)
    return carried


def only_in_copies(
    before: Mapping[str, Layout], shapes: Mapping[str, tuple[int, ...]], members: Sequence[int], comm: Communicator
) -> tuple[str, ...]:
    """The tensors of which no survivor has some part but as a second copy. Arguments are those of `carry`."""
    now = {member: rank for rank, member in enumerate(comm.members)}
    return tuple(
        name
        for name, layout in before.items()
        if not all(piece.terms[0] for piece in _left(layout, None, shapes[name], members, now))
    )


def _left(
    layout: Layout, copy: Layout | None, shape: tuple[int, ...], members: Sequence[int], now: Mapping[int, int]
) -> tuple[Piece, ...]:
    """The shards of a tensor with the ranks of now that have them, by themselves or as a copy."""
    keepers: dict[Shard, list[int]] = {}
    for piece in (*pieces(layout, shape), *(() if copy is None else pieces(copy, shape))):
        if len(piece.terms) > 1:
            raise UsageError(f"a partial value is no state: {layout} cannot be carried over")
        alive = [now[members[rank]] for rank in piece.terms[0] if members[rank] in now]
        keepers.setdefault(piece.shard, []).extend(alive)
    return tuple(Piece(shard, (tuple(dict.fromkeys(ranks)),)) for shard, ranks in keepers.items())


def _refuse_if_lost(sources: Mapping[str, tuple[Piece, ...]]) -> None:
    lost = {name: [p.shard for p in found if not p.terms[0]] for name, found in sources.items()}
    lost = {name: shards for name, shards in lost.items() if shards}
    if lost:
        told = [
            f"{name} ({sum(shard.size for shard in shards)} of {sum(p.shard.size for p in sources[name])} elements)"
            for name, shards in sorted(lost.items())
        ]
        more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
        listing = ", ".join(told[:_MOST_TOLD]) + more
        raise StateLost(
            f"only members that are gone held parts of {listing}; read the last checkpoint, or keep second copies "
            "(redundancy 1) to carry such state over in memory",
            tuple(sorted(lost)),
        )


def _held(
    rank: int,
    name: str,
    state: Mapping[str, Tensor],
    before: Mapping[str, Layout],
    copies: Replicas,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[Shard, Tensor]:
    """The shards of a tensor that a member has from before."""
    found = {}
    for layout, shards in ((copies.layouts.get(name), copies.shards), (before[name], state)):
        if layout is not None and rank in layout.mesh.ranks and name in shards:
            found[layout.shard(shapes[name], rank)] = shards[name]
    return found


def _change(source: tuple[Piece, ...], after: Layout, shape: tuple[int, ...], world: int) -> Change:
    flows = flows_of(cells_of(source, pieces(after, shape), shape, _same), _same)
    return Change(after, shape, flows, schedule_of(flows, world))


def _same(one: int, other: int) -> int:
    return int(one == other)
