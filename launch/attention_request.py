"""What `ringhold attention` is asked to do, as its ranks get it; torch-free."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

RUN = "attention"
BACKWARD = 2.5
"""Work of the backward pass, in forward passes; as in `parallel.attention.choice.Rates`."""
LIMIT = 2e11
"""Floating-point operations of the check against one process, at most, unless its length is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRequest:
    """One call of the command.

    Attributes:
        schemes: run one after the other.
        checked: rows of the sequence whose result is compared with one process.
        backward: the gradients as well.
        modelled: kernels sleep as long as they would take, instead of computing.
        ratio: of modelled computation to communication (of all rows, over the topology).
        topology: file of the network of an emulated transport; empty: a mesh of links of `bandwidth` and `latency`.
        data: text files; none: Python's own text.
        trace_to: folder for the traces of the members; empty: none.

    """

    schemes: tuple[str, ...]
    seq: int
    checked: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    dtype: str
    causal: bool
    backward: bool
    balance: str
    parts: int
    columns: int
    transport: str
    topology: str
    bandwidth: float
    latency: float
    modelled: bool
    ratio: float
    rounds: int
    data: tuple[str, ...]
    trace_to: str

    @property
    def runs(self) -> dict[str, str]:
        """The one run that it needs a coordinator for."""
        return {RUN: self.transport}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("schemes", "data")}})


def affordable(seq: int, heads: int, head_dim: int, batch: int, backward: bool = False) -> int:
    """Rows of a sequence whose attention takes no more than LIMIT operations, at most `seq`."""
    row = 4 * batch * heads * head_dim * (1 + (BACKWARD if backward else 0.0))
    return min(seq, int((LIMIT / row) ** 0.5) // 64 * 64 or 64)
