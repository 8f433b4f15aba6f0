"""A real coordinator and real sessions over real sockets: comings and goings, deaths, strangers, old journals."""

import hmac
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from collectives.errors import (
    CoordinatorUnreachable,
    Evicted,
    JoinRefused,
    JournalError,
    QuorumLost,
    RingholdError,
    UsageError,
)
from collectives.membership import server
from collectives.membership.coordinator import Coordinator
from collectives.membership.journal import Journal
from collectives.membership.member import Completed, Run, Wait
from collectives.membership.protocol import (
    MAX_FRAME,
    Admit,
    Beat,
    Decision,
    Evict,
    Inspect,
    Join,
    LaneFrontier,
    LaneStatus,
    Leave,
    Prepare,
    Refused,
    Resume,
    encode,
)
from collectives.membership.refusals import Refusals
from collectives.options import Options
from tests.membership.office import (
    CoordinatorProcess,
    Office,
    Peer,
    Stranger,
    await_epoch,
    await_members,
    options,
    status,
    until,
)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Where a new journal goes."""
    return tmp_path / "journal"


def found(stack: ExitStack, port: int, count: int, given: Options) -> list[Peer]:
    """Peers that form the first epoch, in the order of their ids."""
    peers = [stack.enter_context(Peer(port, given)) for _ in range(count)]
    await_epoch(1, *peers)
    return sorted(peers, key=lambda peer: peer.member)


def test_founders_form_an_epoch(journal: Path) -> None:
    given = options(founders=3)
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 3, given)
        assert {peer.members for peer in peers} == {(1, 2, 3)}
        assert len({peer.decisions[0].nonce for peer in peers}) == 1
        assert all(info.founder for info in peers[0].decisions[0].members)
        assert [event["event"] for event in peers[0].events] == ["fenced", "epoch"]
        assert peers[0].fences == 1


def test_a_peer_is_let_in_when_all_stand_at_a_safe_point(journal: Path) -> None:
    given = options()
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 2, given)
        late = stack.enter_context(Peer(office.port, given))
        until(lambda: all(peer.session.waiting == 1 for peer in peers), "the news of who waits")
        peers[0].tell(peers[0].session.core.admit)
        time.sleep(0.1)
        assert late.epoch == 0
        peers[1].tell(peers[1].session.core.admit)
        await_epoch(2, *peers, late)
        assert late.members == (1, 2, 3)
        assert not any(peer.session.core.admitting for peer in peers)
        assert [info.founder for info in late.decisions[0].members] == [True, True, False]


def test_a_member_that_leaves_is_told_goodbye(journal: Path) -> None:
    given = options()
    with Office(journal, given) as office, ExitStack() as stack:
        stays, goes = found(stack, office.port, 2, given)
        goes.leave()
        assert goes.session.core.left
        assert isinstance(goes.error, Evicted)
        await_epoch(2, stays)
        assert stays.members == (stays.member,)
        assert stays.decisions[-1].lost == [goes.member]


def test_a_connection_that_ends_is_a_loss_and_operations_follow_the_decision(journal: Path) -> None:
    given = options(founders=3)
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 3, given)
        for peer in peers:
            core = peer.session.core
            with peer.session.changed:
                assert core.enter("main", "all_reduce") == 1
                assert core.verdict("main", 1) == Run(1)
                assert core.stage("main", 1, 1)
                core.enter("side", "all_reduce")
        peers[1].session.close()
        survivors = [peers[0], peers[2]]
        await_epoch(2, *survivors)
        for peer in survivors:
            assert peer.session.core.verdict("main", 1) == Completed(1)
            assert peer.session.core.verdict("side", 1) == Run(2)
        assert survivors[0].decisions[-1].lanes == {"main": LaneFrontier(1, 1, 1), "side": LaneFrontier(0, 0, 1)}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ({"token": b"another"}, "wrong token: RINGHOLD_TOKEN must be the same"),
        ({"run": "another"}, "serves run 'office', not 'another'"),
        ({"transport": "mpi"}, "uses transport 'gloo', the peer wants 'mpi'"),
    ],
)
def test_who_does_not_belong_here_is_told_why(journal: Path, what: dict[str, Any], text: str) -> None:
    given = options(founders=1)
    with Office(journal, given) as office, ExitStack() as stack:
        (member,) = found(stack, office.port, 1, given)
        stranger = stack.enter_context(Peer(office.port, given, **what))
        until(lambda: stranger.error is not None, "the refusal")
        assert isinstance(stranger.error, JoinRefused)
        assert text in str(stranger.error)
        assert member.error is None
        assert member.epoch == 1


def test_a_port_in_use_is_a_usage_error(journal: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        office = Office(journal, options(), port=taken.getsockname()[1])
        office.join()
    assert isinstance(office.failure, UsageError)
    assert "the port is in use; choose another --listen" in str(office.failure)


def garbage(channel_key: bytes, sent: int, body: bytes) -> bytes:
    """A frame with the right checksum and any body."""
    mac = hmac.digest(channel_key, sent.to_bytes(8) + body, "sha256")[:16]
    return len(body).to_bytes(4) + mac + body


def test_garbage_closes_its_connection_and_harms_nobody_else(journal: Path) -> None:
    given = options(heartbeat_timeout=1.0)
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 2, given)
        with socket.create_connection(("127.0.0.1", office.port)) as raw:
            raw.settimeout(10)
            raw.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            while raw.recv(4096):
                pass
        for junk in (
            b"\x00" * 100,
            (MAX_FRAME + 1).to_bytes(4) + b"\x00" * 100,
            b"\xff" * 5000,
        ):
            with Stranger(office.port) as stranger:
                stranger.throw(junk)
                assert stranger.ended()
        for body in (b"", b"\xc1\xc1", encode(Refused("x")), b"\x81\xa4type\xa5Beat!"):
            with Stranger(office.port) as stranger:
                stranger.throw(garbage(stranger.channel._send_key, 0, body))
                assert stranger.ended()
        time.sleep(1.5)
        assert all(peer.error is None and peer.epoch == 1 for peer in peers)


def test_who_speaks_out_of_turn_is_refused(journal: Path) -> None:
    with Office(journal, options()) as office:
        for first in (Beat([]), Admit(1), Leave("x")):
            with Stranger(office.port) as stranger:
                assert stranger.ask(first) == Refused("say Join or Resume first")
                assert stranger.ended()
        with Stranger(office.port) as stranger:
            stranger.join()
            told = stranger.ask(Join(bytes(16), "127.0.0.1", 1, "gloo"))
            assert told == Refused("this connection has joined already")
            assert stranger.ended()


def test_a_slow_handshake_is_cut_off(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.3)
    with Office(journal, options()) as office, socket.create_connection(("127.0.0.1", office.port)) as slow:
        slow.settimeout(10)
        while slow.recv(4096):
            pass


def test_idle_handshakes_keep_nobody_out(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 100.0)
    monkeypatch.setattr(server, "MAX_UNPROVEN", 3)
    given = options(founders=1)
    with Office(journal, given) as office, ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", office.port))) for _ in range(3)]
        assert all(raw.recv(4) for raw in idle)
        found(stack, office.port, 1, given)
        ended = 0
        for raw in idle:
            raw.settimeout(0.3)
            try:
                while raw.recv(4096):
                    pass
            except TimeoutError:
                continue
            except ConnectionResetError:
                pass
            ended += 1
        assert ended == 1  # the oldest made room


def test_a_crowd_that_comes_at_once_makes_room_one_for_one(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 100.0)
    monkeypatch.setattr(server, "MAX_UNPROVEN", 3)
    with Office(journal, options()) as office, ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", office.port))) for _ in range(40)]
        for raw in crowd[:-3]:
            raw.settimeout(10.0)  # the test fails by it, where one is left open
            with suppress(ConnectionResetError):
                while raw.recv(4096):
                    pass


def test_of_a_crowd_of_refused_connections_only_some_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    for number in range(1000):
        refusals.tell("somebody", "wrong token")
        refusals.tell("somebody", f"another run, {number}")
    assert caplog.text.count("wrong token") == 5
    assert len(caplog.records) == 24
    now[0] += 10.0
    refusals.tell("somebody", "wrong token")
    assert "refused 1976 more connections" in caplog.text
    assert caplog.records[-1].getMessage() == "refused a connection from somebody: wrong token"
    refusals.close()
    assert len(caplog.records) == 26


def test_nobody_resumes_in_the_name_of_another(journal: Path) -> None:
    given = options(heartbeat_timeout=1.0)
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 2, given)
        with Stranger(office.port) as stranger:
            told = stranger.ask(Resume(peers[0].member, stranger.secret, 1, 1))
            assert isinstance(told, Evict)
            assert stranger.ended()
        # Not even with what everybody can see of it.
        with Stranger(office.port) as stranger:
            nonce = peers[0].decisions[0].members[0].nonce
            assert isinstance(stranger.ask(Resume(peers[0].member, nonce, 1, 1)), Evict)
        time.sleep(1.2)
        assert all(peer.error is None and peer.epoch == 1 for peer in peers)


def test_a_silent_connection_is_evicted(journal: Path) -> None:
    given = options(heartbeat_timeout=0.6)
    with Office(journal, given) as office, ExitStack() as stack, Stranger(office.port) as silent:
        silent.join()
        peer = stack.enter_context(Peer(office.port, given))
        assert isinstance(silent.hear(), Prepare)
        # It never reports and never beats.
        until(lambda: isinstance(silent.hear(), Evict), "the eviction")
        assert silent.ended()
        assert peer.epoch == 0
        other = stack.enter_context(Peer(office.port, given))
        until(lambda: peer.epoch and other.epoch == peer.epoch, "an epoch of those who beat")
        assert peer.members == (peer.member, other.member)


def test_the_status_is_told_to_who_has_the_token(journal: Path) -> None:
    given = options()
    with Office(journal, given) as office, ExitStack() as stack:
        found(stack, office.port, 2, given)
        told = status(office.port)
        assert (told.run, told.epoch, told.waiting) == ("office", 1, 0)
        assert [(row.member, row.rank, row.state) for row in told.members] == [(1, 0, "member"), (2, 1, "member")]


def test_too_few_members_are_told_so(journal: Path) -> None:
    given = options(quorum=True)
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 2, given)
        peers[1].session.close()
        until(lambda: peers[0].error is not None, "the end")
        assert isinstance(peers[0].error, QuorumLost)
        assert "1 of 2 members are left" in str(peers[0].error)


def test_a_killed_coordinator_is_missed_by_nobody_and_goes_on_where_it_was(journal: Path) -> None:
    given = options(founders=3)
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        peers = found(stack, first.port, 3, given)
        for kills in range(3):
            first.kill()
            first = stack.enter_context(CoordinatorProcess(journal, given, new=False, port=first.port))
            if kills < 2:
                assert all(peer.error is None and peer.epoch == 1 for peer in peers)
        await_members(first.port, 3)
        peers[2].session.close()
        # Where it died behind a promise, numbers were used up; none is used twice.
        until(lambda: all(peer.members == (1, 2) for peer in peers[:2]), "the loss")
        assert peers[0].epoch == peers[1].epoch > 1
        assert peers[0].session.core.error is None


def test_a_loss_while_the_coordinator_is_away_is_handled_when_it_is_back(journal: Path) -> None:
    given = options(heartbeat_timeout=1.0)
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        peers = found(stack, first.port, 2, given)
        first.kill()
        peers[1].session.close()
        core = peers[0].session.core
        with peers[0].session.changed:
            core.enter("main", "all_reduce")
            core.interrupt("main", 1, peers[1].member)
            assert core.verdict("main", 1) == Wait()
        stack.enter_context(CoordinatorProcess(journal, given, new=False, port=first.port))
        until(lambda: peers[0].members == (1,), "the loss")
        assert core.verdict("main", 1) == Run(peers[0].epoch)


def test_who_needs_a_coordinator_that_is_away_departs_in_the_end(journal: Path) -> None:
    given = options(coordinator_timeout=0.5, op_timeout=0.2)
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        asks, waits = found(stack, first.port, 2, given)
        first.kill()
        asks.tell(lambda: asks.session.core.link_down(1, waits.member))
        with waits.session.changed:
            waits.session.core.enter("main", "all_reduce")  # under way for too long, and nothing fails
        until(lambda: asks.error and waits.error, "that both depart")
        for peer in (asks, waits):
            assert isinstance(peer.error, CoordinatorUnreachable)
            assert "was away for 0.5 s" in str(peer.error)


def test_an_idle_member_outlives_the_coordinator(journal: Path) -> None:
    given = options(founders=1, coordinator_timeout=0.1)
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        (peer,) = found(stack, first.port, 1, given)
        first.kill()
        time.sleep(0.5)
        core = peer.session.core
        with peer.session.changed:
            core.enter("main", "all_reduce")
            assert core.stage("main", 1, 1)
            assert core.complete("main", 1, 1)
            core.exit("main", 1)
        assert peer.error is None


def test_a_joiner_of_a_change_that_died_with_the_coordinator_joins_again(journal: Path) -> None:
    given = options(founders=2)
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        peer = stack.enter_context(Peer(first.port, given))
        until(lambda: peer.member, "the welcome")
        with Stranger(first.port) as silent:
            silent.join()
            until(lambda: peer.session.core.promised == 1, "the promise")
            first.kill()
        stack.enter_context(CoordinatorProcess(journal, given, new=False, port=first.port))
        other = stack.enter_context(Peer(first.port, given))
        until(lambda: peer.epoch and other.epoch == peer.epoch, "an epoch")
        assert peer.epoch > 1
        assert set(peer.members) == {peer.member, other.member}


def test_an_old_journal_ends_the_coordinator(journal: Path) -> None:
    given = options()
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        peers = found(stack, first.port, 2, given)
        old = journal.with_name("old")
        shutil.copy(journal, old)
        late = stack.enter_context(Peer(first.port, given))
        until(lambda: late.member, "the welcome")
        for peer in peers:
            peer.tell(peer.session.core.admit)
        await_epoch(2, *peers, late)
        first.kill()
        second = stack.enter_context(CoordinatorProcess(old, given, new=False, port=first.port))
        said = second.ending()
        assert said.startswith("JournalError")
        assert "this journal is old; start the coordinator on the newest one" in said
        # Nobody was harmed by it.
        stack.enter_context(CoordinatorProcess(journal, given, new=False, port=first.port))
        await_members(first.port, 3)
        late.session.close()
        until(lambda: all(peer.members == (1, 2) for peer in peers), "the loss")
        assert all(peer.error is None for peer in peers)


def test_a_new_journal_under_a_run_that_goes_on_ends_the_coordinator(journal: Path) -> None:
    given = options()
    with ExitStack() as stack:
        first = stack.enter_context(CoordinatorProcess(journal, given))
        peers = found(stack, first.port, 2, given)
        first.kill()
        second = stack.enter_context(CoordinatorProcess(journal.with_name("new"), given, port=first.port))
        assert "this journal is old" in second.ending()
        assert all(peer.error is None for peer in peers)


def test_new_is_for_new_runs_and_one_journal_has_one_coordinator(journal: Path) -> None:
    given = options()
    with ExitStack() as stack:
        missing = stack.enter_context(CoordinatorProcess(journal, given, new=False))
        assert (missing.port, "there is no journal at" in missing.ending()) == (0, True)
        first = stack.enter_context(CoordinatorProcess(journal, given))
        for new in (False, True):
            second = stack.enter_context(CoordinatorProcess(journal, given, new=new))
            assert (second.port, "another coordinator of this run is alive" in second.ending()) == (0, True)
        first.process.terminate()
        assert first.ending() == ""
        assert first.process.returncode == 0
        third = stack.enter_context(CoordinatorProcess(journal, given))
        assert (third.port, "go on with it without --new" in third.ending()) == (0, True)


def test_a_failing_disk_ends_the_coordinator_before_anything_is_told(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(founders=1)
    with Office(journal, given) as office, ExitStack() as stack:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        peer = stack.enter_context(Peer(office.port, given))
        office.join()
        assert isinstance(office.failure, JournalError)
        assert "No space left on device; stopping" in str(office.failure)
        assert peer.session.core.promised == 0


@pytest.mark.parametrize("event", ["on_tick", "on_message", "on_closed"])
def test_a_defect_ends_the_coordinator(
    journal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    given = options(founders=1)
    with Office(journal, given) as office, ExitStack() as stack:
        peer = stack.enter_context(Peer(office.port, given))
        await_epoch(1, peer)

        def fail(*given: object) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(Coordinator, event, fail)
        if event == "on_closed":
            peer.session.close()
        office.join()
        assert isinstance(office.failure, RingholdError)
        assert "ZeroDivisionError('a defect')" in str(office.failure)
        assert "the coordinator failed" in caplog.text


def test_who_does_not_read_is_cut_off(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNSENT", 1000)
    given = options(founders=1)
    with Office(journal, given) as office, ExitStack() as stack:
        (peer,) = found(stack, office.port, 1, given)
        with Stranger(office.port) as deaf:
            deaf.join()
            until(lambda: peer.session.waiting == 1, "the news of who waits")
            deaf.ask(Beat([LaneStatus(f"lane {n}", n, "all_reduce", "idle", 0, 0.0) for n in range(5000)]))
            for _ in range(100):
                deaf.channel.send(Inspect())  # each answer has all its lanes
            deaf.drain()
            until(lambda: peer.session.waiting == 0, "its end")
        assert peer.error is None


def test_what_is_decided_is_in_the_journal(journal: Path) -> None:
    given = options()
    with Office(journal, given) as office, ExitStack() as stack:
        peers = found(stack, office.port, 2, given)
        for peer in reversed(peers):
            peer.leave()
    with Journal(journal, "office") as opened:
        decisions = [record for record in opened.records if isinstance(record, Decision)]
    assert [d.epoch for d in decisions] == sorted({d.epoch for d in decisions})
    assert decisions[0] == peers[0].decisions[0]
    assert decisions[-1].members == []
    assert decisions[-1].ended
