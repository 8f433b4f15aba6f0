"""What the competitors of a benchmark work on: one memory for all of them, its content, and the right results.

Values are small integers whatever the type, so that every reduction in every order is exact and results are compared
bit by bit. The pattern depends on rank, place and turn: a result that mixes ranks up, comes a turn late, or was never
written, is wrong in most of its elements.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from launch.bench_kinds import DTYPES, elements
from launch.bench_request import Request

Empty = Callable[..., Tensor]
"""Makes an uninitialized tensor from its sizes and `dtype`, as torch.empty does."""
_POISON = 77
_PERIOD = 1021
"""A prime: a shift by a part or a segment never looks like no shift at all."""
_LARGEST_VALUE = 3


class Case:
    """The memory of one rank for one operation on one lane.

    `given` is the input of the out-of-place form; `taken` is the preallocated output of that form, and in the in-place
    form the buffer that is input and output at once. Rows of a kind with parts are ranks: shapes are (count,) or
    (ranks, count / ranks).
    """

    def __init__(self, request: Request, size: int, ranks: int, empty: Empty = torch.empty) -> None:
        self.kind = request.what
        self.op = request.op if self.kind.reduces else ""
        self.root = request.root
        name, item = DTYPES[request.dtype]
        self.dtype: torch.dtype = getattr(torch, name)
        self.ranks = ranks
        self.count = elements(self.kind, size, item, ranks, request.lanes)
        self.each = self.count // ranks if self.kind.parts else self.count
        self.given = empty(*self._shape(whole=self.kind.name not in ("all_gather", "gather")), dtype=self.dtype)
        self.taken = empty(*self._shape(whole=self.kind.name not in ("reduce_scatter", "scatter")), dtype=self.dtype)

    def reset(self) -> None:
        """Fill all with ones, before a timed turn: sums of sums must not grow for ever."""
        self.given.fill_(1)
        self.taken.fill_(1)

    def load(self, rank: int, turn: int, inplace: bool) -> None:
        """Fill in what `rank` contributes in this turn; outputs get what no result is."""
        self.given.fill_(_POISON)
        self.taken.fill_(_POISON)
        place = self.spot(rank) if inplace else self.given
        place.copy_(self._pattern(rank, turn).view(place.shape))

    def spot(self, rank: int) -> Tensor:
        """Where the input of the in-place form is: the own row of an all-gather's output, else all of `taken`."""
        return self.taken[rank] if self.kind.name == "all_gather" else self.taken

    def wrong(self, result: Tensor | None, rank: int, turn: int) -> int:
        """Count the elements of `rank`'s result that are not what they should be; a missing result is all wrong."""
        right = self._result(rank, turn)
        if right is None:
            return 0
        if result is None or result.numel() != right.numel():
            return right.numel()
        return int((result.detach().reshape(-1) != right.reshape(-1)).sum())

    def _shape(self, whole: bool) -> tuple[int, ...]:
        if not self.kind.parts:
            return (self.count,)
        return (self.ranks, self.each) if whole else (self.each,)

    def _pattern(self, rank: int, turn: int) -> Tensor:
        """Return the contribution of `rank`: values 0 to 3, or 1 and 2 for products, whose range is small."""
        places = torch.arange(self.given.numel(), dtype=torch.int32)
        values = (places % _PERIOD + 3 * rank + 5 * turn + places // _PERIOD) % (_LARGEST_VALUE + 1)
        return (values % 2 + 1 if self.op == "prod" else values).to(self.dtype)

    def _result(self, rank: int, turn: int) -> Tensor | None:
        match self.kind.name:
            case "all_reduce":
                return self._reduced(turn)
            case "reduce":
                return self._reduced(turn) if rank == self.root else None
            case "reduce_scatter":
                return self._reduced(turn).view(self.ranks, self.each)[rank]
            case "all_gather":
                return torch.cat([self._pattern(source, turn) for source in range(self.ranks)])
            case "gather" if rank == self.root:
                return torch.cat([self._pattern(source, turn) for source in range(self.ranks)])
            case "scatter":
                return self._pattern(self.root, turn).view(self.ranks, self.each)[rank]
            case "all_to_all":
                rows = [self._pattern(source, turn).view(self.ranks, self.each)[rank] for source in range(self.ranks)]
                return torch.cat(rows)
            case "broadcast":
                return self._pattern(self.root, turn)
        return None

    def _reduced(self, turn: int) -> Tensor:
        """Reduce in the way of the definition: exact in a wide type, rounded at the end (only avg ever rounds)."""
        wide = torch.float64 if self.dtype.is_floating_point else torch.int64
        total = self._pattern(0, turn).to(wide)
        for rank in range(1, self.ranks):
            theirs = self._pattern(rank, turn).to(wide)
            match self.op:
                case "sum" | "avg":
                    total += theirs
                case "prod":
                    total *= theirs
                case "min":
                    torch.minimum(total, theirs, out=total)
                case "max":
                    torch.maximum(total, theirs, out=total)
        if self.op == "avg":
            work = torch.float32 if self.dtype.itemsize < 4 else self.dtype
            return (total.to(work) / self.ranks).to(self.dtype)
        return total.to(self.dtype)
