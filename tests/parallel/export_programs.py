"""What ranks do in the tests of exports."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from collectives.communicator import Communicator
from parallel.executing import shard_of
from parallel.export import device_mesh, dtensor_placements
from parallel.layout import Broadcast, Layout, Mesh, Split
from tests.parallel.layouts import mesh_of

CASES = [
    (mesh_of(4), (Split(0),), (8, 6)),
    (mesh_of(4), (Split(1),), (3, 8)),
    (mesh_of(2, 2), (Split(0), Split(0)), (8, 3)),
    (mesh_of(2, 2), (Split(1), Split(0)), (6, 4)),
    (mesh_of(2, 2), (Broadcast(), Split(1)), (5, 2)),
    (Mesh((("x", 2), ("y", 2)), (0, 2, 1, 3)), (Split(0), Broadcast()), (2, 2)),
]


def distribute(comm: Communicator, store: str) -> list[bool]:
    """Whether torch gives this rank what the layout says, for each case."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, comm.size),  # type: ignore[attr-defined]
        rank=comm.rank,
        world_size=comm.size,
    )
    found: list[Any] = []
    for mesh, placements, shape in CASES:
        layout = Layout(mesh, placements)
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        theirs = distribute_tensor(whole, device_mesh(mesh), dtensor_placements(layout, shape))
        found.append(torch.equal(theirs.to_local(), shard_of(whole, layout, comm.rank)))
    dist.destroy_process_group()
    return found
