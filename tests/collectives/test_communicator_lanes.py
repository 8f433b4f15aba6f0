"""Lanes apart from any group: order, errors, halting."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from collectives.errors import MemberLost
from collectives.lanes import Lane
from collectives.operations import Barrier, Operation, View
from collectives.outcome import Outcome

VIEW = View(1, (1,), 0)
DONE = Outcome(None, (1,), 1, 1, False)


def operation(on_loss: str = "retry") -> Operation:
    return Barrier(tensor=torch.empty(0), lane="x", on_loss=on_loss, view=VIEW)


def lane_that(execute: Callable[[Operation], Outcome]) -> Lane:
    return Lane("x", execute, lambda: VIEW)


def test_operations_run_in_the_order_of_the_calls_whichever_way_they_are_called() -> None:
    ran: list[Operation] = []

    def execute(one: Operation) -> Outcome:
        time.sleep(0.002)
        ran.append(one)
        return DONE

    lane = lane_that(execute)
    issued = [operation() for _ in range(12)]
    for number, one in enumerate(issued):
        if number % 4 == 3:
            lane.run(one)
        else:
            lane.submit(one)
    lane.close()
    assert [id(one) for one in ran] == [id(one) for one in issued]
    assert lane.idle


def test_resume_takes_back_nothing_of_what_was_queued_before_a_loss() -> None:
    ran: list[Operation] = []
    released = threading.Event()

    def execute(one: Operation) -> Outcome:
        ran.append(one)
        if len(ran) == 1:
            released.wait(30)
            raise MemberLost("lost member 2", (2,), (1,))
        return DONE

    lane = lane_that(execute)
    end = lane._end

    def end_slowly() -> None:
        time.sleep(0.03)
        end()

    lane._end = end_slowly  # type: ignore[method-assign]  # so that the queue is not empty when resume() comes
    works = [lane.submit(operation("raise")) for _ in range(4)]
    released.set()
    with pytest.raises(MemberLost):
        works[0].wait(30)
    lane.resume()
    for work in works[1:]:
        with pytest.raises(MemberLost, match=r"lost member 2 \(call resume\(\) first\)"):
            work.wait(30)
    assert len(ran) == 1, "an operation of before the loss was run after it"
    assert lane.run(operation()) == DONE
    lane.close()


@pytest.mark.parametrize("error", [ValueError("a kernel's"), SystemExit(3), KeyboardInterrupt()])
def test_whoever_waits_gets_the_error_whatever_it_is(error: BaseException) -> None:
    def execute(one: Operation) -> Outcome:
        raise error

    lane = lane_that(execute)
    work = lane.submit(operation())
    with pytest.raises(type(error)) as caught:
        work.wait(30)
    assert caught.value is error
    lane.close()
