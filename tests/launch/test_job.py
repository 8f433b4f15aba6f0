"""The training loop of a peer, on a communicator of one member that can be told to lose, admit, evict and lie."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from collectives.communicator import Communicator
from collectives.errors import Evicted, RingholdError, StateDiverged, StateLost, UsageError
from collectives.outcome import Outcome
from collectives.step import Step
from collectives.sync import SyncReport
from launch import finals, ledger, reference
from launch.config import JobConfig
from launch.job import Event, PeerResult, run_peer


class Lossy(Step):
    """A step in which somebody was lost."""

    def __exit__(self, *error: Any) -> bool:
        swallowed = super().__exit__(*error)
        self.committed = False
        return swallowed


class Rehearsal(Communicator):
    """`Communicator.solo()` with incidents: `on_step`, `on_admit` and `on_sync` are called with the count of calls."""

    name = 1
    is_founder = True
    steps = admits = syncs = 0
    left = False
    on_step: Callable[[int], bool] = staticmethod(lambda _count: False)
    on_admit: Callable[[int], bool] = staticmethod(lambda _count: False)
    on_sync: Callable[[int, dict[str, Any]], None] = staticmethod(lambda _count, _state: None)

    @property
    def member_id(self) -> int:
        return self.name

    @property
    def founder(self) -> bool:
        return self.is_founder

    def step(self) -> Step:
        self.steps += 1
        return Lossy(self) if self.on_step(self.steps) else super().step()

    def admit(self) -> bool:
        self.admits += 1
        return self.on_admit(self.admits)

    def sync(self, state: dict[Any, Any]) -> SyncReport:
        self.syncs += 1
        self.on_sync(self.syncs, state)
        former, self.is_founder = self.is_founder, True  # a joiner alone would have nobody to take the state from
        try:
            return super().sync(state)
        finally:
            self.is_founder = former

    def leave(self) -> None:
        self.left = True
        super().leave()


def tiny(out: Path, **values: object) -> JobConfig:
    config = JobConfig(preset="tiny", batch=8, context=16, steps=20, warmup=5, eval_every=10, eval_samples=5)
    return config.replace(hash_every=5, sample_tokens=12, out=str(out), **values)


def run(config: JobConfig, *comms: Communicator) -> tuple[PeerResult | None, list[Event]]:
    events: list[Event] = []
    waiting = list(comms) or [Communicator.solo()]
    return run_peer(config, lambda: waiting.pop(0), events.append), events


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def test_one_peer_alone_has_the_bits_of_the_reference_and_tells_its_story(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    result, events = run(config)
    assert result is not None
    assert result.losses == reference.run(config).losses
    kinds = [event["event"] for event in events]
    assert kinds == ["joined", "synced", *["step"] * 10, "eval", *["step"] * 10, "eval", "traffic", "sample", "done"]
    assert [event["step"] for event in of_kind(events, "step")] == list(range(1, 21))
    assert all(event["loss"] < 6 and event["size"] == 1 and not event["repeats"] for event in of_kind(events, "step"))
    assert of_kind(events, "eval")[-1]["loss"] < of_kind(events, "eval")[0]["loss"]
    assert events[-1]["hash"] == result.hash
    assert of_kind(events, "sample")[0]["text"] == result.text != ""


def test_the_ledger_of_a_run_is_proven_and_holds_its_losses(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    result, _ = run(config)
    report = ledger.verify(tmp_path)
    assert result is not None
    assert report.ok, report.problems
    assert report.complete
    assert report.losses == result.losses
    assert (report.first_step, report.steps, report.samples, report.repeated) == (0, 20, 160, 0)


def test_the_result_on_disk_is_the_state_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    result, events = run(config)
    assert result is not None
    final = finals.load(Path(events[-1]["path"]))
    assert final.hash == result.hash
    assert final.state["step"] == 20
    assert JobConfig(**{**final.details["config"], "data": ()}) == config
    assert final.details["loss"] == result.losses[-1]


def test_steps_that_lost_a_member_are_repeated_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed, _ = run(tiny(tmp_path / "a"))
    comm = Rehearsal.solo()
    comm.on_step = lambda count: count in {1, 5, 6, 7, 15}
    disturbed, events = run(tiny(tmp_path / "b"), comm)
    assert undisturbed is not None
    assert disturbed is not None
    assert disturbed.hash == undisturbed.hash
    assert disturbed.losses == undisturbed.losses
    assert {event["step"]: event["repeats"] for event in of_kind(events, "step") if event["repeats"]} == {1: 1, 4: 3}
    report = ledger.verify(tmp_path / "b")
    assert report.ok, report.problems
    assert report.repeated == 4  # the fifth loss struck an evaluation


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, dtype: str) -> None:
    straight, _ = run(tiny(tmp_path / "straight", dtype=dtype))
    first, _ = run(tiny(tmp_path / "first", dtype=dtype, steps=10, decay_steps=20))
    resume = str(tmp_path / "first" / finals.FINAL)
    config = tiny(tmp_path / "second", dtype=dtype, resume=resume, lr=0.5, warmup=0)  # the state knows better
    second, _ = run(config)
    assert straight is not None
    assert first is not None
    assert second is not None
    assert second.hash == straight.hash
    assert first.losses + second.losses == straight.losses
    assert second.losses == reference.run(config).losses
    report = ledger.verify(tmp_path / "second")
    assert report.ok, report.problems
    assert (report.first_step, report.steps) == (10, 10)


def test_resuming_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run(tiny(tmp_path / "first", steps=3))
    resume = str(tmp_path / "first" / finals.FINAL)
    with pytest.raises(UsageError, match="is of step 3 and the run is to end after 3"):
        run(tiny(tmp_path / "a", resume=resume, steps=3))
    with pytest.raises(UsageError, match=r"batch \(4 here, 8 there\)"):
        run(tiny(tmp_path / "b", resume=resume, batch=4))


def test_all_sync_after_somebody_came_in(tmp_path: Path) -> None:
    comm = Rehearsal.solo()
    comm.on_admit = lambda count: count in {2, 3}
    _, events = run(tiny(tmp_path, steps=5), comm)
    assert [event["step"] for event in of_kind(events, "synced")] == [0, 2, 3]
    assert comm.admits == 4  # not after the last step: whoever comes then comes too late


def fill(target: dict[str, Any], source: dict[str, Any]) -> None:
    """Do what a sync does to a joiner's state."""
    for key, value in source.items():
        if isinstance(value, dict):
            fill(target[key], value)
        elif isinstance(value, torch.Tensor):
            target[key].copy_(value)
        else:
            target[key] = value


