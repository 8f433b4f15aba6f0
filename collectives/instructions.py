"""The instructions of a compiled program and the machine that they run on; see `program` and `engine`.

Ranges are elements of the work buffer. `offset` is where the range begins in the caller's tensor, or NONE if the data
are in staging. `slot` names a piece of scratch memory, or NONE if the data land in staging.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives.transports.base import Pending, Transport

NONE = -1

Kernel = Callable[[Tensor], object]
Reduction = Callable[[Tensor, Tensor, Tensor], object]
Probe = Callable[[str], None]


class Machine:
    """The state of one run: the memory, the transport, and what is in flight."""

    def __init__(
        self,
        transport: Transport,
        channel: int,
        source: Tensor,
        staging: Tensor,
        scratch: Tensor,
        slot_size: int,
        reduction: Reduction,
        kernels: Mapping[str, Kernel],
        probe: Probe | None,
    ) -> None:
        self.transport = transport
        self.channel = channel
        self.source = source
        self.staging = staging
        self.reduction = reduction
        self.kernels = kernels
        self.probe = probe
        self.receiving: dict[int, Pending] = {}
        self.sending: dict[int, Pending] = {}
        self._scratch = scratch
        self._slot_size = slot_size
        self._item = staging.element_size()
        self._source_bytes = _bytes(source) if source.dtype == staging.dtype else memoryview(b"")
        self._staging_bytes = _bytes(staging)
        self._scratch_bytes = _bytes(scratch) if scratch.numel() else memoryview(b"")

    def data(self, start: int, stop: int, offset: int) -> Tensor:
        """Where the range can be read."""
        if offset == NONE:
            return self.staging[start:stop]
        return self.source[offset : offset + stop - start]

    def landing(self, start: int, stop: int, slot: int) -> Tensor:
        """Where the range is received."""
        if slot == NONE:
            return self.staging[start:stop]
        first = slot * self._slot_size
        return self._scratch[first : first + stop - start]

    def data_bytes(self, start: int, stop: int, offset: int) -> memoryview:
        """`data` as bytes."""
        if offset == NONE:
            return self._staging_bytes[start * self._item : stop * self._item]
        return self._source_bytes[offset * self._item : (offset + stop - start) * self._item]

    def landing_bytes(self, start: int, stop: int, slot: int) -> memoryview:
        """`landing` as bytes."""
        if slot == NONE:
            return self._staging_bytes[start * self._item : stop * self._item]
        first = slot * self._slot_size
        return self._scratch_bytes[first * self._item : (first + stop - start) * self._item]


class Instruction(Protocol):
    """One action of a program."""

    def run(self, machine: Machine) -> None:
        """Do it. TransportLost passes through."""


class Lift(NamedTuple):
    """Copy a range of the caller's tensor into staging, converting the dtype if need be."""

    start: int
    stop: int
    offset: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.staging[self.start : self.stop].copy_(machine.data(self.start, self.stop, self.offset))


class PostReceive(NamedTuple):
    """Make the memory of a receive known to the transport."""

    number: int
    peer: int
    start: int
    stop: int
    slot: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        into = machine.landing(self.start, self.stop, self.slot)
        machine.receiving[self.number] = machine.transport.recv(self.peer, into, machine.channel)


class AwaitReceive(NamedTuple):
    """Wait until the receive of this number has arrived."""

    number: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.receiving.pop(self.number).wait()
        if machine.probe is not None:
            machine.probe("transfer")


class TakeNote(NamedTuple):
    """Receive a range that came as a note. An empty range: just wait for the note."""

    peer: int
    start: int
    stop: int
    slot: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        into = machine.landing_bytes(self.start, self.stop, self.slot)
        machine.transport.recv_note_into(self.peer, into, machine.channel)
        if machine.probe is not None:
            machine.probe("transfer")


class PostSend(NamedTuple):
    """Hand the data of the send of this number to the transport."""

    number: int
    peer: int
    start: int
    stop: int
    offset: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        data = machine.data(self.start, self.stop, self.offset)
        machine.sending[self.number] = machine.transport.send(self.peer, data, machine.channel)


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
    start: int
    stop: int
    offset: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        data = machine.data_bytes(self.start, self.stop, self.offset)
        machine.sending[self.number] = machine.transport.post_note(self.peer, data, machine.channel)


class Notify(NamedTuple):
    """Send an empty note."""

    peer: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.transport.send_note(self.peer, b"", machine.channel)


class Fold(NamedTuple):
    """Reduce what was received with what is here, into staging.

    With a slot: scratch with staging. With an offset: staging, where the data landed, with the caller's tensor.
    The value of the lower rank is always the first operand, so that both ends of an exchange compute the same bits even
    where the operation does not commute to the bit (payloads of NaNs, the sign of zero in a minimum).
    """

    start: int
    stop: int
    slot: int
    offset: int
    theirs_first: bool

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        target = machine.staging[self.start : self.stop]
        theirs = machine.landing(self.start, self.stop, self.slot)
        mine = machine.data(self.start, self.stop, self.offset)
        if self.theirs_first:
            machine.reduction(theirs, mine, target)
        else:
            machine.reduction(mine, theirs, target)
        if machine.probe is not None:
            machine.probe("reduce")


class RunKernel(NamedTuple):
    """Run a kernel on a range of staging, in place."""

    kernel: str
    start: int
    stop: int

    def run(self, machine: Machine) -> None:
        """See Instruction."""
        machine.kernels[self.kernel](machine.staging[self.start : self.stop])


def _bytes(tensor: Tensor) -> memoryview:
    view: npt.NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return view.data
