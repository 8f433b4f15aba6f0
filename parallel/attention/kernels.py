"""What a rank gives to a schedule of attention, what the schedule's kernels compute, and what the rank gets of it.

Called by `api`, once for each direction. The work buffer is bytes; `Binder` knows which tensors lie in a region, and
which of the rank's own a token stands for.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor

from collectives.algorithms.sequence import Attend, Copy, Merge, Pack, Piece, Task, Unpack
from parallel.attention.layout import Field, Heads, Layout, Segment, fields, heads_of
from parallel.attention.local import attend, gradients
from parallel.attention.merge import merge
from parallel.attention.shares import Tile, tiles

Kernel = Callable[..., object]


class Binder:
    """One rank's part of a layout: its tensors, and kernels that work on these and on what travels.

    Args:
        layout: what is done.
        rank: by whom.

    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.kernels: dict[str, Kernel] = {name: self._kernel(task) for name, task in layout.tasks.items()}
        self._own: dict[str, list[Tensor]] = {"q": [], "kv": []}
        """(B, H, rows, width) each: what tokens stand for. Where heads are exchanged, the rows of the whole group."""
        self._found: dict[str, list[Tensor]] = {"q": [], "kv": []}
        """What becomes of these, of `partial_dtype`."""

    # --- the caller's tensors ---

    def source(self, q: Sequence[Tensor], kv: Sequence[Tensor]) -> Tensor:
        """Take what this rank has; it must not change before the end. Returns the bytes that it holds at the start.

        Args:
            q: (q,), or for the backward pass (q, grad_out, out, lse); (B, Hq, rows, D), lse (B, Hq, rows).
            kv: (k, v), (B, Hkv, rows, D).

        """
        given = {"q": [_wide(tensor) for tensor in q], "kv": [_wide(tensor) for tensor in kv]}
        batch, at = self.layout.problem.batch, 0
        line = torch.zeros(sum(stop - start for start, stop in self.layout.schedule.held(self.rank)), dtype=torch.uint8)
        if self.layout.problem.head_ranks == 1:
            self._own = given
            self._found = {side: self._made("out " + side, given[side][0].shape[2]) for side in ("q", "kv")}
            return line
        for key in self.layout.held[self.rank]:
            side, heads = self._exchanged(key)
            known, rows = self._fields(side, heads), given[side][0].shape[2]
            size = _size(known, batch, rows)
            chosen = slice(*(heads.q if side == "q" else heads.kv))
            _put(line[at : at + size], known, batch, rows, [tensor[:, chosen] for tensor in given[side]])
            at += size
        return line

    def results(self, line: Tensor) -> list[Tensor]:
        """What came of it: (out, lse), or the gradients of q, k and v; shapes as given to `source`, `partial_dtype`.

        Args:
            line: the bytes that this rank wanted.

        """
        problem = self.layout.problem
        found = self._found
        self._own, self._found = {}, {}  # the kernels refer to this object, which lives until it is collected
        if problem.scheme == "tree":
            known, rows = self._fields("out q", self._mine()), problem.queries[0].rows
            size = _size(known, problem.batch, rows)
            found = {"q": _views(line[:size], known, problem.batch, rows), "kv": found["kv"]}
        elif problem.head_ranks > 1:
            found = self._returned(line)
        flat = [*found["q"], *found["kv"]]
        return flat if self.layout.backward else [flat[0], flat[1].squeeze(-1)]

    def _returned(self, line: Tensor) -> dict[str, list[Tensor]]:
        """Results that came from whoever had the heads; gradients of a head of keys from all who used it."""
        batch, at = self.layout.problem.batch, 0
        shares = {"q": self.layout.problem.queries, "kv": self.layout.problem.keys}
        everything = Heads((0, self.layout.problem.heads), (0, self.layout.problem.kv_heads))
        found = {
            side: [tensor.zero_() for tensor in self._made("out " + side, mine[self.rank].rows, everything)]
            for side, mine in shares.items()
        }
        for key in self.layout.wanted[self.rank]:
            side, heads = self._exchanged(key)
            known, rows = self._fields("out " + side, heads), shares[side][self.rank].rows
            size = _size(known, batch, rows)
            chosen = slice(*(heads.q if side == "q" else heads.kv))
            for target, tensor in zip(found[side], _views(line[at : at + size], known, batch, rows), strict=True):
                target[:, chosen] += tensor
            at += size
        return found

    def _exchanged(self, key: Hashable) -> tuple[str, Heads]:
        """The side of a region that is exchanged within a group, and its heads."""
        name, *place = cast(tuple[Any, ...], key)
        return str(name).split()[-1], heads_of(self.layout.problem, place[1])

    def _made(self, side: str, rows: int, heads: Heads | None = None) -> list[Tensor]:
        """New tensors of a side for so many rows."""
        batch = self.layout.problem.batch
        return [
            torch.empty((batch, field.heads, rows, field.width), dtype=field.dtype)
            for field in self._fields(side, heads or self._mine())
            for _ in range(field.copies)
        ]

    def _fields(self, side: str, heads: Heads) -> tuple[Field, ...]:
        return fields(self.layout.problem, self.layout.backward, side, heads)

    def _at_home(self, side: str, piece: Piece) -> bool:
        """Whether the result of a piece lies in this rank's tensors; in a tree it is of all ranks."""
        return piece.owner == self.rank and not (side == "q" and self.layout.problem.scheme == "tree")

    def _data(self, side: str, piece: Piece, line: Tensor) -> list[Tensor]:
        """The tensors of a piece: this rank's own, or what came from another."""
        if piece.owner == self.rank and piece.rows:
            return [tensor[:, :, piece.start : piece.stop] for tensor in self._own[side]]
        return _views(line, self._fields(side, self._mine()), self.layout.problem.batch, piece.rows)

    def _target(self, side: str, piece: Piece, line: Tensor) -> "_Opened":
        """The results of a piece, to be written."""
        if self._at_home(side, piece):
            return _Opened([tensor[:, :, piece.start : piece.stop] for tensor in self._found[side]])
        return _Opened.of(line, self._fields("out " + side, self._mine()), self.layout.problem.batch, piece.rows)

    # --- the kernels ---

    def _kernel(self, task: Task) -> Kernel:
        match task:
            case Attend():
                return partial(self._attend, task)
            case Merge():
                return partial(self._merge, task)
            case Copy():
                return partial(self._copy, task)
            case Pack():
                return partial(self._pack, task)
            case Unpack():
                return partial(self._unpack, task)

    def _mine(self) -> Heads:
        return heads_of(self.layout.problem, self.rank)

    def _attend(self, task: Attend, *views: Tensor) -> None:
        problem, left = self.layout.problem, list(views)
        targets = {
            name: self._target(name, task.q if name == "q" else task.kv, left.pop(0)) for name, _ in task.targets
        }
        data = {}
        for name, piece in (("q", task.q), ("kv", task.kv)):
            empty = not _size(self._fields(name, self._mine()), problem.batch, piece.rows)
            data[name] = self._data(name, piece, _NOTHING if empty else left.pop(0))
        if self.layout.backward:
            self._backward(task, data, {name: target.tensors for name, target in targets.items()})
        else:
            self._forward(task, data, targets["q"].tensors)
        for target in targets.values():
            target.close()

    def _tiles(self, task: Attend) -> list[Tile]:
        (q, kv), layout = task[:2], self.layout
        found = tiles(
            layout.queries[q.owner], q.start, q.stop, layout.keys[kv.owner], kv.start, kv.stop, layout.problem.causal
        )
        return list(found)

    def _forward(self, task: Attend, data: dict[str, list[Tensor]], found: list[Tensor]) -> None:
        (q,), (k, v), (out, lse) = data["q"], map(self._expanded, data["kv"]), found
        scale = self.layout.problem.scale
        attend(q, k, v, self._tiles(task), scale, out, lse.squeeze(-1), task.q_first is True)

    def _backward(self, task: Attend, data: dict[str, list[Tensor]], targets: dict[str, list[Tensor]]) -> None:
        for name, first in task.targets:
            if first:
                for target in targets[name]:
                    target.zero_()
        (q, grad_out, out, lse), (k, v) = data["q"], map(self._expanded, data["kv"])
        found, index = targets.get("kv", []), self._index()
        wide = found
        if found and index is not None:
            wide = [tensor.new_zeros(k.shape) for tensor in found]
        grad_q = targets["q"][0] if "q" in targets else None
        grad_k, grad_v = wide or (None, None)
        scale = self.layout.problem.scale
        gradients(q, k, v, grad_out, out, lse.squeeze(-1), self._tiles(task), scale, grad_q, grad_k, grad_v)
        if index is not None:
            for target, tensor in zip(found, wide, strict=True):
                target.index_add_(1, index, tensor)

    def _index(self) -> Tensor | None:
        """Which head of keys each head of queries uses, where that is not as even as flash attention takes it."""
        problem, heads = self.layout.problem, self._mine()
        group = problem.heads // problem.kv_heads
        q, kv = heads.counts
        index = [head // group - heads.kv[0] for head in range(*heads.q)]
        if not q or (q % kv == 0 and index == [head // (q // kv) for head in range(q)]):
            return None
        return torch.tensor(index)

    def _expanded(self, tensor: Tensor) -> Tensor:
        index = self._index()
        return tensor if index is None else tensor.index_select(1, index)

    def _merge(self, task: Merge, home: Tensor, other: Tensor, _before: Tensor) -> None:
        known = self._fields("out " + task.side, self._mine())
        target = self._target(task.side, task.piece, home)
        found = _views(other, known, self.layout.problem.batch, task.piece.rows)
        if self.layout.backward:
            for mine, theirs in zip(target.tensors, found, strict=True):
                mine.add_(theirs)
        else:
            out, lse = target.tensors
            merge(out, lse.squeeze(-1), found[0], found[1].squeeze(-1))
        target.close()

    def _copy(self, task: Copy, target: Tensor, _token: Tensor) -> None:
        known, piece = self._fields(task.side, self._mine()), task.piece
        _put(target, known, self.layout.problem.batch, piece.rows, self._data(task.side, piece, _NOTHING))

    # --- heads that are exchanged ---

    def _pack(self, task: Pack, *views: Tensor) -> None:
        """Put the rows of a group together, and make room for what becomes of them."""
        rows = (self.layout.queries if task.side == "q" else self.layout.keys)[self.rank].rows
        self._own[task.side] = self._made(task.side, rows)
        self._found[task.side] = self._made("out " + task.side, rows)
        parts = views[sum(1 for piece in self.layout.pieces[task.side][self.rank] if piece.rows) :]
        for own, theirs in self._parts(task.side, task.side, parts, self._own[task.side]):
            own.copy_(theirs)

    def _unpack(self, task: Unpack, *views: Tensor) -> None:
        """Take results of the rows of a group apart, and forget them."""
        for own, theirs in self._parts(task.side, "out " + task.side, views, self._found[task.side]):
            theirs.copy_(own)
        self._own[task.side], self._found[task.side] = [], []

    def _parts(
        self, side: str, region: str, views: Sequence[Tensor], own: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of a group's tensors, beside the same rows in the regions of its members."""
        batch, known, left = self.layout.problem.batch, self._fields(region, self._mine()), list(views)
        segments: tuple[Segment, ...] = self.layout.segments[self.rank][0 if side == "q" else 1]
        for member in dict.fromkeys(segment.rank for segment in segments):
            its = [segment for segment in segments if segment.rank == member]
            rows = sum(segment.stop - segment.start for segment in its)
            part = _Opened.of(left.pop(0) if _size(known, batch, rows) else _NOTHING, known, batch, rows)
            for segment in its:
                at = slice(segment.at, segment.at + segment.stop - segment.start)
                for ours, theirs in zip(own, part.tensors, strict=True):
                    yield ours[:, :, at], theirs[:, :, segment.start : segment.stop]
            part.close()


_NOTHING = torch.empty(0, dtype=torch.uint8)


class _Opened:
    """Tensors that are written: views, or where a region lies askew, copies that `close` writes back."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._back: Callable[[], None] | None = None

    @classmethod
    def of(cls, line: Tensor, known: tuple[Field, ...], batch: int, rows: int) -> Self:
        """Open a region."""
        made = cls(_views(line, known, batch, rows))
        memory = line.untyped_storage().data_ptr()
        if any(tensor.numel() and tensor.untyped_storage().data_ptr() != memory for tensor in made.tensors):
            made._back = partial(_put, line, known, batch, rows, made.tensors)
        return made

    def close(self) -> None:
        """Write back what is not there yet."""
        if self._back is not None:
            self._back()


def _views(line: Tensor, known: tuple[Field, ...], batch: int, rows: int) -> list[Tensor]:
    """The tensors in a region, (batch, heads, rows, width); copied only where they lie askew."""
    found: list[Tensor] = []
    at = 0
    for copies, heads, width, dtype in known:
        size = copies * batch * heads * rows * width * dtype.itemsize
        part = line[at : at + size]
        if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
            part = part.clone()
        found += part.view(dtype).view(copies, batch, heads, rows, width)
        at += size
    return found


def _put(line: Tensor, known: tuple[Field, ...], batch: int, rows: int, tensors: Sequence[Tensor]) -> None:
    """Write tensors to a region."""
    at, left = 0, list(tensors)
    for copies, heads, width, dtype in known:
        for _ in range(copies):
            tensor, size = left.pop(0), batch * heads * rows * width * dtype.itemsize
            part = line[at : at + size]
            if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
                part.copy_(tensor.to(dtype).contiguous().view(-1).view(torch.uint8))
            else:
                part.view(dtype).view(batch, heads, rows, width).copy_(tensor)
            at += size


def _size(known: tuple[Field, ...], batch: int, rows: int) -> int:
    return sum(field.copies * batch * field.heads * rows * field.width * field.dtype.itemsize for field in known)


def _wide(tensor: Tensor) -> Tensor:
    """Four dimensions, the last of them dense, as flash attention takes it."""
    wide = tensor if tensor.dim() == 4 else tensor.unsqueeze(-1)
    return wide if wide.stride(-1) == 1 or wide.shape[-1] == 1 else wide.contiguous()
