"""What a rank gives to a schedule of attention, what the schedule's kernels compute, and what the rank gets of it.

Called by `api`, once for each direction. The work buffer is bytes; `Binder` knows which tensors lie in a region.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from collectives.algorithms.sequence import Attend, Copy, Merge, Pack, Task, Unpack
from parallel.attention.layout import Field, Heads, Layout, Segment, fields, heads_of
from parallel.attention.local import attend, gradients
from parallel.attention.merge import merge
from parallel.attention.shares import Tile, tiles

Kernel = Callable[..., object]


class Binder:
    """One rank's part of a layout.

    Args:
        layout: what is done.
        rank: by whom.

    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.kernels: dict[str, Kernel] = {name: self._kernel(task) for name, task in layout.tasks.items()}

    # --- the caller's tensors ---

    def source(self, q: Sequence[Tensor], kv: Sequence[Tensor]) -> Tensor:
        """What this rank holds, as bytes.

        Args:
            q: (q,), or for the backward pass (q, grad_out, out, lse); (B, Hq, rows, D), lse (B, Hq, rows).
            kv: (k, v), (B, Hkv, rows, D).

        """
        batch, at = self.layout.problem.batch, 0
        line = torch.empty(sum(stop - start for start, stop in self.layout.schedule.held(self.rank)), dtype=torch.uint8)
        for key in self.layout.held[self.rank]:
            side, heads, start, stop = self._rows(key)
            known = self._fields(side, heads)
            size = _size(known, batch, stop - start)
            given = _sliced(q if side == "q" else kv, heads.q if side == "q" else heads.kv, start, stop)
            _put(line[at : at + size], known, batch, stop - start, _stacked(given, known))
            at += size
        return line

    def results(self, line: Tensor, q: Sequence[Tensor], kv: Sequence[Tensor]) -> None:
        """Add what came of it to tensors of `partial_dtype` that are zero.

        Args:
            line: the bytes that this rank wanted.
            q: (out, lse), or (grad_q,). kv: (), or (grad_k, grad_v). Shapes as those of `source`.

        """
        at, batch = 0, self.layout.problem.batch
        for key in self.layout.wanted[self.rank]:
            side, heads, start, stop = self._rows(key)
            known = self._fields("out " + side, heads)
            size = _size(known, batch, stop - start)
            found = _flattened(_views(line[at : at + size], known, batch, stop - start))
            targets = _sliced(q if side == "q" else kv, heads.q if side == "q" else heads.kv, start, stop)
            for target, tensor in zip(targets, found, strict=True):
                target.add_(tensor.view(target.shape))
            at += size

    def _rows(self, key: Hashable) -> tuple[str, Heads, int, int]:
        """Which of this rank's rows and heads a region holds."""
        name, *place = cast(tuple[Any, ...], key)
        problem = self.layout.problem
        everything = Heads((0, problem.heads), (0, problem.kv_heads))
        side = str(name).split()[-1]
        if name == "found":
            return "q", everything, 0, problem.queries[0].rows
        shares = problem.queries if side == "q" else problem.keys
        if name.startswith(("in", "back")):
            return side, heads_of(problem, place[1]), 0, shares[self.rank].rows
        if problem.scheme == "tree":
            return side, everything, 0, shares[self.rank].rows
        piece = self.layout.pieces[side][self.rank][place[1]]
        return side, everything, piece.start, piece.stop

    def _fields(self, side: str, heads: Heads) -> tuple[Field, ...]:
        return fields(self.layout.problem, self.layout.backward, side, heads)

    # --- the kernels ---

    def _kernel(self, task: Task) -> Kernel:
        match task:
            case Attend():
                return partial(self._attend, task)
            case Merge():
                return partial(self._merge, task)
            case Copy():
                return _copy
            case Pack():
                return partial(self._pack, task)
            case Unpack():
                return partial(self._unpack, task)

    def _mine(self) -> Heads:
        return heads_of(self.layout.problem, self.rank)

    def _attend(self, task: Attend, *views: Tensor) -> None:
        problem, heads = self.layout.problem, self._mine()
        batch, left = problem.batch, list(views)
        targets: dict[str, _Opened] = {}
        for name, _ in task.targets:
            rows = (task.q if name == "q" else task.kv).rows
            targets[name] = _Opened(left.pop(0), self._fields("out " + name, heads), batch, rows)
        data = {}
        for name, piece in (("q", task.q), ("kv", task.kv)):
            known = self._fields(name, heads)
            empty = not _size(known, batch, piece.rows)
            data[name] = _views(_NOTHING if empty else left.pop(0), known, batch, piece.rows)
        if self.layout.backward:
            self._backward(task, data, targets)
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
        (q,), (k, v) = data["q"][0], data["kv"][0]
        out, lse = found[0][0], found[1][0].squeeze(-1)
        attend(
            q,
            self._expanded(k),
            self._expanded(v),
            self._tiles(task),
            self.layout.problem.scale,
            out,
            lse,
            task.q_first is True,
        )

    def _backward(self, task: Attend, data: dict[str, list[Tensor]], targets: dict[str, "_Opened"]) -> None:
        for name, first in task.targets:
            if first:
                targets[name].tensors[0].zero_()
        (q, grad_out, out), lse = data["q"][0], data["q"][1][0].squeeze(-1)
        k, v = data["kv"][0]
        grad_q = targets["q"].tensors[0][0] if "q" in targets else None
        grad_kv = targets["kv"].tensors[0] if "kv" in targets else None
        index = self._index()
        wide = grad_kv
        if grad_kv is not None and index is not None:
            wide = grad_kv.new_zeros((2, grad_kv.shape[1], len(index), *grad_kv.shape[3:]))
        grad_k, grad_v = (None, None) if wide is None else (wide[0], wide[1])
        gradients(
            q,
            self._expanded(k),
            self._expanded(v),
            grad_out,
            out,
            lse,
            self._tiles(task),
            self.layout.problem.scale,
            grad_q,
            grad_k,
            grad_v,
        )
        if grad_kv is not None and wide is not None and index is not None:
            grad_kv.index_add_(2, index, wide)

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
        batch, known = self.layout.problem.batch, self._fields("out " + task.side, self._mine())
        target = _Opened(home, known, batch, task.piece.rows)
        found = _views(other, known, batch, task.piece.rows)
        if self.layout.backward:
            target.tensors[0] += found[0]
        else:
            out, lse = target.tensors
            merge(out, lse.squeeze(-1), found[0], found[1].squeeze(-1))
        target.close()

    def _pack(self, task: Pack, *views: Tensor) -> None:
        """Put the rows of a group together."""
        self._regroup(task.side, task.side, views, packing=True)

    def _unpack(self, task: Unpack, *views: Tensor) -> None:
        """Take results of the rows of a group apart."""
        self._regroup(task.side, "out " + task.side, views, packing=False)

    def _regroup(self, side: str, region: str, views: Sequence[Tensor], packing: bool) -> None:
        batch, known, left = self.layout.problem.batch, self._fields(region, self._mine()), list(views)
        segments: tuple[Segment, ...] = self.layout.segments[self.rank][0 if side == "q" else 1]
        members = list(dict.fromkeys(segment.rank for segment in segments))
        rows = {member: sum(s.stop - s.start for s in segments if s.rank == member) for member in members}
        pieces = self.layout.pieces[side][self.rank]

        def taken(counts: Sequence[int]) -> list["_Opened"]:
            return [
                _Opened(left.pop(0) if _size(known, batch, count) else _NOTHING, known, batch, count)
                for count in counts
            ]

        of_pieces, of_members = [piece.rows for piece in pieces], [rows[member] for member in members]
        targets = taken(of_pieces if packing else of_members)
        sources = taken(of_members if packing else of_pieces)
        parts, whole = (sources, targets) if packing else (targets, sources)
        for segment in segments:
            part = parts[members.index(segment.rank)]
            for piece, holder in zip(pieces, whole, strict=True):
                low, high = max(segment.at, piece.start), min(segment.at + segment.stop - segment.start, piece.stop)
                if low < high:
                    shift = segment.start - segment.at
                    for theirs, ours in zip(part.tensors, holder.tensors, strict=True):
                        one, other = (
                            theirs[..., low + shift : high + shift, :],
                            ours[..., low - piece.start : high - piece.start, :],
                        )
                        (other if packing else one).copy_(one if packing else other)
        for target in targets:
            target.close()