def test_an_evicted_peer_comes_back_as_a_new_member_with_the_others_state(tmp_path: Path) -> None:
    undisturbed, _ = run(tiny(tmp_path / "a"))
    states: list[dict[str, Any]] = []
    first, second, third = Rehearsal.solo(), Rehearsal.solo(), Rehearsal.solo()
    first.on_admit = lambda count: count == 7  # this run gives the state after step 7
    first.on_sync = lambda _count, state: states.append(copy.deepcopy(state))
    run(tiny(tmp_path / "b"), first)

    def evict(count: int) -> bool:
        if count == 2:
            raise Evicted("silent for 2 s")
        return False

    second.on_admit = evict
    third.name, third.is_founder = 2, False
    third.on_sync = lambda _count, state: fill(state, states[-1])
    result, events = run(tiny(tmp_path / "c"), second, third)
    assert result is not None
    assert undisturbed is not None
    assert result.hash == undisturbed.hash
    assert result.losses == undisturbed.losses[7:]
    assert of_kind(events, "evicted") == [{"event": "evicted", "member": 1, "message": "silent for 2 s"}]
    assert [(event["member"], event["founder"]) for event in of_kind(events, "joined")] == [(1, True), (2, False)]


def test_a_peer_that_is_evicted_before_it_was_in_tries_again(tmp_path: Path) -> None:
    tries: Iterator[Evicted | Communicator] = iter([Evicted("let in, and taken for dead"), Communicator.solo()])

    def join() -> Communicator:
        found = next(tries)
        if isinstance(found, Evicted):
            raise found
        return found

    assert run_peer(tiny(tmp_path), join, lambda event: None) is not None


