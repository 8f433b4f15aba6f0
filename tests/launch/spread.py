"""A program of four peers: the job's state from one store to another by way of a mesh of tensor and pipeline axes."""

from typing import Any

import torch

import checkpoint
from checkpoint import Sharded
from checkpoint.nest import key_of
from launch.trainer import State
from parallel.layout import Broadcast, Layout, Mesh, Split
from tests.harness.peer import Peer

STAGES = 2


def through(peer: Peer, source: str, target: str) -> list[str]:
    """Load this rank's part of the newest step, save it to `target`; returns the keys of its tensors."""
    with peer.join() as comm:
        whole = checkpoint.load_state(source)
        mine, layouts = _part(whole, comm.rank)
        checkpoint.load(source, mine, layouts, comm)
        # Everything that this rank has not loaded is gone: what is saved comes from the parts alone.
        checkpoint.save(target, mine, layouts, comm, step=whole["step"])
        return sorted(mine["model"])


def _part(whole: State, rank: int) -> tuple[State, dict[str, Sharded]]:
    """Empty places for what a rank of mesh (pp=2, tp=2) has: every other parameter, its first dimension split."""
    stage = Mesh((("tp", 2),), tuple(range(rank // 2 * 2, rank // 2 * 2 + 2)))
    layouts: dict[str, Sharded] = {}

    def place(path: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        layout = Layout(stage, (Split(0) if tensor.dim() else Broadcast(),))
        layouts[key_of(path)] = Sharded(layout, tuple(tensor.shape))
        shape = layout.shard(tuple(tensor.shape), rank).shape
        return torch.full(shape, -1, dtype=tensor.dtype)

    names = [name for number, name in enumerate(whole["model"]) if number % STAGES == rank // 2]
    model = {name: place(("model", name), whole["model"][name]) for name in names}
    moments: dict[str, Any] = {
        name: {
            kind: place(("optimizer", "state", name, kind), tensor)
            for kind, tensor in whole["optimizer"]["state"][name].items()
        }
        for name in names
    }
    optimizer = {**whole["optimizer"], "state": moments}
    return {**whole, "model": model, "optimizer": optimizer, "rng": torch.zeros_like(whole["rng"])}, layouts
