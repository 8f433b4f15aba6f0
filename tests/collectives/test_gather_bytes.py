"""Byte strings of any length reach everybody, also when a member is lost between the two gathers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import gather_bytes as module
from collectives.errors import UsageError
from collectives.gather_bytes import Rows, gather_bytes
from tests.collectives.states import QUICK
from tests.collectives.threads import Hub, on_threads


@QUICK
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_everybody_gets_what_everybody_gave(strings: list[bytes]) -> None:
    hub = Hub(range(10, 10 + len(strings)))
    ends = on_threads(hub, lambda member: gather_bytes(member, strings[member.member_id - 10]))
    assert set(ends.values()) == {Rows(tuple(strings), tuple(hub.members))}


@pytest.mark.parametrize("lost", [10, 11, 12])
@pytest.mark.parametrize("when", [0, 1])
def test_a_lost_member_is_left_out(lost: int, when: int) -> None:
    strings = {10: b"longest of all", 11: b"", 12: b"ab"}
    hub = Hub([10, 11, 12], deaths={lost: ("all_gather", when)})
    ends = on_threads(hub, lambda member: gather_bytes(member, strings[member.member_id]))
    left = [member for member in strings if member != lost]
    assert {ends[member] for member in left} == {Rows(tuple(strings[member] for member in left), tuple(left))}


def test_nothing_at_all_costs_one_gather() -> None:
    hub = Hub([1, 2])
    ends = on_threads(hub, lambda member: gather_bytes(member, b""))
    assert set(ends.values()) == {Rows((b"", b""), (1, 2))}
    assert hub.log == [("all_gather", 0)]


def test_too_long_a_string_is_refused_by_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 5)
    ends = on_threads(Hub([1, 2]), lambda member: gather_bytes(member, b"x" * 3 * member.member_id))
    assert all(isinstance(end, UsageError) and "members [2] give more than 5" in str(end) for end in ends.values())
