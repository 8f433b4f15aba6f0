"""Several connections a pair: the same results, and a member that died or stopped is seen on all of them."""

import signal
import time
from collections.abc import Iterator

import pytest

from collectives.epochs import parse_transport
from collectives.errors import OptionError
from tests.collectives.crew import Crew, crew_of


@pytest.fixture
def crew() -> Iterator[Crew]:
    with crew_of(3) as made:
        yield made


def test_segments_take_turns_and_arrive_in_order(crew: Crew) -> None:
    crew.connect(2, "gloo", stripes=3)
    sizes = [600_000, 3, 70_000, 600_000, 1, 5]
    for _ in range(2):
        crew.start(0, "send", peer=1, sizes=sizes, dtype="float32")
        crew.start(1, "receive", peer=0, sizes=sizes, dtype="float32")
        assert crew.reply(1).value == [True] * len(sizes)
        assert not crew.reply(0).error


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_an_abort_frees_who_waits_on_any_stripe(crew: Crew, blow: signal.Signals) -> None:
    crew.connect(3, "gloo", stripes=2)
    case = {"algorithm": "ring", "kind": "all_reduce", "count": 4_500_000, "dtype": "float32"}
    for rank in range(3):
        crew.start(rank, "blocked", case=case)
    time.sleep(0.4)
    crew.kill(1, blow)
    time.sleep(0.3)
    for rank in (0, 2):
        crew.start(rank, "!abort")
    for rank in (0, 2):
        assert crew.reply(rank, 2.0).error == "TransportLost"


def test_names_of_transports() -> None:
    assert parse_transport("gloo") == ("gloo", 1, False, False)
    assert parse_transport("gloo:4") == ("gloo", 4, False, False)
    assert parse_transport("emulated:gloo:2") == ("gloo", 2, True, False)
    assert parse_transport("checked:gloo:2") == ("gloo", 2, False, True)
    assert parse_transport("emulated:checked:sockets") == ("sockets", 1, True, True)
    for wrong in ("gloo:0", "gloo:", "gloo:x", "gloo:65", "shm:2", "sockets:1"):
        with pytest.raises(OptionError, match="stripes"):
            parse_transport(wrong)
    with pytest.raises(OptionError, match="unknown transport"):
        parse_transport("pigeon:2")
