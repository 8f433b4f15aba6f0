"""The collective operations as methods; `Communicator` and its sub-groups add who is here and when that may change.

What all operations share:

- tensors are CPU tensors, dense but where it says sparse, of any strides; inputs must be left alone until the outcome
  (`snapshot=True` copies them), results appear in the caller's memory only when every member has staged them. A tensor
  that a call under way writes, or reads while the new one would write it, is refused;
- `async_op=True` returns a `Work` at once; `lane` names the queue that the operation runs in, in order of the calls;
- `algorithm` names one of `collectives.choice.names(kind)`; "auto" takes what suits the number of bytes;
- `on_loss="retry"` lets the survivors run it again where the kind allows that; with "raise" every survivor gets
  `MemberLost` and the lane stays halted until `Communicator.resume`;
- roots are ids of members, not ranks;
- errors: `MemberLost`, `DescriptorMismatch`, `CrossedWaits` on every member alike; `Evicted`, `QuorumLost`,
  `CoordinatorUnreachable` where this member is out of the run; `UsageError` before anything was sent.
"""

from collectives.calls.base import How
from collectives.calls.batches import Batches
from collectives.calls.movements import Movements
from collectives.calls.reductions import Reductions

__all__ = ["Collectives", "How"]


class Collectives(Reductions, Movements, Batches):
    """The operations."""
