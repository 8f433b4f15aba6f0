"""What peers of `test_crash.py` and `test_processes.py` do: save and load over a real communicator, and die on cue."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checkpoint import background, saving
from checkpoint.holdings import Sharded
from checkpoint.loading import load
from checkpoint.packs import PackWriter
from checkpoint.store import Store
from collectives.communicator import Communicator
from collectives.errors import MemberLost
from collectives.state import state_hash
from parallel.layout import Flat, Layout, Mesh, Split
from tests.harness.peer import Peer

SHAPES = {"w": (600, 500), "v": (257, 33), "b": (9,)}


def whole(step: int) -> dict[str, Tensor]:
    """The tensors that all peers have together."""
    chance = torch.Generator().manual_seed(step)
    return {key: torch.randn(shape, generator=chance) for key, shape in SHAPES.items()}


def layouts_of(kind: str, world: int) -> dict[str, Sharded]:
    """How they lie."""
    mesh = Mesh.of(x=world)
    layout = {
        "replicated": Layout.replicated(mesh),
        "rows": Layout(mesh, (Split(0),)),
        "flat": Layout(mesh, (Flat(),)),
        "pairs": Layout.by_axis(Mesh.of(dp=2, tp=world // 2), tp=Split(0)) if world % 2 == 0 else None,
    }[kind]
    assert layout is not None
    return {key: Sharded(layout, shape) for key, shape in SHAPES.items()}


def state_of(kind: str, world: int, rank: int, step: int) -> dict[str, Any]:
    """What one rank holds."""
    found: dict[str, Any] = {"lr": 0.1 * step, "rng": {rank: b"seed"}}
    for key, tensor in whole(step).items():
        shard = layouts_of(kind, world)[key].layout.shard(tuple(tensor.shape), rank)
        box = tensor[tuple(slice(a, b) for a, b in zip(shard.box.start, shard.box.stop, strict=True))]
        found[key] = box.clone() if shard.whole else box.reshape(-1)[shard.start : shard.stop].clone()
    return found


def saves(peer: Peer, url: str, kind: str, world: int, step: int, victim: int = -1, stage: str = "") -> dict[str, Any]:
    """Save; one of them dies at a stage."""
    with peer.join() as comm:
        rank = comm.rank
        if rank == victim:
            arm(peer, stage)
        state = state_of(kind, world, rank, step)
        report = saving.save(url, state, layouts_of(kind, world), comm, step=step)
        return {"rank": rank, "lost": list(report.lost), "raw": report.written.raw, "mine": report.mine.raw}


def saves_in_background(peer: Peer, url: str, world: int, steps: int) -> list[int]:
    """Several saves behind each other's back, while the state changes and the communicator is busy."""
    with peer.join() as comm:
        values = torch.zeros(100_000)
        state = {"x": values, "step": 0}
        handles = []
        for step in range(steps):
            values.fill_(step)
            state["step"] = step
            handles.append(background.save_async(url, state, None, comm, step=step))
            values.fill_(-1)
            comm.all_reduce(torch.ones(1000))
        return [handle.wait().step for handle in handles]


def loads(peer: Peer, url: str, kind: str, world: int, step: int) -> str:
    """Load into a layout; the hash of what came, or what it ended with."""
    with peer.join() as comm:
        rank = comm.rank
        wanted = state_of(kind, world, rank, step)
        into = {key: torch.zeros_like(value) if isinstance(value, Tensor) else value for key, value in wanted.items()}
        into["lr"] = -1.0
        del into["rng"], wanted["rng"]
        load(url, into, layouts_of(kind, world), comm)
        return "equal" if state_hash({k: into[k] for k in wanted}) == state_hash(wanted) else "different"


def passes_on(peer: Peer, url: str, kinds: list[str], world: int, step: int) -> str:
    """Load by one layout and save by the next, on other peers than before."""
    with peer.join() as comm:
        return _pass_on(comm, url, kinds, world, step)


def _pass_on(comm: Communicator, url: str, kinds: list[str], world: int, step: int) -> str:
    before, after = kinds
    rank = comm.rank
    wanted = state_of(before, world, rank, 1)
    into = {key: torch.zeros_like(value) if isinstance(value, Tensor) else value for key, value in wanted.items()}
    into["lr"] = -1.0
    load(url, into, layouts_of(before, world), comm)
    assert state_hash(into) == state_hash(wanted)
    saving.save(url, state_of(after, world, rank, 1), layouts_of(after, world), comm, step=step)
    return state_hash({"lr": into["lr"]})


def fails(peer: Peer, url: str, world: int, victim: int) -> None:
    """One of them cannot write its pack."""
    with peer.join() as comm:
        if comm.rank == victim:
            _refuse_packs()
        saving.save(url, state_of("rows", world, comm.rank, 2), layouts_of("rows", world), comm, step=2)


def _refuse_packs() -> None:
    original = os.open

    def full(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).endswith(".pack") and flags & os.O_CREAT:
            raise OSError(28, "No space left on device")
        return original(path, flags, *more, **named)

    os.open = full


def arm(peer: Peer, stage: str) -> None:
    """End this process by SIGKILL at a stage, having said so."""

    def die(before: Callable[..., Any] | None) -> Callable[..., Any]:
        def dying(*given: Any, **named: Any) -> Any:
            if before is not None:
                before(*given, **named)
            peer.say("dying", stage=stage)
            os.kill(os.getpid(), signal.SIGKILL)

        return dying

    if stage == "beginning":
        saving.Saving.run = die(None)  # type: ignore[method-assign]
    elif stage == "writing":
        PackWriter.add = die(PackWriter.add)  # type: ignore[method-assign]
    elif stage == "written":
        PackWriter.close = die(PackWriter.close)  # type: ignore[method-assign]
    elif stage == "publishing":
        Store.publish = die(None)  # type: ignore[method-assign]
    elif stage == "published":
        Store.publish = die(Store.publish)  # type: ignore[method-assign]
    else:
        raise AssertionError(stage)


def saves_again(peer: Peer, url: str, world: int, victim: int) -> dict[str, Any]:
    """What a job does that has all of a state on every rank, and lets each write a part: after a loss, other parts."""
    with peer.join() as comm:
        if comm.rank == victim:
            arm(peer, "writing")
        tries = 0
        while True:
            tries += 1
            try:
                state = state_of("flat", comm.size, comm.rank, 2)
                report = saving.save(url, state, layouts_of("flat", comm.size), comm, step=2)
            except MemberLost:
                continue
            return {"tries": tries, "size": comm.size, "lost": list(report.lost)}
