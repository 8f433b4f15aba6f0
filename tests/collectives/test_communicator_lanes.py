"""Lanes apart from any group: order, errors, halting."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from collectives import lanes
from collectives.errors import MemberLost, UsageError
from collectives.lanes import Lane
from collectives.operations import Barrier, Call, View
from collectives.outcome import Outcome

VIEW = View(1, (1,), 0)
DONE = Outcome(None, (1,), 1, 1, False)


def operation(on_loss: str = "retry") -> Call:
    return Barrier(tensor=torch.empty(0), lane="x", on_loss=on_loss, view=VIEW)


def lane_that(execute: Callable[[Call], Outcome]) -> Lane:
    return Lane("x", execute, lambda: VIEW)


def test_operations_run_in_the_order_of_the_calls_whichever_way_they_are_called() -> None:
    ran: list[Call] = []

    def execute(one: Call) -> Outcome:
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
    ran: list[Call] = []
    released = threading.Event()

    def execute(one: Call) -> Outcome:
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


def test_a_worker_ends_when_its_lane_is_idle_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.02)
    lane = lane_that(lambda one: DONE)
    workers = set()
    for _ in range(3):
        assert lane.submit(operation()).wait(30) == DONE
        worker = lane._worker
        assert worker is not None
        workers.add(worker)
        worker.join(30)
        assert lane._worker is None
    assert len(workers) == 3


def test_nothing_is_forgotten_when_workers_end_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.0)
    lane = lane_that(lambda one: DONE)
    for _ in range(300):
        works = [lane.submit(operation()) for _ in range(3)]
        assert [work.wait(30) for work in works] == [DONE] * 3
    lane.close()


def test_lanes_are_as_many_as_a_heartbeat_can_tell_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_FRAME", 2000)
    some = lanes.Lanes(lambda one: DONE, lambda name, group: VIEW)
    for number in range(7):
        some.lane(f"lane {number}")
    with pytest.raises(UsageError, match="7 lanes are too many"):
        some.lane("another", (1, 2))
    assert some.lane("lane 5").name == "lane 5"


@pytest.mark.parametrize("name", ["", "x" * 49, "a@b", "a#b", "a>b", "a\nb"])
def test_names_that_members_could_not_tell_each_other_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a name has 1 to 48 printable characters and none of @ # >"):
        lanes.check_name("lane", name)


@pytest.mark.parametrize("error", [ValueError("a kernel's"), SystemExit(3), KeyboardInterrupt()])
def test_whoever_waits_gets_the_error_whatever_it_is(error: BaseException) -> None:
    def execute(one: Call) -> Outcome:
        raise error

    lane = lane_that(execute)
    work = lane.submit(operation())
    with pytest.raises(type(error)) as caught:
        work.wait(30)
    assert caught.value is error
    lane.close()
