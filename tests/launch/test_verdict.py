"""Judging records and timing recoveries: pure functions, on records made by hand."""

from pathlib import Path
from typing import Any

import pytest

from launch import ledger, proofs, reference
from launch.config import JobConfig
from launch.faults import Planned
from launch.narrate import Narrator
from launch.record import FaultRecord, PeerRecord, RunRecord
from launch.timeline import recoveries
from launch.verdict import exit_code, judge


def peer(slot: int, **given: Any) -> PeerRecord:
    values: dict[str, Any] = {"members": [slot + 1], "step": 9, "code": 0, "result": {"hash": "ab"}}
    return PeerRecord(f"peer-{slot}", slot, 100 + slot, "ended", **{**values, **given})


def killed(slot: int, **given: Any) -> PeerRecord:
    return peer(slot, code=-9, result=None, **given)


def fault(kind: Any = "kill", slot: int | None = 1, **given: Any) -> FaultRecord:
    values: dict[str, Any] = {"peer": f"peer-{slot}", "member": 2, "injected": 10.0, "fired": 10.5}
    return FaultRecord(Planned(0, kind, 3, slot), **{**values, **given})


def failed(record: RunRecord) -> tuple[int, dict[str, str]]:
    checks = judge(record)
    return exit_code(record, checks), {check.name: check.detail for check in checks if not check.ok}


def test_a_run_as_planned_passes() -> None:
    record = RunRecord([peer(0), killed(1, planned_end="kill"), peer(2)], [fault()])
    assert failed(record) == (0, {})


def test_a_peer_that_left_or_came_late_is_no_loss() -> None:
    record = RunRecord([peer(0), peer(1, result=None, planned_end="leave"), peer(2, result=None, planned_end="late")])
    assert failed(record) == (0, {})


@pytest.mark.parametrize(
    ("record", "code", "check", "word"),
    [
        (RunRecord([peer(0), killed(1)]), 3, "peers", "--restart"),
        (RunRecord([peer(0), peer(1, code=1, result=None)]), 1, "peers", "code 1"),
        (RunRecord([peer(0), peer(1, result={"hash": "cd"})]), 1, "state", "differ"),
        (RunRecord([peer(0), peer(1)], [fault(fired=None)]), 1, "faults", "nothing happened"),
        (RunRecord([peer(0), peer(1)], [fault(injected=None, fired=None)]), 1, "faults", "never came"),
        (RunRecord([peer(0), peer(1)], [fault("stop")]), 1, "faults", "did not come back"),
        (RunRecord([peer(0)], [fault("coordinator", None)]), 1, "faults", "did not come back"),
        (RunRecord([peer(0)], timeout="too slow"), 124, "run", "too slow"),
        (RunRecord([killed(0)], signal=2), 130, "run", "SIGINT"),
        (RunRecord([], coordinator_error={"message": "in use", "exit_code": 2}), 2, "run", "in use"),
        (RunRecord([killed(0), killed(1)]), 3, "run", "nobody"),
    ],
)
def test_what_fails_a_run(record: RunRecord, code: int, check: str, word: str) -> None:
    found, reasons = failed(record)
    assert found == code
    assert word in reasons[check]


def test_the_error_that_peers_name_decides_the_exit_code() -> None:
    error = {"error": "CorruptFile", "message": "damaged", "exit_code": 4}
    record = RunRecord([peer(i, code=4, result=None, error=error) for i in range(3)])
    assert failed(record)[0] == 4


def test_a_lost_peer_that_was_replaced_is_no_failure() -> None:
    again = peer(1)
    again.name = "peer-1.1"
    assert failed(RunRecord([peer(0), killed(1), again])) == (0, {})


def event(source: str, time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"source": source, "time": time, "type": "event", "event": kind, **fields}


def epoch(
    source: str, time: float, number: int, members: list[int], lost: list[int], joined: list[int]
) -> dict[str, Any]:
    return event(source, time, "epoch", epoch=number, members=members, lost=lost, joined=joined)