_NOTHING = torch.empty(0, dtype=torch.uint8)


class _Opened:
    """A region that is written: views of its tensors, or where these lie askew, copies that `close` writes back."""

    def __init__(self, line: Tensor, known: tuple[Field, ...], batch: int, rows: int) -> None:
        self._line, self._form = line, (known, batch, rows)
        self.tensors = _views(line, known, batch, rows)

    def close(self) -> None:
        """Write back what is not there yet."""
        memory = self._line.untyped_storage().data_ptr()
        if any(tensor.numel() and tensor.untyped_storage().data_ptr() != memory for tensor in self.tensors):
            _put(self._line, *self._form, self.tensors)


def _views(line: Tensor, known: tuple[Field, ...], batch: int, rows: int) -> list[Tensor]:
    """The tensors in a region, (copies, batch, heads, rows, width); copied only where they lie askew."""
    found, at = [], 0
    for copies, heads, width, dtype in known:
        size = copies * batch * heads * rows * width * dtype.itemsize
        part = line[at : at + size]
        if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
            part = part.clone()
        found.append(part.view(dtype).view(copies, batch, heads, rows, width))
        at += size
    return found


def _put(line: Tensor, known: tuple[Field, ...], batch: int, rows: int, tensors: Sequence[Tensor]) -> None:
    """Write tensors to a region."""
    at = 0
    for (copies, heads, width, dtype), tensor in zip(known, tensors, strict=True):
        size = copies * batch * heads * rows * width * dtype.itemsize
        part = line[at : at + size]
        if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
            part.copy_(tensor.to(dtype).contiguous().view(-1).view(torch.uint8))
        else:
            part.view(dtype).view(copies, batch, heads, rows, width).copy_(tensor)
        at += size


def _size(known: tuple[Field, ...], batch: int, rows: int) -> int:
    return sum(field.copies * batch * field.heads * rows * field.width * field.dtype.itemsize for field in known)


def _sliced(tensors: Sequence[Tensor], heads: tuple[int, int], start: int, stop: int) -> list[Tensor]:
    """Heads and rows of tensors (B, H, rows, D) or (B, H, rows), as views of four dimensions."""
    wide = [tensor if tensor.dim() == 4 else tensor.unsqueeze(-1) for tensor in tensors]
    return [tensor[:, slice(*heads), start:stop] for tensor in wide]


def _stacked(tensors: Sequence[Tensor], known: tuple[Field, ...]) -> list[Tensor]:
    """The tensors field by field."""
    left = list(tensors)
    return [torch.stack([left.pop(0) for _ in range(field.copies)]) for field in known]


def _flattened(found: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for group in found for tensor in group]


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
