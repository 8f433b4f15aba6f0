"""Operation headers: what each member says it is about to do, compared before any payload moves (rule R9)."""

from collections.abc import Collection

import msgspec

from collectives.errors import ProtocolError


class Descriptor(msgspec.Struct, frozen=True, array_like=True):
    """What must be the same on every member for one attempt of one operation.

    `view` tells which members the caller saw when it issued the operation (`membership.claims.digest_of`); 0 where that
    does not matter, because the operation can be run by fewer.
    """

    epoch: int
    lane: str
    seq: int
    view: int
    kind: str
    dtype: str
    shape: tuple[int, ...]
    op: str
    root: int
    algorithm: str
    on_loss: str

    def encode(self) -> bytes:
        """Bytes for the wire; equal descriptors have equal bytes."""
        return _encoder.encode(self)

    def __str__(self) -> str:
        words = [f"{self.kind}(shape {list(self.shape)}, {self.dtype}"]
        words += [f"op {self.op}"] if self.op else []
        words += [f"root {self.root}"] if self.root else []
        words += [f"on_loss {self.on_loss}", f"algorithm {self.algorithm})"]
        words += ["for these members only"] if self.view else []
        words += [f"as operation {self.seq}"]
        return ", ".join(words)

    def issued_apart(self, other: "Descriptor", members: Collection[int]) -> bool:
        """Whether this was issued after a loss and the other before, or the other way round.

        Their views tell, from which shapes and algorithms may follow; or the other's root, who is no member any more.
        """
        views_differ = self.view and other.view and self.view != other.view
        root_gone = other.root and other.root not in members
        return self.kind == other.kind and bool(views_differ or root_gone)


def decode(data: bytes) -> Descriptor:
    """Parse a neighbour's header. Raises `ProtocolError` if it is none."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a neighbour sent something that is no operation header: {error}") from None


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Descriptor] = msgspec.msgpack.Decoder(Descriptor)
