"""Shared state by content: the digest of a state, and the index of the chunks that it consists of.

`state_hash` is for everybody who wants to know whether two states have the same bits; `collectives.sync` compares
states by their index and moves what differs. The definition of the digests stands in `collectives.hashing`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from collectives import rawbytes, tree
from collectives.errors import ProtocolError
from collectives.hashing import DIGEST_BYTES, Data, chunk_count, cut, digests, leaf_digest, state_digest
from collectives.tree import Flat, Path, Tree


@dataclass(frozen=True)
class StateIndex:
    """What a state consists of, without the bytes: its skeleton, and for each tensor the digests of its chunks."""

    skeleton: bytes
    chunks: tuple[tuple[bytes, ...], ...]

    @cached_property
    def tree(self) -> Tree:
        """The skeleton, read back."""
        return tree.parse(self.skeleton)

    @cached_property
    def leaves(self) -> tuple[bytes, ...]:
        """Digest of each tensor, in canonical order."""
        return tuple(leaf_digest(chunks) for chunks in self.chunks)

    @cached_property
    def digest(self) -> bytes:
        """Digest of the state."""
        return state_digest(self.skeleton, self.leaves)

    @cached_property
    def sizes(self) -> dict[bytes, int]:
        """The distinct chunks, in the order of their first place in the state: digest and number of bytes."""
        return {
            chunk: stop - start
            for slot, chunks in zip(self.tree.slots, self.chunks, strict=True)
            for chunk, (start, stop) in zip(chunks, cut(slot.nbytes), strict=True)
        }

    def tokens(self) -> dict[Path, bytes]:
        """Every node of the state with bytes that are equal exactly if the nodes are; see `tree.tokens`."""
        return tree.tokens(self.tree, self.leaves)

    def pack(self) -> bytes:
        """The index as bytes, for a peer that knows the length of the skeleton."""
        return self.skeleton + b"".join(chunk for chunks in self.chunks for chunk in chunks)

    def outline(self) -> bytes:
        """The index without chunks: enough for `outline_tokens`."""
        return self.skeleton + b"".join(self.leaves)

    @classmethod
    def unpack(cls, data: bytes, skeleton_bytes: int) -> Self:
        """Read the index of a peer. Whoever knows the digest that it should have compares it.

        Raises:
            ProtocolError: `pack` of an index with a skeleton of that length cannot have made this.

        """
        skeleton, rest = data[:skeleton_bytes], data[skeleton_bytes:]
        sizes = [chunk_count(slot.nbytes) for slot in tree.parse(skeleton).slots]
        if sum(sizes) * DIGEST_BYTES != len(rest):
            raise ProtocolError(f"the index of a state has {len(rest)} bytes of digests for {sum(sizes)} chunks")
        found = iter(_split(rest))
        return cls(skeleton, tuple(tuple(next(found) for _ in range(size)) for size in sizes))


def outline_tokens(outline: bytes, skeleton_bytes: int) -> dict[Path, bytes]:
    """`StateIndex.tokens` of a peer's state, from its `StateIndex.outline`.

    Raises:
        ProtocolError: it is no outline with a skeleton of that length.

    """
    parsed = tree.parse(outline[:skeleton_bytes])
    leaves = _split(outline[skeleton_bytes:])
    if len(leaves) != len(parsed.slots):
        raise ProtocolError(f"the outline of a state has {len(leaves)} digests for {len(parsed.slots)} tensors")
    return tree.tokens(parsed, leaves)


@dataclass(frozen=True, slots=True)
class LocalState:
    """A state of this process: its index, and its tensors (not copies) in canonical order."""

    index: StateIndex
    tensors: tuple[Tensor, ...]


def index_state(state: dict[Any, Any]) -> LocalState:
    """Hash every chunk of a state. A tensor that stands in several places is hashed once.

    Raises:
        UsageError: something in the state is no shareable data; the message gives its path.

    """
    flat = tree.flatten(state)
    return LocalState(StateIndex(flat.skeleton, _chunk_digests(flat)), flat.tensors)


def state_hash(state: dict[Any, Any]) -> str:
    """BLAKE3 of a state as hex: equal exactly if structure, keys, dtypes, shapes and all bits are equal.

    The order of a dict's items, the strides of a tensor and whether tensors share memory do not count.

    Raises:
        UsageError: something in the state is no shareable data; the message gives its path.

    """
    return index_state(state).index.digest.hex()


def _chunk_digests(flat: Flat) -> tuple[tuple[bytes, ...], ...]:
    """The digests of each tensor's chunks. What needs no copy is hashed together, for the sake of threads."""
    by_view: dict[object, tuple[bytes, ...]] = {}
    direct = {_view(tensor): tensor for tensor in flat.tensors if tensor.is_contiguous()}
    pieces = {view: _pieces(tensor) for view, tensor in direct.items()}
    found = iter(digests([piece for several in pieces.values() for piece in several]))
    for view, several in pieces.items():
        by_view[view] = tuple(next(found) for _ in several)
    for tensor in flat.tensors:  # the others one at a time, so that there is one contiguous copy at a time
        if _view(tensor) not in by_view:
            by_view[_view(tensor)] = tuple(digests(_pieces(tensor)))
    return tuple(by_view[_view(tensor)] for tensor in flat.tensors)


def _split(data: bytes) -> list[bytes]:
    """The digests that lie one after the other in `data`."""
    return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]


def _pieces(tensor: Tensor) -> list[Data]:
    data = rawbytes.read(tensor)
    return [data[start:stop] for start, stop in cut(len(data))]


def _view(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that see the same memory in the same way."""
    signs = (tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), signs)
