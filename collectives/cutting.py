"""How the transfers of a step are cut into segments, or put together in notes; both ends of a link do it alike.

Called by `plan`. What a rank finds for its sends to a peer is what the peer finds for its receives: it follows from the
rows of the schedule between the two, in their order, and from the `Cutting`, which is the same on all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Generic, NamedTuple, TypeVar

from collectives.region import Range
from collectives.schedule import Compute, Recv, Send

GRAIN = 1024
"""Segments are cut at multiples of so many elements, so that vector instructions find them aligned."""

Row = TypeVar("Row", Send, Recv)


class Cutting(NamedTuple):
    """What the compiler needs to know besides schedule and rank; the same on all ranks but for `lift`."""

    segment: int
    """Transfers are cut into segments of about this many elements."""
    inline: int
    """A transfer of up to this many elements goes as notes."""
    note: int
    """Elements of such a note, about."""
    window: int
    """Receives that are posted ahead."""
    convert: bool
    """Staging has another dtype than the caller's tensor."""
    lift: bool
    """Copy wanted ranges that never leave the caller's tensor into staging as well."""
    pack: int = 0
    """Transfers of up to this many elements in one step between two ranks share a note; no more than `inline`."""
    lend: bool = False
    """Nobody waits for a send that nothing overwrites."""


@dataclass(slots=True)
class Message(Generic[Row]):
    """What goes between two ranks at once: a segment of a row, or several whole rows; `numbers` are theirs."""

    peer: int
    inline: bool
    rows: list[Row]
    numbers: list[int]


def messages(rows: tuple[Row, ...], cutting: Cutting) -> list[Message[Row]]:
    """What the rows of a step are cut into, or put together to; both ends of a transfer find the same."""
    made: list[Message[Row]] = []
    taking: dict[int, tuple[Message[Row], int]] = {}  # by peer, a note that takes more rows, and its size
    for number, row in enumerate(rows):
        size = row.stop - row.start
        small = 0 < size <= cutting.pack
        note, filled = taking.pop(row.peer, (None, 0))
        if small and note is not None and filled + size <= cutting.note:
            note.rows.append(row)
            note.numbers.append(number)
            taking[row.peer] = note, filled + size
            continue
        for start, stop, inline in segments(row, cutting):
            made.append(Message(row.peer, inline, [row._replace(start=start, stop=stop)], [number]))
        if small:
            taking[row.peer] = made[-1], size
    return made


def segments(row: Send | Recv | Compute, cutting: Cutting) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, inline) of the segments of a transfer."""
    if row.start == row.stop:
        yield row.start, row.stop, True
        return
    inline = row.stop - row.start <= cutting.inline
    for start, stop in pieces(row.start, row.stop, cutting.note if inline else cutting.segment):
        yield start, stop, inline


def arranged(recvs: tuple[Recv, ...], cutting: Cutting) -> tuple[list[Message[Recv]], bool]:
    """The messages of a step in the order in which they are dealt with, and whether no two ranges overlap.

    From one peer they come row by row. Several peers take turns, so that what they bring is sent on evenly, and
    what all bring to the same range is reduced while it is in the caches; but where ranges overlap in part it is
    row by row throughout, because reductions happen in the order of rows.
    """
    made = messages(recvs, cutting)
    spans = sorted((recv.start, recv.stop) for recv in recvs if recv.start < recv.stop)
    overlap = any(first[1] > second[0] for first, second in pairwise(spans))
    alike = len(set(spans)) == 1 and len({recv.peer for recv in recvs}) == len(recvs)
    if overlap and not alike:
        return made, False
    by_peer: dict[int, list[Message[Recv]]] = {}
    for message in made:
        by_peer.setdefault(message.peer, []).append(message)
    turns = [message for turn in zip_longest(*by_peer.values()) for message in turn if message is not None]
    return turns, not overlap


def pieces(start: int, stop: int, size: int) -> Iterator[Range]:
    """Cut [start, stop) into pieces of about `size`, as even as the grain allows."""
    parts = max(1, round((stop - start) / size))
    step = -(-(stop - start) // (parts * GRAIN)) * GRAIN
    for low in range(start, stop, step):
        yield low, min(low + step, stop)