def test_only_founders_read_the_file_to_resume_from(tmp_path: Path) -> None:
    run(tiny(tmp_path / "first", steps=3))
    joiner = Rehearsal.solo()
    joiner.is_founder = False
    _, events = run(tiny(tmp_path / "b", resume=str(tmp_path / "first" / finals.FINAL)), joiner)
    assert of_kind(events, "synced")[0]["step"] == 0


def test_a_peer_that_is_asked_to_leave_does_so_after_a_whole_step(tmp_path: Path) -> None:
    comm = Rehearsal.solo()
    leaving = threading.Event()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 4:
            leaving.set()

    assert run_peer(tiny(tmp_path), lambda: comm, report, leaving) is None
    assert comm.left
    assert events[-1] == {"event": "left", "member": 1, "step": 4}
    report_of_ledger = ledger.verify(tmp_path)
    assert report_of_ledger.ok
    assert not report_of_ledger.complete


@pytest.mark.parametrize("ending", [Evicted("too slow"), StateLost("nobody is left")])
def test_a_peer_that_comes_when_the_run_is_over_says_so(tmp_path: Path, ending: RingholdError) -> None:
    run(tiny(tmp_path, steps=3))

    def end(_count: int, _state: dict[str, Any]) -> None:
        raise ending

    joiner = Rehearsal.solo()
    joiner.name, joiner.is_founder, joiner.on_sync = 2, False, end
    result, events = run(tiny(tmp_path, steps=3), joiner)
    assert result is None
    assert events[-1] == {"event": "late"}


def test_a_lost_state_is_no_late_arrival_while_there_is_no_result(tmp_path: Path) -> None:
    def end(_count: int, _state: dict[str, Any]) -> None:
        raise StateLost("nobody is left")

    joiner = Rehearsal.solo()
    joiner.is_founder, joiner.on_sync = False, end
    with pytest.raises(StateLost):
        run(tiny(tmp_path), joiner)


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tiny(tmp_path, steps=3))
    with pytest.raises(UsageError, match="holds the result of another run"):
        run(tiny(tmp_path, steps=3))
    (tmp_path / finals.FINAL).unlink()
    with pytest.raises(UsageError, match="holds another run"):
        run(tiny(tmp_path, steps=3))


def test_a_share_that_is_missing_from_a_step_is_noticed(tmp_path: Path) -> None:
    class Dropping(Rehearsal):
        def all_reduce(self, tensor: torch.Tensor, *args: Any, **how: Any) -> Any:
            if tensor.dtype == torch.float64:
                tensor *= 0.75
            return super().all_reduce(tensor, *args, **how)

    with pytest.raises(RingholdError, match="summed 96 of 128 tokens"):
        run(tiny(tmp_path), Dropping.solo())


def test_a_loss_that_is_no_number_ends_the_run_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(RingholdError, match=r"the loss is nan at step .* lower learning rate"):
        run(tiny(tmp_path, lr=1e30, warmup=0))


def test_members_that_end_with_different_states_say_so(tmp_path: Path) -> None:
    class Lying(Rehearsal):
        def all_gather(self, tensor: torch.Tensor, *args: Any, **how: Any) -> Any:
            if tensor.numel() != 32:  # not a hash
                return super().all_gather(tensor, *args, **how)
            return Outcome(torch.stack((tensor, tensor + 1)), (1, 2), 1, 1, False)

    with pytest.raises(StateDiverged, match=r"different states: .* on 1, .* on 2"):
        run(tiny(tmp_path, steps=2), Lying.solo())
    assert not finals.exists(tmp_path)


def test_the_callers_generator_and_threads_are_left_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(tiny(tmp_path, steps=2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
