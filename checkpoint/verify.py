"""Proving a store: every byte of every chunk by its digest, every manifest by its own. For `ringhold ckpt verify`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np

from checkpoint.manifest import Chunk, Manifest
from checkpoint.packs import MAGIC, read_chunk, verified
from checkpoint.reader import Burst, bursts
from checkpoint.store import Store, pack_name
from collectives.errors import RingholdError

_Place: TypeAlias = tuple[str, Chunk]


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as it was written."""

    where: str
    """A step or a pack."""
    what: str
    tensors: tuple[str, ...] = ()
    """Those that cannot be loaded, as STEP/KEY."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found."""

    steps: tuple[int, ...]
    chunks: int
    read: int
    """Bytes."""
    damages: tuple[Damage, ...]


def verify(
    store: Store, steps: list[int], threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Read all chunks of some steps, each once.

    Args:
        store: where.
        steps: numbers of steps that are there.
        threads: how many read and decode.
        progress: called with bytes read so far and in all, from any thread.

    """
    damages: list[Damage] = []
    users: dict[_Place, dict[str, None]] = {}
    for step in steps:
        try:
            manifest = store.manifest(step)
        except RingholdError as error:
            damages.append(Damage(f"step {step}", str(error)))
            continue
        places = [_place(manifest, chunk) for chunk in manifest.chunks]
        for place in places:
            users.setdefault(place, {})
        for key, entry in manifest.tensors.items():
            for index in entry.chunks:
                users[places[index]][f"{step}/{key}"] = None
    by_pack: dict[str, list[Chunk]] = {}
    for pack, chunk in users:
        by_pack.setdefault(pack, []).append(chunk)
    work = [(pack, burst) for pack, chunks in by_pack.items() for burst in bursts(chunks)]
    total, read = sum(burst.length for _, burst in work), 0

    def prove(item: tuple[str, Burst]) -> list[Damage]:
        pack, burst = item
        return [Damage(pack, why, tuple(users[pack, chunk])) for chunk, why in _damaged(store, pack, burst)]

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for (_, burst), found in zip(work, pool.map(prove, work), strict=True):
            damages += found
            read += burst.length
            if progress is not None:
                progress(read, total)
    for pack in by_pack:
        if (why := _bad_head(store, pack)) is not None:
            damages.append(Damage(pack, why))
    return VerifyReport(tuple(steps), len(users), read, tuple(damages))


def _place(manifest: Manifest, chunk: Chunk) -> _Place:
    """A chunk by the name of its pack, for the numbers of packs are those of one manifest."""
    return manifest.packs[chunk.pack], msgspec.structs.replace(chunk, pack=0)


def _damaged(store: Store, pack: str, burst: Burst) -> list[tuple[Chunk, str]]:
    """The chunks of a burst that are not as they were written, and what is wrong."""
    stored = np.empty(burst.length, dtype=np.uint8)
    found: list[tuple[Chunk, str]] = []
    try:
        store.storage.read_into(pack_name(pack), burst.offset, stored)
        whole = True
    except RingholdError:
        whole = False  # find out by single chunks which of them are there
    for chunk in burst.chunks:
        at = chunk.offset - burst.offset
        try:
            if whole:
                verified(stored[at : at + chunk.length], pack, chunk, store.url)
            else:
                read_chunk(store.storage, pack, chunk)
        except RingholdError as error:
            found.append((chunk, str(error)))
    return found


def _bad_head(store: Store, pack: str) -> str | None:
    head = np.empty(len(MAGIC), dtype=np.uint8)
    try:
        store.storage.read_into(pack_name(pack), 0, head)
    except RingholdError:
        return None  # its chunks have told it
    return None if head.tobytes() == MAGIC else f"{store.url}/{pack_name(pack)} does not begin like a pack"
