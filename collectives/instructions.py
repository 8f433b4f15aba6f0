"""The instructions of a compiled program and the machine that they run on; see `program` and `engine`.

An instruction names memory by a `Where`: elements of one of three tensors. The compiler has seen to it that a range of
the work buffer is one range there.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives.errors import ProtocolError
from collectives.transports.base import DONE, Pending, Transport

CALLER, STAGING, SCRATCH = range(3)
"""The memories: the caller's tensor, which is only read; what the result is built in; and where that lands which is to
be reduced into something else."""

Kernel = Callable[..., object]
"""Called with views of what it writes and, behind them, of what it reads; in place: with one view."""
Reduction = Callable[[Tensor, Tensor, Tensor], object]
Probe = Callable[[str], None]


class Where(NamedTuple):
    """Elements `[start, stop)` of one of the memories."""

    memory: int
    start: int
    stop: int


NOWHERE = Where(STAGING, 0, 0)


class Machine:
    """The state of one run: the memory, the transport, and what is in flight."""

    def __init__(
        self,
        transport: Transport,
        channel: int,
        source: Tensor,
        staging: Tensor,
        scratch: Tensor,
        reduction: Reduction,
        kernels: Mapping[str, Kernel],
        probe: Probe | None,
    ) -> None:
        self.transport = transport
        self.channel = channel
        self.reduction = reduction
        self.kernels = kernels
        self.probe = probe
        self.receiving: dict[int, Pending] = {}
        self.sending: dict[int, Pending] = {}
        self.borrowed: list[Pending] = []
        self._borrowed: dict[Where, Tensor] = {}
        self._memories = (source, staging, scratch)
        self._item = staging.element_size()
        self._bytes: list[memoryview | None] = [None, None, None]

    def tensor(self, where: Where) -> Tensor:
        """The elements there."""
        if self._borrowed and (borrowed := self._borrowed.pop(where, None)) is not None:
            return borrowed
        memory, start, stop = where
        return self._memories[memory][start:stop]

    def bytes(self, where: Where) -> memoryview:
        """The bytes there; not of a caller's tensor that has another dtype than staging."""
        memory, start, stop = where
        view = self._bytes[memory]
        if view is None:
            view = self._bytes[memory] = _bytes(self._memories[memory])
        return view[start * self._item : stop * self._item]

    def borrow(self, number: int, where: Where) -> None:
        """Take what a receive brings in place of `where`, the next time that is looked at."""
        pending = self.receiving.pop(number)
        found = pending.borrow()
        if found is not None:
            self._borrowed[where] = found
            self.borrowed.append(pending)

    def passed(self, point: str) -> None:
        """Call the probe, if there is one."""
        if self.probe is not None:
            self.probe(point)


class Instruction(Protocol):
    """One action of a program."""

    def run(self, machine: Machine) -> None:
        """Do it. TransportLost passes through."""


class Lift(NamedTuple):
    """Copy a range of the caller's tensor into staging, converting the dtype if need be."""

    source: Where
    into: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.tensor(self.into).copy_(machine.tensor(self.source))


class PostReceive(NamedTuple):
    """Make the memory of a receive known to the transport."""

    number: int
    peer: int
    into: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        into = machine.tensor(self.into)
        machine.receiving[self.number] = machine.transport.recv(self.peer, into, machine.channel)


class AwaitReceive(NamedTuple):
    """Wait until the receive of this number has arrived."""

    number: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.receiving.pop(self.number).wait()
        machine.passed("transfer")


class BorrowReceive(NamedTuple):
    """Wait until what is to be reduced has arrived, or can be read where its owner has it."""

    number: int
    into: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.borrow(self.number, self.into)
        machine.passed("transfer")


class TakeNote(NamedTuple):
    """Receive a range that came as a note. An empty range: just wait for the note."""

    peer: int
    into: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.transport.recv_note_into(self.peer, machine.bytes(self.into), machine.channel)
        machine.passed("transfer")


class TakePack(NamedTuple):
    """Receive several ranges that came as one note."""

    peer: int
    into: tuple[Where, ...]

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        note = memoryview(machine.transport.recv_note(self.peer, machine.channel))
        parts = [machine.bytes(where) for where in self.into]
        due = sum(map(len, parts))
        if len(note) != due:
            raise ProtocolError(f"rank {self.peer} sent {len(note)} bytes packed where {due} were due")
        for part in parts:
            part[:], note = note[: len(part)], note[len(part) :]
        machine.passed("transfer")


class PostSend(NamedTuple):
    """Hand the data of the send of this number to the transport."""

    number: int
    peer: int
    data: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        data = machine.tensor(self.data)
        machine.sending[self.number] = machine.transport.send(self.peer, data, machine.channel)


class Lend(NamedTuple):
    """Let the transport know of data that nothing overwrites before the operation is confirmed."""

    peer: int
    data: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.transport.lend(self.peer, machine.tensor(self.data), machine.channel)


class AwaitSend(NamedTuple):
    """Wait until the memory of the send of this number may be written again."""

    number: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.sending.pop(self.number).wait()


class PostNote(NamedTuple):
    """Hand the data of the send of this number to the transport as a note."""

    number: int
    peer: int
    data: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        data = machine.bytes(self.data)
        machine.sending[self.number] = machine.transport.post_note(self.peer, data, machine.channel)


class PostPack(NamedTuple):
    """Send several ranges, as the send of this number, in one note."""

    number: int
    peer: int
    data: tuple[Where, ...]

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        note = b"".join(machine.bytes(where) for where in self.data)
        machine.transport.send_note(self.peer, note, machine.channel)
        machine.sending[self.number] = DONE


class Notify(NamedTuple):
    """Send an empty note."""

    peer: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.transport.send_note(self.peer, b"", machine.channel)


class Fold(NamedTuple):
    """Reduce what was received with what is here, into staging.

    One of the operands lies in scratch memory and the other in staging; or one in staging, where the data landed, and
    the other in the caller's tensor. The value of the lower rank is always the first operand, so that both ends of an
    exchange compute the same bits even where the operation does not commute to the bit (payloads of NaNs, the sign of
    zero in a minimum).
    """

    first: Where
    second: Where
    into: Where

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.reduction(machine.tensor(self.first), machine.tensor(self.second), machine.tensor(self.into))
        machine.passed("reduce")


class RunKernel(NamedTuple):
    """Run a kernel on a range of staging, in place, or on further ranges that it writes and others that it reads."""

    kernel: str
    on: Where
    writes: tuple[Where, ...] = ()
    reads: tuple[Where, ...] = ()

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.kernels[self.kernel](*map(machine.tensor, (self.on, *self.writes, *self.reads)))


def _bytes(tensor: Tensor) -> memoryview:
    view: npt.NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return view.data
