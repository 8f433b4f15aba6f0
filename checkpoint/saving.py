"""Saving a state that is spread over ranks, as it is spread: every rank writes chunks, the manifest comes last.

    save("runs/mine", {"model": model.state_dict(), "step": 120}, step=120)                       # one process
    save("runs/mine", state, {"model": Layout.by_axis(mesh, tp=Split(0))}, comm, step=120)         # on every rank

The protocol, all decisions pure functions of what was gathered:

1. Everybody tells what it holds, and proposes a name; that of the first rank holds. The whole is put together.
2. `assign` says who writes which chunk. Chunks that lie on several ranks are sent to their writer, in rounds.
3. Everybody closes its pack, then tells which chunks it wrote, and where. If a rank was lost, 2 again with those left,
   for the chunks that are missing; if nobody has what is missing, `MemberLost` on all.
4. The first rank publishes the manifest and tells so. If it was lost before that, the next one does.

So the manifest appears when every writer has confirmed that its pack is on the disk, and a step is there whole or not
at all.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from checkpoint import holdings, nest, tensors
from checkpoint.assignment import Job, assign
from checkpoint.codec import Bytes, Codec
from checkpoint.crew import Crew, crew_of, raise_told, tell
from checkpoint.dtypes import ITEMSIZE
from checkpoint.exchange import Came, put_together, rounds, trade
from checkpoint.grid import Grid
from checkpoint.holdings import Holding, Layouts, Whole
from checkpoint.leases import Held
from checkpoint.manifest import Manifest, TensorEntry
from checkpoint.packs import PackWriter, Piece, Placed, Written
from checkpoint.store import Store, new_save_name, pack_name
from checkpoint.writer import BATCH, Table, begin
from collectives.communicator import Communicator
from collectives.errors import (
    CoordinatorUnreachable,
    Evicted,
    MemberLost,
    OperationTimeout,
    OptionError,
    QuorumLost,
    RingholdError,
    StorageFailed,
    UsageError,
)

OUT_OF_THE_RUN = (Evicted, QuorumLost, CoordinatorUnreachable, OperationTimeout)
"""What one rank raises by itself, while the others go on."""


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How to save.

    Args:
        level: of zstd, 1 to 22, on the byte planes that shrink; 0: store everything raw.
        threads: of each rank, to hash and encode; 0: up to four, if the rank is alone.
        round_bytes: most bytes that a rank sends or gets at a time for chunks that lie on several.

    Raises:
        OptionError: a value is out of range.

    """

    level: int = 1
    threads: int = 0
    round_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        Codec(self.level)
        if self.threads < 0 or self.round_bytes < 1:
            raise OptionError("threads are 0 or more, round_bytes 1 or more")


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did."""

    step: int
    url: str
    tensors: int
    nbytes: int
    """Raw bytes of all tensors."""
    written: Written
    """By all ranks that were there at the end."""
    mine: Written
    """By this rank."""
    lost: tuple[int, ...]
    """Ranks that were lost while it ran."""
    seconds: float


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    layouts: Layouts = None,
    comm: Communicator | None = None,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    options: SaveOptions | None = None,
) -> SaveReport:
    """Save a state as a step of a store. Every rank calls it; returns when the step is there, on the disk.

    Args:
        path: folder or URL of the store; made if it is not there. Every rank must see the same one.
        state: nested dict of this rank's shards (tensors on the CPU) and plain values, see `checkpoint.nest`. Ranks may
            have different keys (the layers of a pipeline stage, say); what several have must be equal.
        layouts: how the tensors lie, see `Layouts`. A rank of a mesh is a rank of the communicator. Values of `Partial`
            layouts are reduced on the way.
        comm: the communicator, whose main lane is used; None: this process alone.
        step: number of the step, that of rank 0; None: one more than the newest. One that is there is replaced.
        metadata: JSON values to keep in the manifest, those of rank 0.
        options: how.

    Chunks that the newest step of the store has already are not written again. Nothing of the state may change until
    this returns.

    Raises:
        UsageError: something in the state cannot be kept, or a whole shape is not to be known.
        LayoutMismatch: ranks contradict each other, or a shard does not fit its layout; on every rank.
        StorageFailed: a rank cannot write; on every rank. Earlier steps are untouched, nothing new is to be seen.
        MemberLost: a rank was lost and with it something that no other holds; on every rank that is left.

    """
    chosen = options or SaveOptions()
    crew = crew_of(comm)
    with Store(path) as store:
        return Saving(store, crew, chosen).run(state, layouts, step, metadata or {})


class _Opening(msgspec.Struct, frozen=True):
    """What a rank tells first."""

    holding: Holding | None
    error: str
    name: str
    step: int
    metadata: dict[str, Any]


class _Report(msgspec.Struct, frozen=True):
    """What a rank tells when its pack is closed: where its chunks are, by tensor and number; or why it could not."""

    placed: list[tuple[str, int, Placed]]
    written: Written
    error: str


@dataclass(slots=True)
class _Progress:
    """What is known of the save, equal on all ranks after each gather."""

    alive: tuple[int, ...]
    done: dict[tuple[str, int], Placed] = field(default_factory=dict)
    extra: list[Placed] = field(default_factory=list)
    written: dict[int, Written] = field(default_factory=dict)


class Saving:
    """One save of one rank; `save` without the choice of store and crew."""

    def __init__(self, store: Store, crew: Crew, options: SaveOptions) -> None:
        self._started = time.perf_counter()
        self._store, self._crew, self._options = store, crew, options
        self._packs: list[str] = []
        self._mine: list[tuple[str, int, Placed]] = []
        self._written = Written()
        self._error: RingholdError | None = None
        self._told = False
        """Whether others may know of our packs."""
        self._lease: Held | None = None
        self._batch: Bytes | None = None

    def run(
        self, state: Mapping[str, Any], layouts: Layouts, step: int | None, metadata: Mapping[str, Any]
    ) -> SaveReport:
        """All of it; see the head of the module."""
        opening, local = self._open(state, layouts, step, metadata)
        heard = self._tell_opening(opening)
        first = heard[min(heard)]
        held = {rank: one.holding for rank, one in heard.items() if one.holding is not None}
        wholes = holdings.merge(held)
        nested = holdings.merge_states({rank: holding.state for rank, holding in held.items()})
        progress = _Progress(tuple(held))
        try:
            self._write(first, wholes, local, progress)
            manifest = self._manifest(first, wholes, nested, progress)
            self._packs.clear()  # from now on a manifest may name them, even if its writer sees an error
            self._publish(manifest, progress)
        except BaseException as error:
            if self._came_to_nothing(error):
                self._clean()
            raise
        finally:
            if self._lease is not None:
                self._lease.release()
        return self._report(manifest, progress)

    def _open(
        self, state: Mapping[str, Any], layouts: Layouts, step: int | None, metadata: Mapping[str, Any]
    ) -> tuple[_Opening, dict[str, Tensor]]:
        """What this rank holds; an error of this rank is told to all, so that none of them waits."""
        local: dict[str, Tensor] = {}
        holding, number = None, -1
        try:
            packed, local = nest.take_apart(dict(state), tensors.is_tensor)
            described = {key: (tensors.dtype_of(key, one), tuple(one.shape)) for key, one in local.items()}
            # That of the lowest rank counts: rank 0's, unless it is lost before it can tell.
            number = next(reversed(self._store.steps()), -1) + 1 if step is None else step
            holding = holdings.describe(packed, described, layouts)
        except RingholdError as error:
            self._error = error
        return _Opening(holding, tell(self._error), new_save_name(max(number, 0)), number, dict(metadata)), local

    def _tell_opening(self, opening: _Opening) -> dict[int, _Opening]:
        try:
            data = msgspec.json.encode(opening)
        except (TypeError, ValueError, RecursionError) as error:
            self._error = UsageError(f"metadata of a checkpoint are JSON values: {error}")
            data = msgspec.json.encode(_Opening(None, tell(self._error), "", -1, {}))
        rows = self._crew.gather(data)
        heard = {rank: msgspec.json.decode(row, type=_Opening) for rank, row in rows.items()}
        raise_told(self._error, {rank: one.error for rank, one in heard.items()}, "save")
        return heard

    def _write(self, first: _Opening, wholes: dict[str, Whole], local: dict[str, Tensor], progress: _Progress) -> None:
        """Steps 2 and 3: until every chunk is in a pack on the disk."""
        grids = {key: Grid.of(whole.shape, ITEMSIZE[whole.dtype]) for key, whole in wholes.items()}
        shards = {key: wholes[key].shards[self._crew.rank] for key in local}
        known = self._begin(first)
        attempt = 0
        while True:
            plan = assign(wholes, grids, progress.alive, progress.done)
            if plan.lost:
                raise self._lost(wholes, plan.lost, progress)
            data = tensors.LocalBytes(local, shards)
            pack = f"{first.name}-{self._crew.rank}{f'r{attempt}' if attempt else ''}.pack"
            loss = self._run(plan.jobs, data, pack, known)
            before = progress.alive
            self._confirm(progress)
            if len(progress.done) == sum(grid.count for grid in grids.values()):
                return
            if progress.alive == before:
                raise loss or StorageFailed("a rank confirmed less than it was to write; save again")
            attempt += 1

    def _begin(self, first: _Opening) -> dict[str, Placed]:
        """Take the lease of this rank, and see what the store has; an error is told when the packs are confirmed."""
        try:
            begun = begin(self._store, first.step, str(self._crew.rank), first.name)
        except RingholdError as error:
            self._error = error
            return {}
        self._lease = begun.lease
        return begun.known

    def _run(
        self, jobs: tuple[Job, ...], data: tensors.LocalBytes, pack: str, known: dict[str, Placed]
    ) -> MemberLost | None:
        """This rank's part of the jobs: what it has alone, then the rounds. The loss that ended it early, if any."""
        threads = self._options.threads or (min(4, os.cpu_count() or 1) if self._crew.size == 1 else 1)
        writer = PackWriter(self._store.storage, pack, Codec(self._options.level), known, threads)
        self._packs.append(pack)
        rank = self._crew.rank
        loss = None
        self._add(writer, data, ((job, {}) for job in jobs if job.owner == rank and job.local))
        try:
            for some in rounds([job for job in jobs if not job.local], self._options.round_bytes):
                self._add(writer, data, trade(self._crew, some, data))  # also if this rank cannot write
        except MemberLost as error:
            loss = error
        try:
            if self._error is None:
                writer.close()
                self._written = self._written.plus(writer.written)
            else:
                writer.abandon()
        except RingholdError as error:
            self._error = error
        return loss

    def _add(self, writer: PackWriter, data: tensors.LocalBytes, chunks: Iterable[tuple[Job, Came]]) -> None:
        """Write chunks, some MiB at a time. Once this rank has failed, nothing more is written."""
        waiting: list[tuple[Job, Bytes]] = []
        used = 0
        try:
            for job, came in chunks:
                if self._error is not None:
                    return
                if used + job.nbytes > BATCH:
                    self._flush(writer, waiting)
                    waiting, used = [], 0
                waiting.append((job, put_together(job, data, came, self._room(used, job.nbytes))))
                used += job.nbytes
            if self._error is None:
                self._flush(writer, waiting)
        except RingholdError as error:
            self._error = error

    def _room(self, start: int, size: int) -> Bytes:
        """Memory for a chunk; the same for every batch, so that its pages are made once."""
        if self._batch is None:
            self._batch = np.empty(BATCH, dtype=np.uint8)
        return self._batch[start : start + size] if start + size <= BATCH else np.empty(size, dtype=np.uint8)

    def _flush(self, writer: PackWriter, waiting: list[tuple[Job, Bytes]]) -> None:
        placed = writer.add([Piece(raw, job.dtype) for job, raw in waiting])
        self._mine += [(job.key, job.index, where) for (job, _), where in zip(waiting, placed, strict=True)]

    def _confirm(self, progress: _Progress) -> None:
        """Step 3: everybody hears what is on the disk."""
        error = tell(self._error)
        self._told = True
        rows = self._crew.gather(msgspec.msgpack.encode(_Report([] if error else self._mine, self._written, error)))
        reports = {rank: msgspec.msgpack.decode(row, type=_Report) for rank, row in rows.items()}
        raise_told(self._error, {rank: report.error for rank, report in reports.items()}, "save")
        progress.alive = tuple(reports)
        progress.done = {(key, index): where for report in reports.values() for key, index, where in report.placed}
        progress.extra = [where for report in reports.values() for *_, where in report.placed]
        progress.written = {rank: report.written for rank, report in reports.items()}

    def _manifest(
        self, first: _Opening, wholes: Mapping[str, Whole], state: nest.Json, progress: _Progress
    ) -> Manifest:
        table = Table()
        layouts: dict[Any, int] = {}
        entries: dict[str, TensorEntry] = {}
        for key, whole in wholes.items():
            grid = Grid.of(whole.shape, ITEMSIZE[whole.dtype])
            chunks = tuple(table.number(progress.done[key, index]) for index in range(grid.count))
            noted = layouts.setdefault(whole.layout, len(layouts))
            entries[key] = TensorEntry(whole.dtype, whole.shape, grid.cuts, chunks, noted)
        for placed in progress.extra:  # equal chunks of two writers: both are in packs, so both are to be proven
            table.number(placed)
        return table.manifest(first.step, state, entries, list(layouts), first.metadata)

    def _publish(self, manifest: Manifest, progress: _Progress) -> None:
        """Step 4: until a rank that is alive says that it did it."""
        while True:
            publisher = min(progress.alive)
            if publisher == self._crew.rank:
                try:
                    self._store.publish(manifest)
                except RingholdError as error:
                    self._error = error
            rows = self._crew.gather(tell(self._error).encode())
            progress.alive = tuple(rows)
            raise_told(self._error, {rank: row.decode() for rank, row in rows.items()}, "save")
            if publisher in rows:
                return

    def _lost(self, wholes: Mapping[str, Whole], keys: tuple[str, ...], progress: _Progress) -> MemberLost:
        gone = tuple(sorted({rank for key in keys for rank in wholes[key].layout.mesh.ranks} - set(progress.alive)))
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if keys[8:] else "")
        return MemberLost(
            f"ranks {list(gone)} were lost while saving, and with them parts of {shown} that nobody else holds; "
            f"the step was not saved, earlier ones are whole: recover the state and save again",
            gone,
            progress.alive,
        )

    def _came_to_nothing(self, error: BaseException) -> bool:
        """Whether no manifest can name this rank's packs: nobody knows of them, or every rank ends with this error.

        A rank that is out of the run (evicted, interrupted) has told the others what it wrote, and they publish it.
        """
        if not self._told or self._crew.size == 1:
            return True
        return isinstance(error, RingholdError) and not isinstance(error, OUT_OF_THE_RUN)

    def _clean(self) -> None:
        """Remove this rank's packs of a save that came to nothing; what cannot be removed is left to gc."""
        for pack in self._packs:
            try:
                self._store.storage.remove(pack_name(pack))
            except RingholdError:
                continue

    def _report(self, manifest: Manifest, progress: _Progress) -> SaveReport:
        total = Written()
        for written in progress.written.values():
            total = total.plus(written)
        return SaveReport(
            step=manifest.step,
            url=self._store.url,
            tensors=len(manifest.tensors),
            nbytes=manifest.nbytes,
            written=total,
            mine=self._written,
            lost=tuple(rank for rank in range(self._crew.size) if rank not in progress.alive),
            seconds=time.perf_counter() - self._started,
        )
