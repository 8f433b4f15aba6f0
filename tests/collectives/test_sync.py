"""Every member ends with the bits of the state that should win, or all learn why not and nothing is touched."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from collectives.errors import CorruptChunk, MemberLost, RingholdError, StateDiverged, StateLost, UsageError
from collectives.exchange import TRIES
from collectives.hashing import CHUNK_BYTES
from collectives.schedule import Schedule
from collectives.state import state_hash
from collectives.sync import SyncReport, sync
from collectives.transfer import ROUND_BYTES
from tests.collectives.states import QUICK, STATES, State, clone, training
from tests.collectives.threads import Died, Hub, Member, Moment, Tamper, on_threads

CHUNK_FLOATS = CHUNK_BYTES // 4
IDS = (3, 5, 8, 13, 21)


@dataclass
class Peer:
    """A member before its sync; a veteran unless told otherwise."""

    state: State
    voter: bool = True
    synced: bool = True
    before: str = field(init=False)

    def __post_init__(self) -> None:
        self.before = state_hash(self.state)


def joiner(state: State) -> Peer:
    return Peer(state, voter=False, synced=False)


def founder(state: State) -> Peer:
    return Peer(state, voter=True, synced=False)


@dataclass
class Run:
    """What came of a sync."""

    hub: Hub
    peers: dict[int, Peer]
    ends: dict[int, SyncReport | Exception]

    @property
    def reports(self) -> list[SyncReport]:
        """Of those that lived; all of them succeeded."""
        living = [self.ends[member] for member in self.hub.living]
        assert all(isinstance(end, SyncReport) for end in living), living
        return [end for end in living if isinstance(end, SyncReport)]

    def healed_to(self, state: State | str) -> None:
        """All that lived have these bits, and say so."""
        digest = state if isinstance(state, str) else state_hash(state)
        assert {report.winner for report in self.reports} == {digest}
        assert {state_hash(self.peers[member].state) for member in self.hub.living} == {digest}

    def failed_with(self, kind: type[RingholdError]) -> RingholdError:
        """All that lived raised the same, and their states are as they were."""
        living = [self.ends[member] for member in self.hub.living]
        assert {type(end) for end in living} == {kind}, living
        assert len({str(end) for end in living}) == 1
        assert all(state_hash(self.peers[member].state) == self.peers[member].before for member in self.hub.living)
        assert isinstance(living[0], kind)
        return living[0]


def run(*peers: Peer, round_bytes: int = ROUND_BYTES, **how: Any) -> Run:
    by_member = dict(zip(IDS, peers, strict=False))

    def work(member: Member) -> SyncReport:
        peer = by_member[member.member_id]
        return sync(member, peer.state, peer.voter, peer.synced, round_bytes=round_bytes)

    hub = Hub(list(by_member), **how)
    return Run(hub, by_member, on_threads(hub, work))


def big(seed: int, chunks: int = 6) -> State:
    """One tensor of so many chunks, all different."""
    return {"w": torch.randn(chunks * CHUNK_FLOATS, generator=torch.Generator().manual_seed(seed))}


# --- whose state wins ---


def test_equal_states_cost_one_small_gather() -> None:
    done = run(*(Peer(training(1)) for _ in range(3)), joiner(training(1)))
    done.healed_to(training(1))
    assert done.hub.log == [("all_gather", 0)]
    assert all(not report.healed and report.keys_changed == () for report in done.reports)
    assert "nothing moved, nothing changed on member 3" in str(done.reports[0])


def test_one_survivor_outvotes_three_joiners_of_the_same_seed() -> None:
    trained = training(0, steps=3)
    done = run(joiner(training(0)), joiner(training(0)), Peer(clone(trained)), joiner(training(0)))
    done.healed_to(trained)
    assert done.reports[0].voters == done.reports[0].givers == (8,)
    assert [report.healed for report in done.reports] == [True, True, False, True]


def test_the_majority_heals_the_member_that_went_astray() -> None:
    right, wrong = training(1), training(1)
    wrong["model"]["0.weight"][3, 3] += 1
    done = run(Peer(wrong), Peer(clone(right)), Peer(clone(right)))
    done.healed_to(right)
    assert done.reports[0].keys_changed == ("model/0.weight",)
    assert done.reports[0].givers == (5, 8)
    assert done.reports[0].voters == (3, 5, 8)


def test_the_majority_is_one_of_voters_not_of_members() -> None:
    right, wrong = big(1), big(2)
    done = run(Peer(clone(wrong)), Peer(clone(right)), Peer(clone(right)), *(joiner(clone(wrong)) for _ in range(2)))
    done.healed_to(right)


def test_two_voters_that_differ_stop_everybody_and_the_keys_are_named() -> None:
    one, other = training(1), training(1)
    other["model"]["2.bias"][0] += 1
    other["optimizer"]["param_groups"][0]["lr"] = 0.5
    other["extra"] = {"a": {"b": torch.zeros(2)}}
    done = run(Peer(one), joiner(training(2)), Peer(other))
    error = done.failed_with(StateDiverged)
    assert isinstance(error, StateDiverged)
    assert set(error.keys) == {"model/2.bias", "optimizer/param_groups/0/lr", "extra"}
    assert "members [3] / [8] hold 2 different states" in str(error)
    assert "model/2.bias" in str(error)


def test_half_of_the_voters_is_no_majority() -> None:
    states = [big(1, 1), big(1, 1), big(2, 1), big(3, 1)]
    done = run(*map(Peer, states))
    assert "[3, 5] / [8] / [13] hold 3 different states" in str(done.failed_with(StateDiverged))


def test_many_differing_keys_are_counted_in_the_message() -> None:
    done = run(Peer(dict.fromkeys(range(20), 1)), Peer(dict.fromkeys(range(20), 2)))
    error = done.failed_with(StateDiverged)
    assert "differ at 0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in str(error)
    assert isinstance(error, StateDiverged)
    assert error.keys == tuple(map(str, range(20)))


def test_the_first_sync_takes_the_state_of_the_lowest_founder() -> None:
    first, second = training(1), training(2)
    done = run(joiner(clone(second)), founder(clone(first)), founder(clone(second)), founder(clone(second)))
    done.healed_to(first)
    assert done.reports[0].givers == (5,)


def test_after_one_sync_founders_need_a_majority_too() -> None:
    done = run(founder(big(1, 1)), Peer(big(2, 1)), founder(big(2, 1)))
    done.healed_to(big(2, 1))


def test_without_a_voter_the_state_is_lost_even_if_all_agree() -> None:
    done = run(joiner(big(1, 1)), joiner(big(1, 1)))
    assert "members [3, 5] is a founder" in str(done.failed_with(StateLost))


def test_alone() -> None:
    done = run(founder(training(1)))
    done.healed_to(training(1))


def test_a_state_that_cannot_be_shared_is_refused_before_anything_is_sent() -> None:
    hub = Hub([3])
    with pytest.raises(UsageError, match=r"builtins\.set at 'a/b'"):
        sync(Member(hub, 3), {"a": {"b": {1}}}, True, True)
    assert hub.log == []


# --- what moves ---


def test_only_the_chunks_that_differ_move() -> None:
    right, wrong = big(1), big(1)
    wrong["w"][2 * CHUNK_FLOATS + 7] += 1
    wrong["w"][5 * CHUNK_FLOATS] += 1
    tensor = wrong["w"]
    done = run(Peer(clone(right)), Peer(wrong), Peer(clone(right)))
    done.healed_to(right)
    assert wrong["w"] is tensor
    assert done.hub.moved == 2 * CHUNK_BYTES
    first, astray, _ = done.reports
    assert (astray.bytes_received, astray.chunks_received) == (2 * CHUNK_BYTES, 2)
    assert (first.bytes_received, first.bytes_moved, first.chunks_moved) == (0, 2 * CHUNK_BYTES, 2)
    assert "2 chunks (2097152 bytes) from [3, 8] in 1 rounds" in str(first)


def test_a_joiner_with_another_learning_rate_gets_no_bytes() -> None:
    late = training(1)
    late["optimizer"]["param_groups"][0]["lr"] = 1.0
    done = run(Peer(training(1)), joiner(late))
    done.healed_to(training(1))
    assert done.hub.moved == 0
    assert done.reports[1].keys_changed == ("optimizer/param_groups/0/lr",)
    assert done.reports[1].healed


def test_a_joiner_with_an_empty_optimizer_gets_it_whole() -> None:
    trained = training(1, steps=2)
    fresh = torch.optim.Adam(torch.nn.Linear(2, 2).parameters(), lr=1e-3)
    late: State = {**clone(trained), "optimizer": fresh.state_dict(), "step": 0}
    done = run(Peer(clone(trained)), joiner(late))
    done.healed_to(trained)
    assert "optimizer/state/0/exp_avg" in done.reports[1].created
    assert not any(key.startswith("model") for key in done.reports[1].keys_changed)


def test_missing_and_extra_keys() -> None:
    right: State = {"a": torch.ones(3), "n": {"b": 1, "c": [torch.zeros(0), None]}, 7: (torch.ones(()), "x")}
    late: State = {"a": torch.ones(4), "n": {"b": 1, "z": torch.ones(9)}, "old": {1: 2}}
    done = run(Peer(clone(right)), joiner(late))
    done.healed_to(right)
    assert set(done.reports[1].keys_changed) == {"a", "n/c", "n/z", "7", "old"}


def test_nan_payloads_arrive() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, 5], dtype=torch.int32)
    late: State = {"x": torch.zeros(4), "y": 0.0}
    done = run(Peer({"x": bits.view(torch.float32), "y": float("nan")}), joiner(late))
    assert done.reports[1].healed
    assert torch.equal(late["x"].view(torch.int32), bits)


def test_what_a_member_has_under_another_key_does_not_move() -> None:
    one, two = big(1)["w"], big(2)["w"]
    done = run(Peer({"a": one, "b": two}), joiner({"b": one.clone(), "c": [two.clone()]}))
    done.healed_to({"a": one, "b": two})
    assert done.hub.moved == 0


def test_a_chunk_that_occurs_often_moves_once() -> None:
    done = run(Peer({"w": torch.zeros(8 * CHUNK_FLOATS), "v": torch.zeros(4 * CHUNK_FLOATS)}), joiner({"w": 1}))
    done.healed_to({"w": torch.zeros(8 * CHUNK_FLOATS), "v": torch.zeros(4 * CHUNK_FLOATS)})
    assert done.hub.moved == CHUNK_BYTES


def test_all_holders_give_alike_and_takers_pass_it_on() -> None:
    sent: Counter[int] = Counter()

    def watch(moment: Moment, schedule: Schedule, buffers: dict[int, npt.NDArray[np.uint8]]) -> None:
        if schedule.kind == "exchange":
            members = list(buffers)
            for index in range(len(schedule)):
                step = schedule.step(index)
                for src, size in zip(step.src.tolist(), (step.stop - step.start).tolist(), strict=True):
                    sent[members[src]] += size

    done = run(*(Peer(big(1, 9)) for _ in range(3)), joiner(big(2, 9)), joiner(big(3, 9)), tamper=watch)
    done.healed_to(big(1, 9))
    assert [sent[member] for member in IDS[:3]] == [3 * CHUNK_BYTES] * 3
    assert sum(sent.values()) == 18 * CHUNK_BYTES
    assert done.reports[0].givers == IDS[:3]


def test_rounds_are_bounded() -> None:
    done = run(Peer(big(1, 7)), joiner(big(2, 7)), round_bytes=2 * CHUNK_BYTES)
    done.healed_to(big(1, 7))
    assert [report.rounds for report in done.reports] == [4, 4]


@QUICK
@given(st.lists(STATES, min_size=1, max_size=4), st.data())
def test_any_states_end_equal(states: list[State], data: st.DataObject) -> None:
    states = [clone(state) for state in states]
    winner = data.draw(st.integers(0, len(states) - 1))
    digest = state_hash(states[winner])
    run(*(Peer(state) if i == winner else joiner(state) for i, state in enumerate(states))).healed_to(digest)


# --- members that die ---


def test_when_a_giver_dies_another_takes_over_and_nothing_moves_twice() -> None:
    done = run(
        Peer(big(1, 8)), Peer(big(1, 8)), joiner(big(2, 8)), round_bytes=2 * CHUNK_BYTES, deaths={3: ("exchange", 2)}
    )
    done.healed_to(big(1, 8))
    assert done.hub.moved == 8 * CHUNK_BYTES
    assert done.reports[1].lost == (3,)
    assert (done.reports[1].rounds, done.reports[1].chunks_received) == (4, 8)
    assert "lost [3]" in str(done.reports[1])


@pytest.mark.parametrize("lost", [3, 5])
def test_an_election_stands_while_one_of_its_givers_lives(lost: int) -> None:
    done = run(Peer(big(1)), Peer(big(1)), Peer(big(2)), deaths={lost: ("exchange", 0)})
    done.healed_to(big(1))


def test_when_the_only_giver_dies_the_state_is_lost() -> None:
    done = run(Peer(big(1)), joiner(big(2)), joiner(big(2)), deaths={3: ("exchange", 0)})
    done.failed_with(StateLost)


def test_when_the_giver_dies_but_everything_has_arrived_it_is_not_lost() -> None:
    done = run(Peer(big(1)), joiner(big(2)), joiner(big(2)), deaths={3: ("all_gather", 2)})
    done.healed_to(big(1))


def test_when_the_first_founder_dies_the_next_one_wins_with_what_arrived() -> None:
    first, second = big(1, 4), big(2, 4)
    second["w"][: 2 * CHUNK_FLOATS] = first["w"][: 2 * CHUNK_FLOATS]
    done = run(
        founder(first),
        founder(clone(second)),
        joiner(big(3, 4)),
        round_bytes=2 * CHUNK_BYTES,
        deaths={3: ("exchange", 1)},
    )
    done.healed_to(second)
    assert done.reports[1].chunks_received == 4


def test_a_voter_that_dies_while_keys_are_named_can_make_a_majority() -> None:
    done = run(Peer(big(1, 1)), Peer(big(2, 1)), deaths={3: ("all_gather", 1)})
    done.healed_to(big(2, 1))


VETERANS: list[tuple[str, Callable[[], list[Peer]]]] = [
    ("veterans and joiners", lambda: [Peer(big(1, 4)), joiner(big(2, 4)), Peer(big(1, 4)), joiner(big(3, 4))]),
    ("one veteran", lambda: [joiner(big(2, 4)), Peer(big(1, 4)), joiner(big(2, 4))]),
    ("first sync", lambda: [founder(big(1, 4)), founder(big(2, 4)), joiner(big(3, 4))]),
    ("one astray", lambda: [Peer(big(2, 4)), Peer(big(1, 4)), Peer(big(1, 4))]),
    ("diverged", lambda: [Peer(big(2, 4)), Peer(big(1, 4)), joiner(big(1, 4))]),
]


@pytest.mark.parametrize(("name", "make"), VETERANS, ids=[name for name, _ in VETERANS])
def test_whoever_dies_in_whatever_operation_the_others_agree(name: str, make: Callable[[], list[Peer]]) -> None:
    healthy = run(*make(), round_bytes=2 * CHUNK_BYTES)
    for moment in healthy.hub.log:
        for member in healthy.peers:
            done = run(*make(), round_bytes=2 * CHUNK_BYTES, deaths={member: moment})
            assert isinstance(done.ends[member], Died)
            ends = [done.ends[other] for other in done.hub.living]
            if all(isinstance(end, SyncReport) for end in ends):
                digest = done.reports[0].winner
                done.healed_to(digest)
                assert digest in {peer.before for peer in done.peers.values() if peer.voter}
            else:
                assert type(ends[0]) in (StateLost, StateDiverged)
                done.failed_with(type(ends[0]))  # type: ignore[arg-type]


def test_two_deaths_in_a_row() -> None:
    peers = [Peer(big(1, 8)), Peer(big(1, 8)), Peer(big(1, 8)), joiner(big(2, 8)), joiner(big(2, 8))]
    done = run(*peers, round_bytes=2 * CHUNK_BYTES, deaths={3: ("exchange", 1), 13: ("all_gather", 2)})
    done.healed_to(big(1, 8))
    assert done.reports[0].lost == (3, 13)


def test_a_run_that_fails_while_nobody_is_lost_is_not_repeated_for_ever() -> None:
    class Broken(Member):
        def run(self, schedule: Schedule, tensor: Tensor, /) -> None:
            raise MemberLost("so it says")

    hub = Hub([3, 5])
    states = {3: big(1, 1), 5: big(2, 1)}
    ends = on_threads(hub, lambda member: sync(Broken(hub, member.member_id), states[member.member_id], True, False))
    assert all(isinstance(end, MemberLost) for end in ends.values())


# --- corrupt bytes ---


def spoil(taker: int, times: int, kind: str = "exchange") -> Tamper:
    """Flip a bit of what `taker` gets, in the first `times` runs of a kind."""

    def tamper(moment: Moment, schedule: Schedule, buffers: dict[int, npt.NDArray[np.uint8]]) -> None:
        if schedule.kind == kind and moment[1] < times:
            wanted = schedule.wanted(list(buffers).index(taker))
            buffers[taker][wanted[0][1] - 1] ^= 1

    return tamper


@pytest.mark.parametrize("givers", [1, 3])
def test_a_corrupt_chunk_is_noticed_and_comes_again(givers: int) -> None:
    sources: list[set[int]] = []
    flip = spoil(IDS[givers], 1)

    def tamper(moment: Moment, schedule: Schedule, buffers: dict[int, npt.NDArray[np.uint8]]) -> None:
        flip(moment, schedule, buffers)
        if schedule.kind == "exchange":
            sources.append({src for index in range(len(schedule)) for src in schedule.step(index).src.tolist()})

    done = run(*(Peer(big(1, 2)) for _ in range(givers)), joiner(big(2, 2)), joiner(big(3, 2)), tamper=tamper)
    done.healed_to(big(1, 2))
    assert done.hub.moved == 5 * CHUNK_BYTES
    assert sources[1] == ({0} if givers == 1 else {1})


def test_a_chunk_that_stays_corrupt_stops_everybody() -> None:
    done = run(Peer(big(1, 2)), Peer(big(1, 2)), joiner(big(2, 2)), tamper=spoil(8, 99))
    error = done.failed_with(CorruptChunk)
    assert "of 'w' came to members [8] with other bytes, 3 times, from members [3, 5]" in str(error)
    assert error.exit_code == 4
    assert done.hub.log.count(("exchange", TRIES - 1)) == 1


def test_a_state_that_changes_while_it_is_given_is_noticed() -> None:
    class Restless(Member):
        def run(self, schedule: Schedule, tensor: Tensor, /) -> None:
            if schedule.kind == "exchange" and self.member_id == 3:
                tensor[0] ^= 1
            super().run(schedule, tensor)

    hub = Hub([3, 5])
    peers = {3: Peer(big(1, 1)), 5: joiner(big(2, 1))}

    def work(member: Member) -> SyncReport:
        peer = peers[member.member_id]
        return sync(Restless(hub, member.member_id), peer.state, peer.voter, peer.synced)

    Run(hub, peers, on_threads(hub, work)).failed_with(CorruptChunk)


def test_a_corrupt_index_comes_again() -> None:
    done = run(Peer(big(1, 2)), Peer(big(1, 2)), joiner(big(2, 2)), tamper=spoil(8, 2, kind="broadcast"))
    done.healed_to(big(1, 2))


def test_deaths_while_the_index_is_sent_are_no_corruption() -> None:
    deaths = {member: ("broadcast", number) for number, member in enumerate(IDS[:3])}
    done = run(*(Peer(big(1, 1)) for _ in range(4)), joiner(big(2, 1)), deaths=deaths)
    done.healed_to(big(1, 1))


def test_deaths_after_a_corrupt_chunk_are_no_corruption() -> None:
    peers = [*(Peer(big(1, 1)) for _ in range(4)), joiner(big(2, 1))]
    deaths = {member: ("exchange", number) for number, member in enumerate(IDS[:3]) if number}
    done = run(*peers, tamper=spoil(21, 1), deaths=deaths)
    done.healed_to(big(1, 1))


def test_an_index_that_stays_corrupt_stops_everybody() -> None:
    done = run(Peer(big(1, 2)), joiner(big(2, 2)), joiner(big(1, 2)), tamper=spoil(5, 99, kind="broadcast"))
    assert "the index of the state came to members [5]" in str(done.failed_with(CorruptChunk))
