"""Loading a saved step into tensors that are there already, whatever layouts they have: only what they need is read.

    state = {"model": model.state_dict(), "step": 0}
    load("runs/mine", state)                                                     # one process, the newest step
    load("runs/mine", state, {"model": Layout.by_axis(mesh, tp=Split(0))}, comm)  # on every rank, its shards

    state = load_state("runs/mine", step=120)                                    # new tensors, the whole state

Every chunk is proven by its digest before a byte of it is used. Nothing is written to before all ranks have found that
what they want is there, in a shape and dtype that fit.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgspec
import torch
from torch import Tensor

from checkpoint import holdings, nest, tensors
from checkpoint.codec import Bytes
from checkpoint.crew import Crew, crew_of, raise_told, tell
from checkpoint.filling import fill
from checkpoint.holdings import Layouts, Sharded
from checkpoint.manifest import Chunk
from checkpoint.peers import Offer, from_peers
from checkpoint.reader import BURST, Burst, Reader, bursts, inside
from checkpoint.store import Store, parse_reference
from collectives import rawbytes
from collectives.communicator import Communicator
from collectives.errors import OptionError, RingholdError, StorageFailed
from collectives.region import Region
from parallel.layout import Shard

_LEAST_MEMORY = 8 << 20
_SHARE = 5
"""A burst is so much less than the memory of a thread: beside it there are a chunk, its planes and their joint."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load.

    Args:
        memory: most bytes of a rank beside the tensors and the manifest, at chunks of usual size.
        threads: of each rank, to read, decode and prove; 0: up to four, if the rank is alone.
        strict: tensors or values that the checkpoint lacks, and those that nobody wants, are an error.
        cast: floats of another dtype are converted, rounding to nearest; else they are an error.

    Raises:
        OptionError: a value is out of range.

    """

    memory: int = 256 << 20
    threads: int = 0
    strict: bool = True
    cast: bool = False

    def __post_init__(self) -> None:
        if self.memory < _LEAST_MEMORY or self.threads < 0:
            raise OptionError(f"memory is at least {_LEAST_MEMORY} bytes, threads are 0 or more")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did on this rank."""

    step: int
    metadata: Mapping[str, Any]
    """What was kept with the step."""
    tensors: int
    """Filled here."""
    nbytes: int
    """Of these."""
    read: int
    """Bytes read of packs."""
    from_peers: int
    """Bytes of chunks that came from the memory of ranks, or were in this one's."""
    missing: tuple[str, ...]
    """Wanted and not there; nothing if it was strict."""
    unexpected: tuple[str, ...]
    """There and wanted by no rank; nothing if it was strict."""
    seconds: float


def load(
    path: str | os.PathLike[str],
    into: dict[str, Any],
    layouts: Layouts = None,
    comm: Communicator | None = None,
    *,
    step: int | None = None,
    peers: bool = False,
    offer: Offer | None = None,
    options: LoadOptions | None = None,
) -> LoadReport:
    """Fill a state in place from a step of a store. Every rank calls it; returns when all of them are done.

    Args:
        path: path or URL of the store, perhaps with `@STEP`; every rank must see the same one.
        into: nested dict of this rank's shards and plain values. Tensors are written to (views and leaves that require
            grad, too), plain values replaced. Ranks may want different keys.
        layouts: how the tensors lie now, see `Layouts`; the layouts by which they were saved do not matter.
        comm: the communicator; None: this process alone.
        step: which, that of rank 0; None: the newest, unless the path names one.
        peers: chunks that ranks still have in memory are taken from them, the rest from files; the same on all ranks.
        offer: with `peers`, what this rank still has of the step; None: nothing.
        options: how.

    Raises:
        LayoutMismatch: it lacks tensors, has others, or they are of another shape or dtype; on every rank, with all
            their names. Nothing was written to.
        NoCheckpoint, UnknownFormat, CorruptFile, StorageFailed: it is not there or cannot be read; on every rank.
        CorruptChunk: bytes are not what was saved; on every rank. Some tensors may be filled already.

    """
    return Loading(path, crew_of(comm), options or LoadOptions()).run(into, layouts, step, peers, offer)


def load_state(
    path: str | os.PathLike[str], *, step: int | None = None, options: LoadOptions | None = None
) -> dict[str, Any]:
    """Load a whole state into new tensors, in this process alone.

    Raises:
        StorageFailed: the state does not fit into memory.
        NoCheckpoint, UnknownFormat, CorruptFile, CorruptChunk: see `load`.

    """
    with Reader(path, step) as reader:
        try:
            new = {
                key: torch.empty(entry.shape, dtype=tensors.torch_dtype(entry.dtype))
                for key, entry in reader.tensors.items()
            }
        except (RuntimeError, MemoryError):
            raise StorageFailed(f"the state has {reader.manifest.nbytes} bytes, more than fits into memory") from None
        state: dict[str, Any] = reader.state(new.__getitem__)
        load(reader.store.url, state, step=reader.manifest.step, options=options)
        return state


