"""What calls under way may share memory, and which are refused."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from collectives.errors import LaneMisuse, UsageError
from collectives.in_flight import InFlight
from collectives.operations import AllReduce, View
from collectives.outcome import Work

VIEW = View(1, (1,), 0)


def writing(tensor: Tensor) -> AllReduce:
    return AllReduce(tensor=tensor, op="sum", lane="x", view=VIEW)


def reading(tensor: Tensor) -> AllReduce:
    return AllReduce(tensor=tensor, op="sum", inplace=False, lane="y", view=VIEW)


def refused(calls: InFlight, call: AllReduce) -> bool:
    try:
        with calls.during(call):
            return False
    except UsageError as error:
        assert "under way on the same memory" in str(error)
        return True


def test_what_one_writes_no_other_touches() -> None:
    base = torch.zeros(100)
    cases: Sequence[tuple[AllReduce, AllReduce, bool]] = (
        (writing(base), writing(base), True),
        (writing(base), reading(base[99:]), True),
        (reading(base), writing(base[:1]), True),
        (reading(base), reading(base), False),
        (writing(base[:50]), writing(base[50:]), False),
        (writing(base[::2]), writing(base[1::2]), False),
        (writing(base[::2]), writing(base[1::3]), True),
        (writing(base.view(10, 10)[:, 3]), reading(base.view(10, 10)[:, 4:].to(base)), False),
        (writing(base.view(10, 10).T[3]), reading(base.view(10, 10)[4, 2:5]), True),
        (writing(base[5:5]), writing(base), False),
        (writing(torch.zeros(3)), writing(torch.zeros(3)), False),
    )
    for number, (first, second, clash) in enumerate(cases):
        calls = InFlight()
        with calls.during(first):
            assert refused(calls, second) == clash, number
        assert not refused(calls, second), number


def test_a_queued_call_counts_until_its_work_is_complete_and_keeps_no_memory_alive() -> None:
    calls, tensor, work = InFlight(), torch.zeros(1000), Work()
    gone = weakref.ref(tensor)
    assert calls.queue(writing(tensor), lambda call: work) is work
    assert refused(calls, reading(tensor[3:4]))
    work.settle(None, None)
    assert not refused(calls, writing(tensor))
    calls.queue(writing(tensor), lambda call: Work())  # nobody keeps it: it is not under way
    assert not refused(calls, writing(tensor))
    del tensor
    gc.collect()
    assert gone() is None


def test_a_call_that_is_not_taken_is_not_under_way() -> None:
    def submit(call: object) -> Work:
        raise LaneMisuse("in use")

    calls, tensor = InFlight(), torch.zeros(3)
    with pytest.raises(LaneMisuse):
        calls.queue(writing(tensor), submit)
    assert not refused(calls, writing(tensor))
