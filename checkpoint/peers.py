"""Chunks from the memory of other ranks, before any file is read: for a job that lost some members and has the others.

`checkpoint.loading` calls `from_peers`. Whoever still has shards of the step offers them; a chunk all of whose
elements are offered goes from there to the ranks that want it. It is proven by the digest in the manifest, as one from
a file is, so an offer that has changed since does no harm. What nobody offers, or what comes with other bytes, is left
for the files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from checkpoint import nest, tensors
from checkpoint.assignment import Job, Part
from checkpoint.codec import Bytes
from checkpoint.crew import Crew
from checkpoint.exchange import put_together, rounds, trade
from checkpoint.holdings import Group, Holding, Layouts, describe, fits
from checkpoint.manifest import Manifest
from collectives.errors import MemberLost, RingholdError
from collectives.hashing import digest
from parallel.layout import Layout, Shard


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank still has in memory of the step that is loaded.

    Args:
        state: nested dict of its shards, with the keys of the checkpoint; plain values do not matter.
        layouts: how they lie, see `Layouts`, by the ranks of the communicator as they are now.

    """

    state: Mapping[str, Any]
    layouts: Layouts = None


class _Told(msgspec.Struct, frozen=True):
    """What a rank tells: its offer, and the chunks that it wants of each tensor."""

    holding: Holding | None
    wants: dict[str, list[int]]


def from_peers(
    crew: Crew,
    manifest: Manifest,
    offer: Offer | None,
    wants: Mapping[str, list[int]],
    round_bytes: int,
    accept: Callable[[str, int, Bytes], None],
) -> int:
    """Take what others have. Every rank calls it.

    Args:
        crew: all ranks.
        manifest: of the step.
        offer: of this rank.
        wants: numbers of the chunks that this rank wants, by key.
        round_bytes: most bytes that a rank sends or gets at a time.
        accept: called with key, number and raw bytes of each chunk that came, proven. It may not keep the bytes.

    Returns:
        Bytes that came, or were here.

    """
    local = {} if offer is None else _local(offer)
    told = {
        rank: msgspec.msgpack.decode(row, type=_Told)
        for rank, row in crew.gather(msgspec.msgpack.encode(_Told(_describe(offer, local), dict(wants)))).items()
    }
    offers = {rank: one.holding for rank, one in told.items() if one.holding is not None}
    shards = {key: _shards(key, offers, manifest) for key in manifest.tensors}
    jobs = [
        job
        for key, entry in manifest.tensors.items()
        if shards[key]
        for rank, one in told.items()
        for index in one.wants.get(key, ())
        if 0 <= index < len(entry.chunks)
        if (job := _job(key, index, manifest, rank, shards[key])) is not None
    ]
    mine = {key: shards[key][crew.rank] for key in local if crew.rank in shards.get(key, {})}
    data = tensors.LocalBytes(local, mine)
    taken = 0
    try:
        for some in rounds(jobs, round_bytes):
            for job, came in trade(crew, some, data):
                raw = put_together(job, data, came, np.empty(job.nbytes, dtype=np.uint8))
                chunk = manifest.chunks[manifest.tensors[job.key].chunks[job.index]]
                if digest(raw).hex() == chunk.digest:
                    accept(job.key, job.index, raw)
                    taken += job.nbytes
    except MemberLost:
        return taken  # on every rank alike; the files have the rest
    return taken


def _local(offer: Offer) -> dict[str, Tensor]:
    try:
        return nest.take_apart(dict(offer.state), tensors.is_tensor)[1]
    except RingholdError:
        return {}  # what cannot be described cannot have been saved


def _describe(offer: Offer | None, local: Mapping[str, Tensor]) -> Holding | None:
    if offer is None:
        return None
    try:
        return describe(
            {}, {key: (tensors.dtype_of(key, t), tuple(t.shape)) for key, t in local.items()}, offer.layouts
        )
    except RingholdError:
        return None


def _shards(key: str, offers: Mapping[int, Holding], manifest: Manifest) -> dict[int, Shard]:
    """What each offering rank has of a tensor; those that the first of them does not agree with are left out."""
    entry = manifest.tensors[key]
    found: dict[int, Shard] = {}
    agreed: Layout | None = None
    for rank, holding in offers.items():
        held = holding.tensors.get(key)
        if held is None or held.dtype != entry.dtype:
            continue
        try:
            layout = Layout.single(rank) if held.layout is None else Layout.from_json(holding.layouts[held.layout])
            shard = layout.shard(entry.shape, rank)
        except (RingholdError, IndexError):
            continue
        fixed = None if held.layout is None else layout
        if shard.partial or not fits(held.shape, shard) or (found and fixed != agreed):
            continue
        agreed = fixed
        found[rank] = shard
    return found


def _job(key: str, index: int, manifest: Manifest, owner: int, shards: Mapping[int, Shard]) -> Job | None:
    """How a rank gets a chunk; None if not all of it is offered."""
    entry = manifest.tensors[key]
    box = entry.boxes.box(index)
    replicas: dict[Shard, list[int]] = {}
    for rank, shard in shards.items():
        replicas.setdefault(shard, []).append(rank)
    parts: list[Part] = []
    for shard, ranks in replicas.items():
        # Replicas take turns, chunk by chunk; nobody gets from others what it has.
        source = owner if owner in ranks else ranks[(index + owner) % len(ranks)]
        group = Group(shard, (tuple(ranks),))
        for outer, _ in shard.boxes():
            both = outer.intersect(box)
            if not both.empty:
                parts.append(Part(both, group, (source,)))
    if sum(part.box.size for part in parts) != box.size:
        return None
    return Job(key, index, box, entry.dtype, owner, tuple(parts))
