"""Runs a rank's part of a schedule over a transport: the inside of every collective.

Called by the communicator, once for each attempt of an operation; many lanes may run at once. The engine knows nothing
of membership: where the transport gives up, TransportLost passes through, the memory in flight stays referenced by the
transport, and whatever was taken from the pool comes back when the transport has let go of it.
"""

import threading
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from collectives.cutting import Cutting
from collectives.instructions import Kernel, Machine, Probe
from collectives.program import Program, compile_program
from collectives.reduction import ReduceOp, function
from collectives.schedule import Schedule
from collectives.staging import StagingPool
from collectives.transports.base import Transport

SEGMENT_BYTES = 2**20
"""Of bulk transfers. Smaller segments pay more for gloo's rendezvous (256 KiB: +25% time), larger ones leave the cache
between arrival and reduction (4 MiB: +20%)."""
NOTE_BYTES = 2**19
"""Of transfers that go as notes. 256 KiB costs 10% more on two ranks, 1 MiB nothing on four, 2% on two."""
PACK_BYTES = 2**14
"""Of transfers that share a note with others. Larger ones gain less by one note fewer than they lose by the copies."""
WINDOW = 4
"""Receives posted ahead. Two are 5% slower over gloo, eight no faster. Transports without rendezvous do not care."""
PROBES = ("begin", "transfer", "reduce", "end")
"""The points at which `probe` is called: before anything is received, after each segment that arrived, after each
segment that was reduced, and when all is staged and nothing in flight."""

_NOTHING = torch.empty(0)
_NO_KERNELS: Mapping[str, Kernel] = {}


_Key = tuple[int, int, int, int, bool, bool, bool]


class Engine:
    """Compiles schedules, keeps the programs, and runs them. For any thread.

    Args:
        pool: where scratch memory comes from.
        segment_bytes, note_bytes, window: cut and order of transfers. The same on all members.

    """

    def __init__(
        self,
        pool: StagingPool,
        segment_bytes: int = SEGMENT_BYTES,
        window: int = WINDOW,
        note_bytes: int = NOTE_BYTES,
    ) -> None:
        self._pool = pool
        self._segment_bytes = segment_bytes
        self._window = window
        self._note_bytes = note_bytes
        self._lock = threading.Lock()
        self._programs: WeakKeyDictionary[Schedule, dict[_Key, Program]] = WeakKeyDictionary()

    def run(
        self,
        schedule: Schedule,
        transport: Transport,
        channel: int,
        source: Tensor,
        staging: Tensor,
        op: ReduceOp = ReduceOp.SUM,
        kernels: Mapping[str, Kernel] = _NO_KERNELS,
        probe: Probe | None = None,
        lift: bool = True,
        agree: Callable[[], None] | None = None,
    ) -> None:
        """Run this rank's part; afterwards `Program.pieces` are the ranges `schedule.wanted(rank)` of the result.

        Args:
            schedule: for `transport.size` ranks.
            transport: of the epoch; all its members run the same schedule on the same channel.
            channel: the lane's.
            source: flat, contiguous: the elements of the ranges `schedule.held(rank)`, in order. Never written.
            staging: flat, contiguous, `Program.footprint` elements or more; what it held is lost. Of the same dtype as
                `source` on all ranks, or of a wider one on all ranks, in which all is moved and reduced.
            op: how to combine.
            kernels: by name, what the schedule's computations do to a piece of staging, in place.
            probe: called with a name of PROBES at that point; what it raises passes through.
            lift: if False, wanted ranges that never leave the caller's tensor (all of a broadcast's root, the own chunk
                of an all-gather) are not copied to staging.

            agree: called when all is sent that needs nothing of a peer, before anything of a peer is used. Over a
                transport whose receivers do not fetch the data themselves that is before anything is sent.

        Raises:
            TransportLost: a link failed or the epoch was aborted. The content of `staging` is undefined then, and it
                may still be written to until the transport is closed.
            ProtocolError: a peer sent inline data of another size: it runs another schedule.
            UsageError: the schedule reads data that are nowhere.

        """
        program = self.program(schedule, transport, source.dtype, staging.dtype, lift)
        machine = Machine(
            transport,
            channel,
            source.detach(),
            staging,
            self._pool.take(program.scratch, staging.dtype) if program.scratch else _NOTHING,
            function(op),
            kernels,
            probe,
        )
        opening = program.opening if transport.lends else 0
        for instruction in program.instructions[:opening]:
            instruction.run(machine)
        if agree is not None:
            agree()
        if probe is not None:
            probe("begin")
        for instruction in program.instructions[opening:]:
            instruction.run(machine)
        for pending in machine.borrowed:
            pending.verify()
        if probe is not None:
            probe("end")

    def program(
        self, schedule: Schedule, transport: Transport, source: torch.dtype, staging: torch.dtype, lift: bool = True
    ) -> Program:
        """Compile this rank's part, once: how much staging it needs and where its result will be; see `run`.

        Raises:
            UsageError: the schedule reads data that are nowhere.

        """
        size, convert = staging.itemsize, source != staging
        segment = transport.segment_bytes or self._segment_bytes
        key = (transport.rank, size, transport.inline_limit, segment, transport.lends, convert, lift)
        programs = self._programs.get(schedule)
        program = programs.get(key) if programs is not None else None
        if program is None:
            cutting = Cutting(
                segment=segment // size,
                inline=transport.inline_limit // size,
                note=min(self._note_bytes, segment) // size,
                window=self._window,
                convert=convert,
                lift=lift,
                pack=min(PACK_BYTES, transport.inline_limit, self._note_bytes) // size,
                lend=transport.lends,
            )
            program = compile_program(schedule, transport.rank, cutting)
            with self._lock:
                self._programs.setdefault(schedule, {})[key] = program
        return program
