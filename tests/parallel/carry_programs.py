"""What the members do in the tests of state that is carried over a loss."""

from typing import Any

import torch
from torch import Tensor

from collectives.errors import StateLost
from parallel.carry import Replicas, carry
from parallel.layout import Broadcast, Flat, Layout, Mesh, Split
from tests.harness.peer import Peer
from tests.parallel.layouts import cut

SHAPES = {
    "whole": (5, 3),
    "rows": (7, 4),
    "columns": (3, 8),
    "flat": (5, 5),
    "both": (6, 6),
    "tiny": (2,),
    "scalar": (),
}


def layouts(mesh: Mesh) -> dict[str, Layout]:
    """On a mesh of two axes."""
    x, y = mesh.names
    return {
        "whole": Layout.replicated(mesh),
        "rows": Layout.by_axis(mesh, **{x: Split(0)}),
        "columns": Layout(mesh, (Split(1), Split(1))),
        "flat": Layout(mesh, (Flat(), Flat())),
        "both": Layout.by_axis(mesh, **{x: Split(1), y: Split(0)}),
        "tiny": Layout(mesh, (Split(0), Broadcast())),
        "scalar": Layout.replicated(mesh),
    }


def tensors(seed: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=numbers, dtype=torch.float64) for name, shape in SHAPES.items()}


def parts(whole: dict[str, Tensor], placed: dict[str, Layout], rank: int) -> dict[str, Tensor]:
    return {name: cut(whole[name], placed[name].shard(SHAPES[name], rank)).clone() for name in whole}


def survive(peer: Peer, redundancy: bool) -> dict[str, Any]:
    """Hold a part of the state, lose a member, and bring the state to the layouts of those who are left."""
    with peer.join() as comm:
        before, replicas = layouts(Mesh.of(x=2, y=2)), Replicas()
        if redundancy:
            replicas = Replicas.of(before, SHAPES)
            replicas.refresh(comm, parts(tensors(1), before, comm.rank), before, SHAPES)
            replicas.refresh(comm, parts(tensors(2), before, comm.rank), before, SHAPES)
        state, members = parts(tensors(2), before, comm.rank), comm.members
        peer.say("ready", rank=comm.rank)
        peer.hear("go")
        comm.barrier()
        after = layouts(Mesh((("x", comm.size), ("y", 1))))
        try:
            carried = carry(state, before, after, SHAPES, members, comm, replicas)
        except StateLost as error:
            return {"lost": str(error), "size": comm.size}
        expected = parts(tensors(2), after, comm.rank)
        wrong = [name for name in SHAPES if not torch.equal(carried[name], expected[name])]
        return {"wrong": wrong, "size": comm.size, "copied": sorted(replicas.layouts)}