class _Opening(msgspec.Struct, frozen=True):
    """What a rank tells first."""

    step: int
    keys: list[str]
    unused: tuple[str, ...]
    """Names of layouts that nothing here fits."""
    error: str


class _Misfits(msgspec.Struct, frozen=True):
    """What does not fit on a rank: names, and what is to be said of each."""

    missing: dict[str, str]
    mismatched: dict[str, str]
    error: str


class _Target(NamedTuple):
    """Where bytes of a chunk go: `box` of it, to `view`, which has the shape of the box."""

    chunk_box: Region
    box: Region
    dtype: str
    view: Tensor

    def put(self, raw: Bytes) -> None:
        """Fill it from the bytes of the chunk."""
        tensors.put(raw, self.dtype, self.chunk_box.shape, inside(self.box, self.chunk_box), self.view)


_Targets: TypeAlias = dict[tuple[str, int], list[_Target]]
"""By tensor and number of the chunk."""


class Loading:
    """One load of one rank; `load` without the choice of the crew."""

    def __init__(self, path: str | os.PathLike[str], crew: Crew, options: LoadOptions) -> None:
        self._started = time.perf_counter()
        self._path, self._named = parse_reference(os.fspath(path))
        self._crew, self._options = crew, options
        self._error: RingholdError | None = None

    def run(
        self,
        into: dict[str, Any],
        layouts: Layouts,
        step: int | None,
        peers: bool = False,
        offer: Offer | None = None,
    ) -> LoadReport:
        """All of it."""
        reader: Reader | None = None
        try:
            opening, wanted = self._open(into, layouts, step)
            heard = {
                rank: msgspec.json.decode(row, type=_Opening)
                for rank, row in self._crew.gather(msgspec.json.encode(opening)).items()
            }
            raise_told(self._error, {rank: one.error for rank, one in heard.items()}, "load")
            known = {key for one in heard.values() for key in one.keys}
            holdings.refuse_unused((name for one in heard.values() for name in one.unused), known)
            reader, shards, misfits = self._look(heard[min(heard)].step, wanted, layouts, into)
            told = {
                rank: msgspec.json.decode(row, type=_Misfits)
                for rank, row in self._crew.gather(msgspec.json.encode(misfits)).items()
            }
            raise_told(self._error, {rank: one.error for rank, one in told.items()}, "load")
            assert reader is not None, "a rank that cannot read it has said so"
            unexpected = tuple(key for key in reader.tensors if key not in known)
            self._judge(reader, told.values(), unexpected)
            targets = _all_targets(reader, wanted, shards)
            came = self._take(reader, targets, offer) if peers else 0
            read = self._fill(reader, wanted, shards, targets, into)
            return self._report(reader, shards, read, came, tuple(misfits.missing), unexpected)
        finally:
            if reader is not None:
                reader.close()

    def _open(self, into: dict[str, Any], layouts: Layouts, step: int | None) -> tuple[_Opening, dict[str, Tensor]]:
        """What this rank wants, and the step that it would choose; the first rank's holds."""
        number = -1
        wanted: dict[str, Tensor] = {}
        try:
            _, wanted = nest.take_apart(into, tensors.is_tensor)
            with Store(self._path) as store:
                number = store.choose(self._named if step is None else step)
        except RingholdError as error:
            self._error = error
        return _Opening(number, list(wanted), holdings.unused(layouts, wanted), tell(self._error)), wanted

    def _look(
        self, step: int, wanted: dict[str, Tensor], layouts: Layouts, into: dict[str, Any]
    ) -> tuple[Reader | None, dict[str, Shard], _Misfits]:
        """The shards of this rank, and what does not fit."""
        missing: dict[str, str] = {}
        mismatched: dict[str, str] = {}
        shards: dict[str, Shard] = {}
        reader: Reader | None = None
        try:
            reader = Reader(self._path, step)
            choose = holdings.chooser(layouts)
            for key, tensor in wanted.items():
                if key not in reader.tensors:
                    missing[key] = ""
                    continue
                try:
                    shards[key] = self._shard(reader, key, tensor, choose(key))
                except RingholdError as error:
                    mismatched[key] = str(error)
            missing |= dict.fromkeys(fill(into, reader.manifest.state, write=False), "")
        except RingholdError as error:
            self._error = error
        return reader, shards, _Misfits(missing, mismatched, tell(self._error))

    def _shard(self, reader: Reader, key: str, tensor: Tensor, chosen: Sharded | None) -> Shard:
        """What a tensor is to hold; raises what is to be said where it cannot."""
        entry = reader.tensors[key]
        name = tensors.dtype_of(key, tensor)
        if name != entry.dtype and not (self._options.cast and tensors.castable(entry.dtype, name)):
            hint = "; load with cast=True to convert" if tensors.castable(entry.dtype, name) else ""
            raise holdings.mismatched(f"{entry.dtype} in the checkpoint, {name} here{hint}")
        if not rawbytes.fillable(tensor):
            raise holdings.mismatched("several of its elements share one place in memory; give a copy")
        if chosen is None:
            shard = Shard.of(Region.whole(entry.shape))
        else:
            if chosen.shape is not None and chosen.shape != entry.shape:
                raise holdings.mismatched(f"shape {entry.shape} in the checkpoint, {chosen.shape} here")
            shard = chosen.layout.shard(entry.shape, self._crew.rank)
            if shard.partial:
                raise holdings.mismatched(f"layout {chosen.layout} is partial; load into a layout that is not")
        if not holdings.fits(tuple(tensor.shape), shard):
            whole = "" if chosen is None else f", of which {chosen.layout} gives rank {self._crew.rank} {shard.shape}"
            raise holdings.mismatched(f"shape {entry.shape} in the checkpoint{whole}, {tuple(tensor.shape)} here")
        return shard

    def _judge(self, reader: Reader, told: Iterable[_Misfits], unexpected: tuple[str, ...]) -> None:
        missing: dict[str, str] = {}
        mismatched: dict[str, str] = {}
        for one in told:
            missing |= one.missing
            mismatched |= one.mismatched
        strict = self._options.strict
        if mismatched or (strict and (missing or unexpected)):
            raise holdings.mismatch(
                f"step {reader.manifest.step} of {reader.store.url} is not what is to be filled",
                missing=missing if strict else {},
                unexpected=dict.fromkeys(unexpected, "") if strict else {},
                mismatched=mismatched,
            )

    def _take(self, reader: Reader, targets: _Targets, offer: Offer | None) -> int:
        """Fill from peers what they have, and take it out of the targets; bytes that came."""
        wants: dict[str, list[int]] = {}
        for key, index in targets:
            wants.setdefault(key, []).append(index)

        def accept(key: str, index: int, raw: Bytes) -> None:
            for target in targets.pop((key, index)):
                target.put(raw)

        return from_peers(self._crew, reader.manifest, offer, wants, self._options.memory // _SHARE, accept)

    def _fill(
        self,
        reader: Reader,
        wanted: dict[str, Tensor],
        shards: dict[str, Shard],
        targets: _Targets,
        into: dict[str, Any],
    ) -> int:
        """Bytes that were read."""
        read = 0
        try:
            read = self._read(reader, targets)
        except RingholdError as error:
            self._error = error
        for key in shards:
            tensors.changed(wanted[key])
        rows = self._crew.gather(tell(self._error).encode())
        raise_told(self._error, {rank: row.decode() for rank, row in rows.items()}, "load")
        fill(into, reader.manifest.state, write=True)
        return read

    def _read(self, reader: Reader, targets: _Targets) -> int:
        """Fill from files; bytes that were read."""
        by_chunk: dict[Chunk, list[_Target]] = defaultdict(list)
        for (key, index), several in targets.items():
            by_chunk[reader.manifest.chunks[reader.tensors[key].chunks[index]]] += several
        threads = self._options.threads or (min(4, os.cpu_count() or 1) if self._crew.size == 1 else 1)
        plan = bursts(list(by_chunk), min(BURST, self._options.memory // threads // _SHARE))

        def work(burst: Burst) -> None:
            for chunk, raw in reader.fetch(burst):
                for target in by_chunk[chunk]:
                    target.put(raw)

        if threads == 1:
            for burst in plan:
                work(burst)
        else:
            with ThreadPoolExecutor(threads, "ringhold-load") as pool:
                for _ in pool.map(work, plan):
                    pass
        return sum(burst.length for burst in plan)

    def _report(
        self,
        reader: Reader,
        shards: dict[str, Shard],
        read: int,
        came: int,
        missing: tuple[str, ...],
        unexpected: tuple[str, ...],
    ) -> LoadReport:
        entries = reader.tensors
        return LoadReport(
            step=reader.manifest.step,
            metadata=reader.manifest.metadata,
            tensors=len(shards),
            nbytes=sum(shard.size * tensors.torch_dtype(entries[key].dtype).itemsize for key, shard in shards.items()),
            read=read,
            from_peers=came,
            missing=missing,
            unexpected=unexpected,
            seconds=time.perf_counter() - self._started,
        )


def _all_targets(reader: Reader, wanted: dict[str, Tensor], shards: dict[str, Shard]) -> _Targets:
    """The chunks that the shards need, and where in their tensors each goes."""
    found: _Targets = defaultdict(list)
    for key, shard in shards.items():
        entry = reader.tensors[key]
        grid = entry.boxes
        for box, view in tensors.views(wanted[key], shard):
            for index in grid.touching(box):
                part = grid.box(index)
                both = part.intersect(box)
                found[key, index].append(_Target(part, both, entry.dtype, view[inside(both, box)]))
    return found
