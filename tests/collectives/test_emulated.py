"""The emulated transport in real processes: its formula, its counters, its errors, and that an abort wakes sleepers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collectives.epochs import Epochs
from collectives.errors import OptionError, UsageError
from collectives.options import Options
from tests.collectives.crew import Crew, crew_of

LATENCY, BANDWIDTH = 0.05, 4e6
WORLD = 3
WAKES = 2.0


@pytest.fixture(params=["gloo", "sockets"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with crew_of(WORLD) as made:
        yield made


def network(ranks: int = WORLD, latency: float = LATENCY, kind: str = "mesh", **more: Any) -> str:
    link = {"latency": latency, "bandwidth": BANDWIDTH}
    return json.dumps({"kind": kind, "ranks": ranks, "link": link} | more)


def emulate(crew: Crew, kind: str, text: str) -> None:
    crew.epoch += 1
    addresses = crew.addresses[:WORLD]
    for rank in range(WORLD):
        crew.start(rank, "emulate", kind=kind, rank=rank, addresses=addresses, epoch=crew.epoch, network=text)
    for rank in range(WORLD):
        reply = crew.reply(rank)
        assert not reply.error, reply.message


def echo(crew: Crew, size: int, bulk: bool) -> float:
    crew.start(1, "echo", peer=0, size=size, first=False, bulk=bulk)
    time.sleep(0.05)
    crew.start(0, "echo", peer=1, size=size, first=True, bulk=bulk)
    for rank in (1, 0):
        reply = crew.reply(rank)
        assert not reply.error, reply.message
    return float(reply.value)


@pytest.mark.parametrize(("size", "bulk"), [(0, False), (600_000, False), (1_000_000, True)])
def test_a_message_takes_latency_and_bytes_over_bandwidth(crew: Crew, kind: str, size: int, bulk: bool) -> None:
    emulate(crew, kind, network())
    expected = 2 * (LATENCY + size / BANDWIDTH)
    took = echo(crew, size, bulk)
    assert expected * 0.999 <= took <= expected * 1.25 + 0.1


def test_jitter_adds_to_latency_and_follows_from_the_seed(crew: Crew, kind: str) -> None:
    """Up to 0.2 s for the way there and back; seed 48 draws 0.023 s of it, seed 40 draws 0.187 s."""
    jittery = {"latency": 0.01, "bandwidth": 1e9, "jitter": 0.1}
    for seed, expected in ((48, 0.043), (40, 0.207), (48, 0.043)):
        emulate(crew, kind, network(kind="flat", link=jittery, seed=seed))
        took = echo(crew, 1, False)
        assert expected <= took + 0.001 <= expected + 0.15


def test_ports_are_shared_between_processes(crew: Crew, kind: str) -> None:
    """Ranks 0 and 1 send 400 KB each to rank 2 at the same time: its port in needs 0.2 s for both."""
    emulate(crew, kind, network(kind="flat", latency=0.0))
    sizes = [200_000, 200_000]
    for rank in (0, 1):
        crew.start(rank, "send", peer=2, sizes=sizes, dtype="uint8")
    begun = time.monotonic()
    for peer in (0, 1):
        crew.start(2, "receive", peer=peer, sizes=sizes, dtype="uint8")
        assert crew.reply(2).value == [True, True]
    took = time.monotonic() - begun
    for rank in (0, 1):
        assert not crew.reply(rank).error
    assert 0.15 <= took <= 0.2 + 0.15


def test_bytes_are_counted_by_link_and_sort(crew: Crew, kind: str) -> None:
    emulate(crew, kind, network(latency=0.0))
    count = 30_000
    case = {"algorithm": "ring", "kind": "all_reduce", "count": count, "dtype": "float32"}
    crew.run("collective", WORLD, case=case)
    traffic = crew.run("traffic", WORLD)
    each = 2 * (WORLD - 1) * count // WORLD * 4
    for rank in range(WORLD):
        ahead, behind = (rank + 1) % WORLD, (rank - 1) % WORLD
        assert traffic[rank]["tensors_sent"][ahead] == each
        assert traffic[rank]["tensors_received"][behind] == each
        assert traffic[rank]["tensors_sent"][behind] == traffic[rank]["tensors_received"][ahead] == 0
    for rank in range(WORLD):
        for peer in range(WORLD):
            assert traffic[rank]["notes_sent"][peer] == traffic[peer]["notes_received"][rank]


def test_an_impatient_receiver_gets_the_note_later(crew: Crew, kind: str) -> None:
    emulate(crew, kind, network(latency=0.4))
    crew.start(1, "patience", peer=0, timeout=0.1)
    crew.start(0, "echo", peer=1, size=10, first=True, bulk=False)
    assert crew.reply(1).value == (True, 10)
    crew.start(0, "!abort")
    assert crew.reply(0, WAKES).error == "TransportLost"


def test_an_abort_wakes_who_sleeps_until_a_message_is_due(crew: Crew, kind: str) -> None:
    emulate(crew, kind, network(latency=60.0))
    crew.start(0, "echo", peer=1, size=100, first=True, bulk=False)
    crew.start(1, "echo", peer=0, size=100, first=False, bulk=False)
    time.sleep(0.3)
    for rank in (0, 1):
        crew.start(rank, "!abort")
        reply = crew.reply(rank, WAKES)
        assert (reply.error, reply.peer) == ("TransportLost", None)


def test_an_epoch_larger_than_the_topology_is_refused(crew: Crew, kind: str) -> None:
    crew.epoch += 1
    crew.start(0, "emulate", kind=kind, rank=0, addresses=crew.addresses, epoch=crew.epoch, network=network(WORLD - 1))
    reply = crew.reply(0)
    assert reply.error == "Unsupported"
    assert "2 ranks" in reply.message


def test_nothing_is_left_in_memory() -> None:
    assert not list(Path("/dev/shm").glob("ringhold-ledger-*"))


def test_a_member_needs_a_topology_to_be_held_to(tmp_path: Path) -> None:
    def epochs(kind: str, **options: Any) -> Epochs:
        def nothing(*_: Any) -> None: ...

        given = Options.resolve(options, {})
        return Epochs(kind, "run", b"t", given, on_ready=nothing, on_failure=nothing, on_refusal=nothing)

    with pytest.raises(OptionError, match="RINGHOLD_TOPOLOGY"):
        epochs("emulated:sockets")
    with pytest.raises(OptionError, match="unknown transport 'emulated:pigeons'"):
        epochs("emulated:pigeons")
    with pytest.raises(UsageError, match=r"lab\.json"):
        epochs("emulated:sockets", topology=str(tmp_path / "lab.json"))
    (tmp_path / "lab.json").write_text(network())
    epochs("emulated:sockets", topology=str(tmp_path / "lab.json")).close()
