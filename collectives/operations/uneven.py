"""All-gather and all-to-all of tensors of uneven length: who gives how much is told first, as part of the call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from collectives.errors import DescriptorMismatch, UsageError
from collectives.operations.base import Call
from collectives.operations.composite import Composite, Execute, as_one
from collectives.operations.exchanges import AllToAllRows
from collectives.operations.gathers import GatherRows
from collectives.operations.tensors import check_counts, check_tensor
from collectives.outcome import Outcome

UNKNOWN = -1
"""What a member tells of output counts that it was not given."""


@dataclass(slots=True, kw_only=True)
class Uneven(Composite):
    """A call about rows along dim 0 of a tensor that may have another length on each member."""

    tensor: Tensor

    def __post_init__(self) -> None:
        check_tensor(self.kind, self.tensor)
        Call.__post_init__(self)
        if not self.tensor.dim():
            raise UsageError(f"{self.kind} takes rows along dim 0; this tensor has no dimension")
        self.check()
        if self.snapshot:
            self.tensor = self.tensor.detach().clone()

    @property
    def reads(self) -> Sequence[Tensor]:
        """The tensor, unless there is a snapshot of it."""
        return () if self.snapshot else (self.tensor,)

    def check(self) -> None:
        """Raise `UsageError` for counts that cannot be."""


@dataclass(slots=True, kw_only=True)
class AllGatherV(Uneven):
    """Every member ends with the rows of all, in rank order. `counts`: one a rank, if all members know them."""

    kind: ClassVar[str] = "all_gather_v"
    collective: ClassVar[str] = "all_gather"
    counts: Sequence[int] | None = None

    def check(self) -> None:
        """The member's own count must be right."""
        if self.counts is None:
            return
        self.counts = check_counts(self.kind, "counts", self.counts, self.view.size)
        mine = self.counts[self.view.rank]
        if mine != self.tensor.shape[0]:
            raise UsageError(
                f"{self.kind}: counts say {mine} rows for rank {self.view.rank}, not {self.tensor.shape[0]}"
            )

    def run(self, execute: Execute) -> Outcome:
        """Tell the numbers of rows, if need be; then gather."""
        outcomes: list[Outcome] = []
        if self.counts is None:
            told, outcome = self.learn(execute, [self.tensor.shape[0]], elastic=True)
            rows = {member: row for member, (row,) in told.items()}
            outcomes.append(outcome)
        else:
            rows = dict(zip(self.view.members, self.counts, strict=True))
        outcomes.append(execute(GatherRows(tensor=self.tensor, rows=rows, **self.how())))
        return as_one(outcomes, counts=tuple(rows[member] for member in outcomes[-1].contributors))


@dataclass(slots=True, kw_only=True)
class AllToAllV(Uneven):
    """Rank d ends with the rows that each member sends it, in rank order.

    `inputs[d]` rows of the tensor go to rank d, in order; `outputs[s]`, if given, are the rows expected of rank s.
    """

    kind: ClassVar[str] = "all_to_all_v"
    collective: ClassVar[str] = "all_to_all"
    inputs: Sequence[int]
    outputs: Sequence[int] | None = None

    def check(self) -> None:
        """One number for each member; those of the input add up."""
        size = self.view.size
        self.inputs = check_counts(self.kind, "input counts", self.inputs, size, self.tensor.shape[0])
        if self.outputs is not None:
            self.outputs = check_counts(self.kind, "output counts", self.outputs, size)

    def run(self, execute: Execute) -> Outcome:
        """Tell all counts, which also shows what does not fit; then exchange."""
        size = self.view.size
        expected = [UNKNOWN] * size if self.outputs is None else list(self.outputs)
        told, outcome = self.learn(execute, [*self.inputs, *expected], elastic=False)
        rows = [told[member][:size] for member in self.view.members]
        self._compare(rows, [told[member][size:] for member in self.view.members])
        exchange = execute(AllToAllRows(tensor=self.tensor, rows=rows, **self.how()))
        return as_one([outcome, exchange], counts=tuple(row[self.view.rank] for row in rows))

    def _compare(self, rows: list[list[int]], expected: list[list[int]]) -> None:
        """Raise `DescriptorMismatch` where a member expects other counts; every member sees the same."""
        members = self.view.members
        for source, row in enumerate(rows):
            for target, count in enumerate(row):
                if expected[target][source] not in (UNKNOWN, count):
                    raise DescriptorMismatch(
                        f"all_to_all_v: member {members[source]} sends {count} rows to member {members[target]}, which "
                        f"expects {expected[target][source]}; give both the same number, or no output counts"
                    )
