"""The bits that a member lacks, as they come together beside its state, and the moment when they go in.

`collectives.sync` makes an `Assembly` of the state to have (an index) and the state that is here. Until `apply` nothing
of the caller's state is touched. What is kept meanwhile is new memory for the chunks that differ, each distinct one
once: right in the tensors that are to be created, in buffers for tensors that exist.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from collectives import rawbytes, tree
from collectives.errors import CorruptChunk
from collectives.hashing import cut, digests
from collectives.rawbytes import Bytes
from collectives.state import LocalState, StateIndex


class Assembly:
    """What is held of the state `target` by a process whose own state is `local`."""

    def __init__(self, target: StateIndex, local: LocalState) -> None:
        self.target = target
        self._local = local
        self._source = _Source(local)
        self._store: dict[bytes, Bytes] = {}
        self._counterpart = self._pair()
        existing = {leaf: local.tensors[mine] for leaf, mine in self._counterpart.items()}
        differing = {slot.index for slot in target.tree.slots if self._differs(slot.index)}
        self._crowded = _crowded(existing, differing)
        self._rewritten = sorted(differing | self._crowded)
        self._created = {leaf: self._create(leaf) for leaf in self._rewritten if leaf not in existing}
        self._homes = {
            chunk: (leaf, start)
            for leaf in sorted(self._created, reverse=True)
            for start, chunk in reversed(list(self._places(leaf)))
        }

    def holds(self, chunk: bytes) -> bool:
        """Whether the bytes of this digest are here, received or anywhere in the state."""
        return chunk in self._store or chunk in self._source

    def content(self, chunk: bytes) -> Bytes:
        """The bytes of a chunk that is here; to be read at once, not kept."""
        return self._store[chunk] if chunk in self._store else self._source.read(chunk)

    def put(self, chunk: bytes, data: Bytes) -> None:
        """Keep a copy of the bytes of a chunk; the caller has verified them."""
        if chunk in self._homes:
            leaf, start = self._homes[chunk]
            kept = rawbytes.read(self._created[leaf])[start : start + len(data)]
        else:
            kept = np.empty(len(data), dtype=np.uint8)
        kept[:] = data
        self._store[chunk] = kept

    def take_over(self, other: "Assembly") -> None:
        """Keep what another assembly has received for the same local state, as far as this one has a use for it."""
        for chunk in self.target.sizes:
            if chunk in other._store and not self.holds(chunk):
                self.put(chunk, other._store[chunk])

    def apply(self, state: dict[Any, Any]) -> tuple[int, ...]:
        """Make `state` (the one that `local` was taken of) the target, in place. Every chunk must be held.

        Tensors of the same path, dtype and shape are filled in place, with version counters moved on; of others, new
        ones take the place. So does a new tensor where filling in place cannot give the bits, because the tensor shares
        memory with another one that is to have other bits, or within itself.

        Returns: the numbers of the tensors that are new.

        Raises:
            CorruptChunk: a tensor does not have the bits just written to it.

        """
        for leaf in self._rewritten:  # before anything is overwritten: the source of one chunk is the place of another
            for _, chunk in self._places(leaf):
                if chunk not in self._store:
                    self.put(chunk, self._source.read(chunk))
        for leaf in self._rewritten:
            self._write(leaf)
        for leaf in self._rewritten:
            self._prove(leaf)
        tensors = [
            self._created[leaf] if leaf in self._created else self._local.tensors[self._counterpart[leaf]]
            for leaf in range(len(self.target.chunks))
        ]
        tree.refill(state, self.target.tree, tensors)
        return tuple(sorted(self._created))

    def _pair(self) -> dict[int, int]:
        """Which local tensor is to become which of the target: those of the same path, dtype and shape."""
        mine = dict(zip(self._local.index.tree.paths, self._local.index.tree.slots, strict=True))
        pairs: dict[int, int] = {}
        for slot, path in zip(self.target.tree.slots, self.target.tree.paths, strict=True):
            found = mine.get(path)
            if found is None or (found.dtype, found.shape) != (slot.dtype, slot.shape):
                continue
            same = self._local.index.chunks[found.index] == self.target.chunks[slot.index]
            if same or rawbytes.fillable(self._local.tensors[found.index]):
                pairs[slot.index] = found.index
        return pairs

    def _before(self, leaf: int) -> tuple[bytes, ...]:
        """The chunks of the local tensor that becomes this one; none if a new one does."""
        return self._local.index.chunks[self._counterpart[leaf]] if leaf in self._counterpart else ()

    def _differs(self, leaf: int) -> bool:
        return leaf not in self._counterpart or self._before(leaf) != self.target.chunks[leaf]

    def _create(self, leaf: int) -> Tensor:
        slot = self.target.tree.slots[leaf]
        return rawbytes.create(slot.dtype, slot.shape)

    def _places(self, leaf: int) -> Iterator[tuple[int, bytes]]:
        """What is to be written in a tensor: chunks and where they start."""
        before = () if leaf in self._crowded else self._before(leaf)
        for number, (start, _) in enumerate(cut(self.target.tree.slots[leaf].nbytes)):
            chunk = self.target.chunks[leaf][number]
            if not before or before[number] != chunk:
                yield start, chunk

    def _write(self, leaf: int) -> None:
        tensor = self._created.get(leaf)
        if tensor is None:
            tensor = self._local.tensors[self._counterpart[leaf]]
            if not rawbytes.fillable(tensor):
                return
        at_home = self._homes if leaf in self._created else {}
        rawbytes.write(
            tensor,
            ((start, self._store[chunk]) for start, chunk in self._places(leaf) if at_home.get(chunk) != (leaf, start)),
        )

    def _prove(self, leaf: int) -> None:
        """Hash what was filled in place; where memory shared with another tensor spoilt it, make a new tensor."""
        if leaf in self._created:
            return
        data = rawbytes.read(self._local.tensors[self._counterpart[leaf]])
        if tuple(digests([data[start:stop] for start, stop in cut(len(data))])) == self.target.chunks[leaf]:
            return
        if leaf not in self._crowded:
            raise CorruptChunk(
                f"the tensor at {tree.name(self.target.tree.paths[leaf])!r} does not have the bits just written to it; "
                f"leave the state alone while it is synchronized, and sync again"
            )
        self._created[leaf] = self._create(leaf)
        rawbytes.write(self._created[leaf], ((start, self._store[chunk]) for start, chunk in self._places(leaf)))


class _Source:
    """The chunks of a local state by digest."""

    def __init__(self, local: LocalState) -> None:
        self._tensors = local.tensors
        self._places = {
            chunk: (leaf, start, stop)
            for leaf, (slot, chunks) in enumerate(zip(local.index.tree.slots, local.index.chunks, strict=True))
            for chunk, (start, stop) in zip(chunks, cut(slot.nbytes), strict=True)
        }
        self._last: tuple[int, Bytes] | None = None

    def __contains__(self, chunk: bytes) -> bool:
        return chunk in self._places

    def read(self, chunk: bytes) -> Bytes:
        """The bytes of a chunk. Of a tensor that is not contiguous a copy is kept till the next."""
        leaf, start, stop = self._places[chunk]
        if self._last is None or self._last[0] != leaf:
            self._last = (leaf, rawbytes.read(self._tensors[leaf]))
        return self._last[1][start:stop]


def _crowded(existing: Mapping[int, Tensor], differing: set[int]) -> set[int]:
    """The tensors that may share memory with one another, in groups of which a member is to change."""
    spans = sorted((*rawbytes.extent(tensor), leaf) for leaf, tensor in existing.items() if tensor.numel())
    groups: list[list[int]] = []
    reach = 0
    for first, last, leaf in spans:
        if first >= reach:
            groups.append([])
        groups[-1].append(leaf)
        reach = max(reach, last)
    return {leaf for group in groups if len(group) > 1 and not differing.isdisjoint(group) for leaf in group}
