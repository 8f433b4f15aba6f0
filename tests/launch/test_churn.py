"""The churn lab's own parts: plans that replay, a judge that finds what is wrong, a command that refuses nonsense."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import save
from collectives import choice, faults
from collectives.communicator import Communicator
from collectives.errors import Unsupported, UsageError
from collectives.state import state_hash
from launch import churn, churn_cases, console, mpirun
from launch.churn_audit import Audit
from launch.churn_cases import KINDS_OF_OPERATIONS, Workbench, case_of, contribution
from launch.churn_peer import PHASES
from launch.churn_plan import KINDS, Plan, parse_kinds
from launch.churn_report import prove_checkpoints


def plan(seed: int, **given: Any) -> Plan:
    return Plan(seed, KINDS, KINDS_OF_OPERATIONS, 0.5, 2.0, **{"data": True, **given})


def test_a_seed_gives_one_plan_and_another_seed_another() -> None:
    blows = [plan(7).blow(index) for index in range(200)]
    assert blows == [plan(7).blow(index) for index in reversed(range(200))][::-1]
    assert blows != [plan(8).blow(index) for index in range(200)]


def test_a_plan_has_every_fault_equally_often_and_lands_everywhere() -> None:
    blows = [plan(1).blow(index) for index in range(4000)]
    assert {kind: sum(blow.kind == kind for blow in blows) for kind in KINDS} == dict.fromkeys(KINDS, 500)
    lethal = [blow for blow in blows if blow.kind in ("kill", "stop")]
    assert {blow.phase for blow in lethal} == {"", "join", *PHASES}
    aims = [blow.aim for blow in lethal if blow.aim is not None]
    assert {aim.point for aim in aims} == set(faults.POINTS)
    assert {aim.op for aim in aims} == {"", *KINDS_OF_OPERATIONS}
    assert {blow.variant for blow in blows} == {"", "stop", "hold", "kill", "data", "control"}
    assert any(blow.echo is not None for blow in blows if blow.kind == "coordinator")
    assert all(0.5 <= blow.pause <= 2.0 for blow in blows)


def test_frames_of_data_are_left_alone_where_nothing_would_notice() -> None:
    blows = [plan(1, data=False).blow(index) for index in range(400)]
    assert {blow.variant for blow in blows if blow.kind == "corrupt"} == {"control"}


def test_names_of_faults() -> None:
    assert parse_kinds("all") == KINDS
    assert parse_kinds("stop, kill") == ("kill", "stop")
    with pytest.raises(UsageError, match="no fault 'flood'"):
        parse_kinds("kill,flood")


def test_every_operation_is_among_the_cases() -> None:
    assert set(choice.kinds()) <= set(KINDS_OF_OPERATIONS)
    drawn = [case_of(3, number, KINDS_OF_OPERATIONS) for number in range(3000)]
    assert {case.kind for case in drawn} == set(KINDS_OF_OPERATIONS)
    assert all(case.elements * case.dtype.itemsize <= churn_cases.LARGEST for case in drawn)


def test_contributions_differ_by_member_operation_and_place() -> None:
    one = contribution(1, 5, 1000, torch.int32)
    assert torch.equal(one, contribution(1, 5, 1000, torch.int32))
    assert torch.equal(one[:10], contribution(1, 5, 10, torch.int32))
    assert len(one.unique()) > 990  # type: ignore[no-untyped-call]
    for member, number in ((2, 5), (1, 6)):
        assert (one != contribution(member, number, 1000, torch.int32)).sum() > 990


@pytest.mark.parametrize("kind", [kind for kind in KINDS_OF_OPERATIONS if kind != "send_recv"])
def test_the_expected_value_is_that_of_a_member_alone(kind: str) -> None:
    comm = Communicator.solo()
    for number in range(10):
        trial = Workbench(comm, case_of(number, number, (kind,), 4096)).trial()
        outcome = trial.call()
        expected = trial.expected(outcome)
        results = list(outcome.results) or ([outcome.result] if outcome.result is not None else [])
        assert expected is None or all(map(torch.equal, results, expected))


def op(number: int = 1, **given: Any) -> dict[str, Any]:
    return {
        "type": "op",
        "time": 1.0,
        "number": number,
        "operation": "all_reduce",
        "bytes": 8,
        "done": 1.0,
        "contributors": [1, 2],
        "attempts": 1,
        "from_staging": False,
        "epoch": 3,
        "digest": "d",
        "history": "h",
        "wrong": [],
        **given,
    }


def synced(member: int, **given: Any) -> dict[str, Any]:
    common = {"type": "synced", "time": 5.0, "number": 4, "state": "s", "winner": "s", "healed": True, "givers": [1]}
    return {**common, "member": member, **given}


def saved(state: str) -> dict[str, Any]:
    return {"type": "saved", "time": 6.0, "number": 28, "state": state, "lost": 0}


def joined(member: int, when: float, founder: bool) -> dict[str, Any]:
    return {"type": "joined", "time": when, "member": member, "epoch": 2, "founder": founder}


def usage(**given: int) -> dict[str, Any]:
    before = {"python_threads": 1, "threads": 2, "descriptors": 9, "rss": 1 << 20}
    return {
        "type": "usage",
        "time": 9.0,
        "lives": 1,
        "before": before,
        "after": {**before, **given},
        "threads": [],
        "lent": {},
    }


WRONG: list[tuple[list[tuple[int, dict[str, Any]]], str]] = [
    ([(0, op(wrong=["it is not the sum"]))], "operation 1 of peer 0: it is not the sum"),
    ([(0, op()), (1, op(digest="e"))], "peer 1 has"),
    ([(0, op()), (1, op(contributors=[1]))], "peer 1 has"),
    ([(0, op()), (1, op(history="other"))], "peer 1 has"),
    ([(0, op()), (1, op(contributors=[], attempts=0, epoch=0, digest=""))], "peer 1 has"),
    ([(0, joined(1, 1.0, True)), (0, synced(1, winner="w"))], "synced to w and holds s"),
    ([(0, joined(1, 1.0, True)), (0, synced(1)), (1, synced(2, state="t", winner="t"))], "the state of operation 4"),
    ([(0, joined(1, 1.0, False)), (0, synced(1))], "given by members [1], not healed then"),
    ([(0, joined(1, 1.0, True)), (1, synced(2, givers=[1, 9]))], "given by members [9], not healed then"),
    ([(0, saved("a")), (1, saved("b"))], "checkpoint 28: peer 1 saved b, peer 0 a"),
    ([(0, {"type": "failed", "time": 1.0, "error": "StateLost", "message": "m"})], "ended with StateLost"),
    ([(0, joined(1, 1.0, True)), (0, {"type": "event", "event": "epoch", "time": 1.0, "epoch": 2})], "after 2"),
]


@pytest.mark.parametrize(("said", "complaint"), WRONG)
def test_the_audit_finds_what_is_wrong(said: list[tuple[int, dict[str, Any]]], complaint: str) -> None:
    audit = Audit()
    for peer, message in said:
        audit.hear(peer, message)
    audit.close()
    assert len(audit.wrong) == 1
    assert complaint in audit.wrong[0]


@pytest.mark.parametrize("what", ["python_threads", "threads", "descriptors"])
def test_the_audit_finds_leaks(what: str) -> None:
    audit = Audit()
    audit.hear(3, usage())
    audit.hear(4, usage(rss=1 << 24))
    assert not audit.leaks
    audit.hear(5, usage(**{what: 12}))
    audit.hear(6, usage(rss=1 << 29))
    assert len(audit.leaks) == 2
    assert what in audit.leaks[0]
    assert "511 MiB" in audit.leaks[1]


def test_what_is_right_is_no_complaint() -> None:
    audit = Audit()
    said = [(0, joined(1, 1.0, True)), (1, joined(2, 2.0, False)), (0, op()), (1, op())]
    said += [(0, synced(1)), (1, synced(2)), (1, synced(2, number=8, time=7.0, givers=[1, 2]))]
    for peer, message in said:
        audit.hear(peer, message)
    audit.close()
    assert (audit.wrong, audit.operations.total(), audit.syncs) == ([], 2, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "1..3"], "two numbers from 2 to 64"),
        (["--peers", "many"], "no number, or two with .. between"),
        (["--ops", "sum"], "there is no operation 'sum'"),
        (["--ops", ","], "names no operation"),
        (["--every", "0"], "the first number must be positive"),
        (["--transport", "shm", "--faults", "partition"], "shared memory is within one host"),
        (["--transport", "mpi", "--faults", "partition"], "the ranks that one mpirun starts here share a host"),
        (["--transport", "pigeon"], "unknown transport 'pigeon'"),
        (["--out", "used"], "is not empty"),
        (["--json", "missing/figures.json"], "cannot write missing/figures.json: No such file or directory"),
        (["--seconds", "nan"], "nan is no finite number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert console.run(churn.command, arguments) == 2
    assert said in capsys.readouterr().err


def test_faults_that_cannot_be_had_here_are_left_out_of_all_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    kinds, left_out = churn._possible(KINDS, "gloo", strict=False)
    assert "partition" not in kinds
    assert "need root" in left_out["partition"]
    with pytest.raises(Unsupported, match=r"--faults partition: .* need root"):
        churn._possible(("kill", "partition"), "gloo", strict=True)


def test_over_mpi_the_launcher_must_be_one_that_outlives_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpirun, "find", lambda: ("/usr/bin/mpiexec", "/usr/bin", False))
    with pytest.raises(Unsupported, match="mpiexec is not Open MPI's"):
        churn._possible(("kill",), "mpi", strict=True)


def test_checkpoints_are_loaded_and_compared_with_what_members_saved(tmp_path: Path) -> None:
    state = {"number": torch.tensor([28]), "weights": torch.arange(5)}
    save(tmp_path, state, step=28)
    right = {28: (0, state_hash(state)[:32])}
    assert prove_checkpoints(tmp_path, right) == []
    assert f"checkpoint 28, of which peer 0 saved {'f' * 32}: " in prove_checkpoints(tmp_path, {28: (0, "f" * 32)})[0]
    assert "is not there" in prove_checkpoints(tmp_path, {**right, 42: (1, "f" * 32)})[0]
    assert prove_checkpoints(tmp_path / "nothing", {}) == []
    next(tmp_path.rglob("*.pack")).unlink()
    assert any("is not there" in text for text in prove_checkpoints(tmp_path, right))
