"""Chunks that lie on several ranks: their pieces sent to whoever is to have them, and put together there.

`checkpoint.saving` brings chunks to their writers by it, `checkpoint.peers` to ranks that load them.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from checkpoint import tensors
from checkpoint.assignment import Job
from checkpoint.codec import Bytes
from checkpoint.crew import Crew
from checkpoint.dtypes import ITEMSIZE
from checkpoint.reader import inside

Came: TypeAlias = dict[tuple[int, int], Bytes]
"""Pieces of a chunk that other ranks sent: by rank, and by the identity of the part."""


def trade(crew: Crew, jobs: list[Job], data: tensors.LocalBytes) -> Iterator[tuple[Job, Came]]:
    """Move what some chunks lack, in one exchange of all ranks; those of this rank, with what came for each.

    Every rank calls it with the same jobs, before it looks at what is returned.

    Raises:
        MemberLost: on every rank that is left, if one was lost.

    """
    outgoing: dict[int, list[Bytes]] = {}
    for job in jobs:
        for source, part, _ in job.parcels():
            if source == crew.rank:
                outgoing.setdefault(job.owner, []).append(data.read(job.key, part.box).reshape(-1))
    incoming = crew.trade({owner: np.concatenate(several) for owner, several in outgoing.items()})
    return _mine(crew.rank, jobs, incoming)


def _mine(rank: int, jobs: list[Job], incoming: dict[int, Bytes]) -> Iterator[tuple[Job, Came]]:
    at = dict.fromkeys(incoming, 0)
    for job in jobs:
        if job.owner == rank:
            came: Came = {}
            for source, part, nbytes in job.parcels():
                piece = incoming[source][at[source] : at[source] + nbytes]
                came[source, id(part)] = piece.reshape(*part.box.shape, ITEMSIZE[job.dtype])
                at[source] += nbytes
            yield job, came


def put_together(job: Job, data: tensors.LocalBytes, came: Came, flat: Bytes) -> Bytes:
    """The bytes of a chunk, from what is here and what came; in `flat` unless they lie somewhere in one run."""
    if len(job.parts) == 1 and not job.parts[0].group.ops and job.local:
        value = data.read(job.key, job.box)
        if value.flags.c_contiguous:
            return value.reshape(-1)
    out = flat.reshape(*job.box.shape, ITEMSIZE[job.dtype])
    for part in job.parts:
        terms = [
            data.read(job.key, part.box) if source == job.owner else came[source, id(part)] for source in part.sources
        ]
        value = terms[0]
        if part.group.ops:
            value = tensors.reduce(terms, job.dtype, part.group.ops, part.group.extents)
        out[inside(part.box, job.box)] = value
    return flat


def rounds(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """Cut jobs, in order, into rounds in which no rank sends or gets more than `most` bytes (one job may)."""
    some: list[Job] = []
    load: dict[tuple[str, int], int] = {}
    for job in jobs:
        adds: dict[tuple[str, int], int] = {}
        for source, _, nbytes in job.parcels():
            for place in (("from", source), ("to", job.owner)):
                adds[place] = adds.get(place, 0) + nbytes
        if some and any(load.get(place, 0) + nbytes > most for place, nbytes in adds.items()):
            yield some
            some, load = [], {}
        some.append(job)
        for place, nbytes in adds.items():
            load[place] = load.get(place, 0) + nbytes
    if some:
        yield some
