"""The job's checkpoints: written while it trains, read for `--resume`. Used by `launch.job` and `launch.reference`.

A step of the store holds the whole of `Trainer.state`, under the names of that; `ringhold ckpt` reads and converts it.
"""

from pathlib import Path

import checkpoint
from checkpoint import Sharded
from checkpoint.nest import key_of
from collectives.communicator import Communicator
from collectives.errors import MemberLost
from launch import finals
from launch.trainer import State
from parallel.layout import Flat, Layout, Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(store: str, state: State, comm: Communicator, sharded: bool) -> checkpoint.SaveReport:
    """Save the state that all members have, at its step. Every member calls it.

    Args:
        store: folder or URL, the same for all.
        state: the same on all members.
        comm: the members. Those that are lost meanwhile are missed by nobody.
        sharded: let each member write a flat part of the optimizer's moments, as if it had no more of them; else all
            write what they have alike, in turns.

    Raises:
        StorageFailed: a member cannot write; earlier steps are untouched.

    """
    while True:
        mine, layouts = _shards(state, comm) if sharded else (state, {})
        try:
            return checkpoint.save(store, mine, layouts, comm, step=state["step"])
        except MemberLost:
            if not sharded:
                raise
            # With it went a part of the moments, as far as the save knew. But all of us have all of them.


def load(path: str) -> State:
    """Read a whole state: of a `final.safetensors`, or of a store, perhaps with `@STEP` for one that is not the newest.

    Raises:
        CorruptFile, CorruptChunk, NoCheckpoint, UnknownFormat, StorageFailed: it is not there, or not whole.

    """
    return finals.load(Path(path)).state if Path(path).is_file() else checkpoint.load_state(path)


def _shards(state: State, comm: Communicator) -> tuple[State, dict[str, Sharded]]:
    """The state with this member's flat parts of the moments, and how these lie."""
    layout = Layout(Mesh.of(dp=comm.size), (Flat(),))
    layouts: dict[str, Sharded] = {}
    parts = {}
    for name, moments in state["optimizer"]["state"].items():
        parts[name] = dict(moments)
        for kind in MOMENTS:
            whole = moments[kind]
            shard = layout.shard(tuple(whole.shape), comm.rank)
            parts[name][kind] = whole.flatten()[shard.start : shard.stop]
            layouts[key_of(("optimizer", "state", name, kind))] = Sharded(layout, tuple(whole.shape))
    return {**state, "optimizer": {**state["optimizer"], "state": parts}}, layouts
