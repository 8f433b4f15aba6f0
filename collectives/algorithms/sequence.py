"""Sequence-parallel attention as schedules: the words that all schemes share; see `attention_grid`.

Sizes are bytes. What a kernel does is said by its name, the text of a `Task` with the pieces that it works on; the
arithmetic is in `parallel.attention`. The same builders serve forward and backward: only the bytes of a row differ.

What a rank owns, of inputs and of results, stays in its tensors, and its kernels find it there. In the work buffer
TOKEN bytes stand for a piece of it, so that a schedule says who reads and writes it when; only what travels has room.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple, TypeAlias

TOKEN = 1
"""Bytes that stand for what lies in a rank's own tensors."""


class Piece(NamedTuple):
    """Rows `[start, stop)` of what a rank owns, which travel together in a round."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


class Attend(NamedTuple):
    """Kernel: queries of a piece against keys of another. `*_first`: its target is set, not added to; None: no target.

    Called with (query target, key target, queries, keys, query target, key target), each only if it is there and not
    empty, and a token for the rank's own; targets that are set for the first time are not read.
    """

    q: Piece
    kv: Piece
    q_first: bool | None
    kv_first: bool | None

    def __str__(self) -> str:
        flags = "".join(f" {name}{'=' if first else '+'}" for name, first in self.targets)
        return f"attend {name_of(self.q)} to {name_of(self.kv)}{flags}"

    @property
    def targets(self) -> list[tuple[str, bool]]:
        """Which sides have a target, and whether it is set."""
        both = (("q", self.q_first), ("kv", self.kv_first))
        return [(name, first) for name, first in both if first is not None]


class Merge(NamedTuple):
    """Kernel: a partial result of a piece into what is there. Called with (target, partial, target)."""

    side: str
    piece: Piece

    def __str__(self) -> str:
        return f"merge {self.side} {name_of(self.piece)}"


class Copy(NamedTuple):
    """Kernel: a piece of the rank's own, put where it can be sent from. Called with (target, token)."""

    piece: Piece
    side: str

    def __str__(self) -> str:
        return f"copy {self.side} {name_of(self.piece)}"


class Pack(NamedTuple):
    """Kernel: what came from the ranks of a group, put together by rows; called with (tokens..., parts...)."""

    side: str
    rank: int

    def __str__(self) -> str:
        return f"pack {self.side} {self.rank}"


class Unpack(NamedTuple):
    """Kernel: the reverse; called with (parts..., tokens...)."""

    side: str
    rank: int

    def __str__(self) -> str:
        return f"unpack {self.side} {self.rank}"


Task: TypeAlias = Attend | Merge | Copy | Pack | Unpack


@dataclass(frozen=True, slots=True)
class Side:
    """Queries, or keys and values: `pieces[owner][round]`, all owners with equally many, empty ones among them.

    `moved` and `result` are the bytes of a row of what travels, and of what comes of it (0: nothing).
    """

    name: str
    pieces: dict[int, tuple[Piece, ...]]
    moved: int
    result: int

    @property
    def rounds(self) -> int:
        """How many pieces each owner has."""
        return len(next(iter(self.pieces.values())))

    def room(self, row: int) -> int:
        """Bytes of the largest piece, with so many bytes a row."""
        return row * max(piece.rows for mine in self.pieces.values() for piece in mine)

    def token(self, piece: Piece, row: int) -> int:
        """What stands for a piece in its owner's tensors, if there is anything of it, with so many bytes a row."""
        return TOKEN if piece.rows * row else 0


Tokens: TypeAlias = dict[str, dict[int, tuple[int, ...]]]
"""By side and rank, the bytes of the tokens of its pieces by round."""


class TreeSizes(NamedTuple):
    """Bytes of all queries and of their result; of a row of keys and of its result (0: none)."""

    q: int
    result: int
    kv: int
    kv_result: int


Needed: TypeAlias = Callable[[Piece, Piece], bool]
"""(queries, keys): whether any of the queries attends to any of the keys."""


def colour(place: int, hop: int, stations: int) -> int:
    """A number of a place on a circle, as small as can be, that differs from those of the places `hop` further on.

    It tells apart the memory of what is at a rank at once: 0 or 1, and 2 at the seam of a circle of odd length.
    """
    circles = gcd(stations, hop)
    length = stations // circles
    at = place // circles * pow(hop // circles, -1, length) % length
    return 2 if length % 2 and at == length - 1 else at % 2


def name_of(piece: Piece) -> str:
    """The rows of a piece, for people and for names of kernels."""
    return f"{piece.owner}[{piece.start}:{piece.stop}]"
