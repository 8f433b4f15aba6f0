"""What the members do in `test_operations`: every function runs on all of them in lockstep and returns digests.

A function checks its own member's results against `values` and returns the digest of each, in order, so that the test
can compare the members with each other.
"""

from collections.abc import Callable
from typing import Any

from tests.conformance.operations.batches import (
    gather_lists,
    reduce_lists,
    reduce_sparse,
    reduce_sparse_roughly,
    scatter_lists,
)
from tests.conformance.operations.concurrency import clash, meddle, overlap
from tests.conformance.operations.movements import (
    barriers,
    broadcast_from_each,
    exchange_blocks,
    gather_rows,
    gather_to_and_scatter_from_each,
    run_schedules,
)
from tests.conformance.operations.reductions import (
    reduce_every_shape,
    reduce_everything,
    reduce_roughly,
    reduce_segments,
    reduce_to_each,
    scatter_reductions,
)
from tests.conformance.operations.uneven import (
    disagree_on_counts,
    exchange_uneven_rows,
    gather_uneven_rows,
    scatter_uneven_reductions,
)

RESULTS: tuple[Callable[..., Any], ...] = (
    reduce_everything,
    reduce_every_shape,
    reduce_segments,
    reduce_roughly,
    reduce_to_each,
    scatter_reductions,
    gather_rows,
    gather_to_and_scatter_from_each,
    broadcast_from_each,
    exchange_blocks,
    gather_uneven_rows,
    scatter_uneven_reductions,
    exchange_uneven_rows,
    reduce_lists,
    gather_lists,
    scatter_lists,
    reduce_sparse,
    reduce_sparse_roughly,
    run_schedules,
    overlap,
)
"""Those that return digests, equal on all members."""

__all__ = [
    "RESULTS",
    "barriers",
    "broadcast_from_each",
    "clash",
    "disagree_on_counts",
    "gather_rows",
    "meddle",
    "overlap",
    "reduce_every_shape",
    "reduce_everything",
    "reduce_roughly",
    "reduce_segments",
    "run_schedules",
    "scatter_reductions",
]