LOG = [
    {"source": "supervisor", "time": 100.0, "type": "started"},
    event("peer-2", 109.0, "fenced", epoch=1),
    event("peer-0", 110.6, "fenced", epoch=2),
    event("peer-2", 110.7, "fenced", epoch=2),
    epoch("peer-0", 110.8, 2, [1, 3], [2], []),
    epoch("peer-2", 110.9, 2, [1, 3], [2], []),
    event("peer-0", 111.0, "recovered", epoch=2),
    event("peer-2", 111.1, "recovered", epoch=2),
    epoch("peer-0", 120.2, 3, [1, 3, 4], [], [4]),
    {"source": "peer-3", "time": 120.3, "type": "joined", "member": 4, "epoch": 3},
    event("peer-0", 120.5, "recovered", epoch=3),
]


def test_the_times_of_a_recovery() -> None:
    kill = fault(injected=110.0, fired=110.5, detail="in staged")
    join = fault("join", 3, injected=120.0, fired=120.3, ended=120.3, member=None)
    coordinator = fault("coordinator", None, peer="coordinator", injected=115.0, fired=115.0, ended=116.5)
    first, second, third = recoveries([kill, join, coordinator], LOG)
    assert (first.fault, second.fault, third.fault) == ("kill", "coordinator", "join")
    assert first.at == pytest.approx(10.5)
    assert [first.detected, first.reformed, first.recovered] == [pytest.approx(t) for t in (0.1, 0.4, 0.6)]
    assert (first.epoch, first.survivors, first.back) == (2, 2, None)
    assert (second.back, second.detected) == (1.5, None)
    assert (third.epoch, third.survivors) == (3, 2)
    assert third.back == pytest.approx(0.3)


def test_a_fault_without_consequences_has_no_times() -> None:
    (found,) = recoveries([fault(injected=130.0, fired=None)], LOG)
    assert (found.detected, found.reformed, found.recovered, found.epoch) == (None, None, None, None)


def test_what_several_say_is_told_once() -> None:
    narrator = Narrator()
    told = [line for entry in LOG if (line := narrator.tell(entry))]
    assert told == [
        "epoch 2: 2 members, lost member 2",
        "epoch 3: 3 members, joined member 4",
        "peer-3 is member 4 of epoch 3",
    ]


def write_ledger(out: Path, config: JobConfig, losses: tuple[float, ...]) -> None:
    """The ledger of a run by one member."""
    from launch import data

    corpus = data.load(config.data, config.context, config.batch)
    plan = data.Plan(corpus.windows, config.batch, config.seed)
    with_one = ledger.Ledger(out, 1)
    with_one.write(ledger.Start(1, 0, corpus.windows, config.batch, config.seed))
    for step, loss in enumerate(losses):
        with_one.write(ledger.Samples(step, 0, 1, tuple(plan.samples(step))))
        with_one.write(ledger.Commit(step, 0, 1, (1,), loss))
    with_one.write(ledger.Done(len(losses), "ab"))
    with_one.close()


@pytest.fixture(scope="module")
def undisturbed() -> reference.Reference:
    return reference.run(JobConfig(steps=4, batch=4, context=16))


def prove(tmp_path: Path, losses: tuple[float, ...]) -> dict[str, bool]:
    config = JobConfig(steps=4, batch=4, context=16, out=str(tmp_path))
    write_ledger(tmp_path, config, losses)
    proven = proofs.prove(config, against_reference=True, control=True, tell=lambda line: None)
    return {check.name: check.ok for check in proven.checks}


def test_the_proofs_hold_for_a_right_run(tmp_path: Path, undisturbed: reference.Reference) -> None:
    assert prove(tmp_path, undisturbed.losses) == {"ledger": True, "reference": True, "negative control": True}


def test_the_proofs_refuse_a_wrong_or_short_run(tmp_path: Path, undisturbed: reference.Reference) -> None:
    wrong = (*undisturbed.losses[:3], undisturbed.losses[3] + 1e-3)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "short").mkdir()
    assert prove(tmp_path / "wrong", wrong) == {"ledger": True, "reference": False, "negative control": True}
    assert prove(tmp_path / "short", undisturbed.losses[:3]) == {
        "ledger": False,
        "reference": False,
        "negative control": True,
    }


def test_no_ledger_is_no_proof(tmp_path: Path) -> None:
    config = JobConfig(out=str(tmp_path))
    proven = proofs.prove(config, against_reference=False, control=False, tell=lambda line: None)
    assert [check.ok for check in proven.checks] == [False]
