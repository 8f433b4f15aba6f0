"""Send and receive: whole at both ends or at none, in order, resumed after an outsider's death (R6)."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance import messages
from tests.conformance.test_groups import by_rank, has_settled
from tests.conformance.test_r6_losses import survivors_of
from tests.conformance.transports import LENDING, TRANSPORTS
from tests.harness.cluster import Cluster
from tests.harness.residents import Residents


@pytest.fixture(scope="module", params=TRANSPORTS)
def residents(request: pytest.FixtureRequest) -> Iterator[Residents]:
    with Residents(4, transport=request.param) as group:
        yield group


@pytest.mark.parametrize("size", ["small", "bulk"])
def test_messages_go_round_in_both_directions_at_once(residents: Residents, size: str) -> None:
    assert residents.run(messages.around, size=size) == [True] * 4


def test_messages_of_a_tag_arrive_in_order(residents: Residents) -> None:
    assert residents.run(messages.in_order)[1] == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]


def test_a_crowd_of_messages_takes_no_more_threads_than_lanes_and_keeps_none(residents: Residents) -> None:
    for seen in residents.run(messages.crowd, messages=24):
        assert seen["wrong"] == 0
        # A lane for each of three others, two directions and four tags; 144 messages.
        assert seen["most"] <= 24
        assert seen["left"] <= 0


@pytest.mark.parametrize(
    ("shapes", "dtypes", "told"),
    [
        ([[3], [4]], ["float32", "float32"], ["send_recv(shape [3], float32", "send_recv(shape [4], float32"]),
        ([[400_000], [400_000]], ["float32", "int32"], ["[400000], float32", "[400000], int32"]),
        ([[2, 3], [3, 2]], ["float64", "float64"], ["shape [2, 3]", "shape [3, 2]"]),
    ],
)
def test_ends_that_disagree_are_both_told_so(
    residents: Residents, shapes: list[list[int]], dtypes: list[str], told: list[str]
) -> None:
    said = residents.run(messages.differing, shapes=shapes, dtypes=dtypes)
    assert said[0] == said[1]
    for text in told:
        assert text in said[0]


def test_what_is_no_message_is_refused() -> None:
    with Residents(2) as group:
        for me, said in enumerate(group.run(messages.refused), start=1):
            assert said == [
                f"member {me} cannot send to itself",
                "[77] are no members; the members are [1, 2] (ids, not ranks)",
                "tag -1: tags are numbers from 0 to 2**31 - 1",
            ]


CASES = [
    (0, "enter", "small"),
    (1, "enter", "bulk"),
    (0, "begin", "bulk"),
    (1, "begin", "small"),
    (1, "transfer", "bulk"),
    (0, "staged", "bulk"),
    (1, "staged", "small"),
    (0, "confirmed", "small"),
    (1, "copied", "bulk"),
]
"""Who dies (0 sends, 1 receives), where, in a message of what size."""


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("victim", "point", "size"), CASES)
def test_r6_the_survivor_of_a_message_has_it_whole_or_is_told_of_the_loss(
    transport: str, victim: int, point: str, size: str
) -> None:
    with Cluster(founders=4, transport=transport) as cluster:
        given: dict[str, Any] = {"victim": victim, "point": point, "size": size}
        reports = survivors_of(cluster.peers(messages.partner_dies, 4, **given), deaths=1)
    survivor, *others = sorted(reports, key=lambda report: report["rank"])
    assert [other["right"] for other in others] == [True, True]
    if "lost" in survivor:
        assert survivor["intact"]
        assert survivor["lost"] == [victim + 1]
        assert point not in ("confirmed", "copied"), "the victim had returned what the survivor lacks"
    else:
        assert survivor["right"]
        assert point != "enter"
        assert point != "begin" or (victim == 0 and transport in LENDING)
        # A sender learns from its receiver that it has the message.
        assert victim == 0 or not survivor["staged"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("point", ["begin", "staged"])
def test_r6_the_death_of_an_outsider_resumes_a_message(transport: str, point: str) -> None:
    sizes = ["small", "bulk"]
    with Cluster(founders=2 + len(sizes), transport=transport) as cluster:
        members = by_rank(cluster.peers(messages.outsider_dies, 2 + len(sizes), point=point, sizes=sizes))
        ends = members[:2]
        for number, victim in enumerate(members[2:]):
            assert ends[number % 2].expect("reached")["where"].startswith(f"{point} of send_recv")
            victim.kill()
            cluster.await_status(functools.partial(has_settled, members=len(members) - 1 - number))
            ends[number % 2].tell("killed")
            for report in [process.expect("report") for process in ends]:
                assert report["right"]
                assert report["who"] == [1, 2]
                assert report["staged"] or report["epoch"] > number + 1
        for process in ends:
            process.tell("leave")
            process.result()
