"""Models written with `F.scaled_dot_product_attention`, run on a sequence that is spread over ranks, as they are.

    with sequence_parallel(comm, length=ids.shape[1], balance="zigzag") as spread:
        logits = model(spread.shard(ids, dim=1), position_ids=spread.position_ids,
                       attention_mask=spread.attention_mask).logits

All that works token by token needs no change; attention is computed among all ranks. What a model makes of local
positions must be given the global ones: `spread.position_ids`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from collectives.errors import UsageError
from parallel.attention.api import Lengths, Members, sequence_attention
from parallel.attention.shares import Balance, shard


class Spread(TorchFunctionMode):
    """What `sequence_parallel` gives: this rank's rows of the sequence.

    Attributes:
        position_ids: (1, rows), int64: where they are, within their document.
        attention_mask: (1, 1, 1, 1), for models that make a mask of their own unless they are given one of four
            dimensions: it stands for what `causal` and the documents of the balance say.

    """

    def __init__(self, comm: Members, length: int, balance: Balance, causal: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self._comm, self._length, self._balance, self._causal = comm, length, balance, causal
        self._settings = settings
        shares = balance.shares(length, comm.size)
        rows = tuple(share.rows for share in shares)
        self._lengths: Lengths = rows, rows
        here = [torch.arange(run.length) * run.stride + run.position for run in shares[comm.rank].runs]
        self.position_ids = torch.cat([*here, torch.empty(0, dtype=torch.int64)]).to(torch.int64).unsqueeze(0)
        self.attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)

    @property
    def indices(self) -> Tensor:
        """(rows,), int64: which rows of the whole sequence this rank has."""
        return self._balance.indices(self._length, self._comm.size, self._comm.rank)

    def shard(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's rows along `dim`."""
        return shard(whole, self._balance, self._comm.size, self._comm.rank, dim)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute attention among all ranks, and everything else as it is."""
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.untyped_storage().data_ptr() != self._mask_pointer:
            raise UsageError(
                "sequence_parallel cannot use a mask of this rank's rows alone; pass its attention_mask to the model, "
                "and say what it masks by causal= and by a Balance with documents"
            )
        if dropout_p:
            raise UsageError(
                f"sequence_parallel has no dropout of attention, and {dropout_p} was asked for; set it to 0"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise UsageError(f"{query.shape[1]} heads of queries and {key.shape[1]} of keys need enable_gqa=True")
        if {query.shape[2], key.shape[2]} != {self.position_ids.shape[1]}:
            raise UsageError(
                f"this rank has {self.position_ids.shape[1]} rows of a sequence of {self._length}, and attention was "
                f"called with {query.shape[2]} queries and {key.shape[2]} keys; turn caches off and shard the input"
            )
        return sequence_attention(
            query,
            key,
            value,
            self._comm,
            self._causal if attn_mask is not None else is_causal,
            balance=self._balance,
            scale=scale,
            lengths=self._lengths,
            **self._settings,
        )

    @property
    def _mask_pointer(self) -> int:
        return self.attention_mask.untyped_storage().data_ptr()


@contextmanager
def sequence_parallel(
    comm: Members,
    length: int,
    balance: str | Balance = "zigzag",
    causal: bool = True,
    **settings: Any,
) -> Iterator[Spread]:
    """Within it, `F.scaled_dot_product_attention` attends over the sequence of all ranks.

    Args:
        comm: a communicator or a sub-group; all its members run the same model.
        length: rows of the whole sequence.
        balance: which rows each rank has.
        causal: what the mask that the model is given means.
        settings: of `sequence_attention`: scheme, parts, columns, topology.

    Raises:
        UsageError: (from the model) a mask, dropout or cache that cannot be spread.

    """
    chosen = balance if isinstance(balance, Balance) else Balance(balance)
    with Spread(comm, length, chosen, causal, settings) as spread:
        yield spread
