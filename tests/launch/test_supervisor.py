"""Supervision of real processes: churn, restarts, signals, and that nothing outlives the supervisor."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from launch import injector, supervisor
from launch.faults import parse, plan
from launch.process import Child, Inbox, end_all
from launch.record import RunLog, RunRecord, read_log
from launch.supervisor import Spec, Supervisor

TOY = str(Path(__file__).with_name("toy.py"))


def spec(
    tmp_path: Path, *toy: str, peers: int = 2, churn: str = "", steps: int = 20, pause: float = 0.03, **given: Any
) -> Spec:
    planned = plan(parse(churn), peers, steps, 1, points=("staged",))
    values: dict[str, Any] = {
        "slots": tuple(range(peers)),
        "out": tmp_path,
        "environ": {**os.environ, "TOY_MEETING": str(tmp_path / "meeting"), "TOY_FOUNDERS": str(peers)},
        "peer": [sys.executable, TOY, "peer", str(steps), str(pause), *toy],
        "start": {"config": {}},
        "coordinator": [sys.executable, TOY, "coordinator"],
        "address": "127.0.0.1:0",
        "door": lambda address: 0,
        "steps": steps,
        "faults": planned,
        "heartbeat_timeout": 0.1,
        "timeout": 20.0,
    }
    return Spec(**{**values, **given})


def living_children() -> set[int]:
    """Processes below this one; other tests of this process may keep some."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def run(given: Spec) -> tuple[RunRecord, list[dict[str, Any]]]:
    entries: list[dict[str, Any]] = []
    before = living_children()
    record = Supervisor(given, entries.append).run()
    assert living_children() <= before
    return record, entries


def until(condition: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"never saw: {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_quiet_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.jsonl")
    record = Supervisor(spec(tmp_path), log).run()
    log.close()
    assert [(peer.name, peer.code, peer.step, peer.result) for peer in record.peers] == [
        ("peer-0", 0, 20, {"hash": "same"}),
        ("peer-1", 0, 20, {"hash": "same"}),
    ]
    assert (tmp_path / "logs" / "peer-0.log").read_text() == "the toy began\n"
    assert {entry["type"] for entry in read_log(tmp_path / "run.jsonl")} >= {
        "started",
        "listening",
        "progress",
        "done",
        "exit",
    }
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_every_kind_of_fault_strikes_and_is_seen(tmp_path: Path) -> None:
    record, _ = run(spec(tmp_path, peers=4, steps=90, churn="kill@3,stop@5,join@7,coordinator@9,leave@11"))
    kill, stop, join, coordinator, leave = record.faults
    assert all(fault.fired is not None for fault in record.faults)
    assert kill.detail.startswith("in staged of all_reduce")
    assert all(fault.ended is not None for fault in (stop, join, coordinator, leave))
    assert stop.ended is not None
    assert stop.fired is not None
    assert stop.ended - stop.fired > 1.5
    codes = {peer.name: (peer.code, peer.planned_end) for peer in record.peers}
    assert codes[kill.peer] == (-signal.SIGKILL, "kill")
    assert codes[leave.peer] == (0, "leave")
    assert codes["peer-4"][0] == 0
    assert len(next(peer for peer in record.peers if peer.name == stop.peer).members) == 2
    assert record.coordinator_deaths == 0


def test_faults_strike_at_their_very_step(tmp_path: Path) -> None:
    """Peers wait at the step of a fault until it was sent: the same seed gives the same run."""
    record, _ = run(spec(tmp_path, peers=3, steps=20, pause=0.05, churn="kill@8:0,join@12,leave@16:1"))
    assert all(fault.fired is not None for fault in record.faults)
    steps = {peer.name: peer.step for peer in record.peers}
    assert steps["peer-0"] <= 8
    assert steps["peer-1"] <= 16
    assert steps["peer-2"] == 20


def test_the_last_step_waits_for_who_returns(tmp_path: Path) -> None:
    """Fast steps leave a stopped peer no time to come back; the others hold before the last one."""
    record, _ = run(spec(tmp_path, peers=2, steps=6, pause=0.01, churn="stop@2:1,coordinator@3"))
    assert all(fault.ended is not None for fault in record.faults)


def test_the_last_worker_is_never_taken(tmp_path: Path) -> None:
    """The plan lets a kill follow a stop; on the spot it waits until the stopped peer works again."""
    record, _ = run(spec(tmp_path, peers=2, steps=80, churn="stop@2:0,kill@3:1"))
    stop, kill = record.faults
    assert stop.ended is not None
    assert kill.injected is not None
    assert kill.injected > stop.ended


def test_a_lost_peer_is_restarted_on_request(tmp_path: Path) -> None:
    record, _ = run(spec(tmp_path, "crash", peers=1, restart=True))
    assert [peer.name for peer in record.peers] == ["peer-0", "peer-0.1", "peer-0.2", "peer-0.3"]
    record, _ = run(spec(tmp_path, "crash", peers=1))
    assert [(peer.name, peer.code, peer.result) for peer in record.peers] == [("peer-0", -9, None)]


def test_an_error_of_a_peer_is_kept_and_not_retried(tmp_path: Path) -> None:
    record, _ = run(spec(tmp_path, "error", peers=1, restart=True))
    (peer,) = record.peers
    assert peer.error == {"error": "UsageError", "message": "no such file", "exit_code": 2}
    assert peer.tail.endswith("the toy broke")


def test_a_coordinator_that_cannot_start_ends_the_run(tmp_path: Path) -> None:
    record, _ = run(spec(tmp_path, address="127.0.0.1:1"))
    assert record.coordinator_error == {"message": "port 1 is in use", "exit_code": 2}


def test_a_coordinator_killed_by_somebody_is_started_again(tmp_path: Path) -> None:
    given = spec(tmp_path, peers=1, steps=40)
    watched = Supervisor(given, lambda entry: None)

    def kill() -> None:
        until(lambda: watched.step > 3, "step 3")
        assert watched.coordinator is not None
        watched.coordinator.signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    record = watched.run()
    thread.join()
    assert record.coordinator_deaths == 1
    assert record.peers[0].code == 0


def test_a_peer_that_comes_when_all_is_over_is_dismissed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could wait for ever: there is nobody left to let it in."""
    monkeypatch.setattr(injector, "_KNOCK_TIMEOUT", 0.3)
    monkeypatch.setattr(supervisor, "_LATE_GRACE", 0.3)
    record, _ = run(spec(tmp_path, "shut-out", peers=2, steps=5, churn="join@3"))
    assert [(peer.name, peer.planned_end, peer.code) for peer in record.peers] == [
        ("peer-0", "", 0),
        ("peer-1", "", 0),
        ("peer-2", "late", -signal.SIGTERM),
    ]
    assert record.faults[0].fired is None


def test_no_progress_and_too_long_are_timeouts(tmp_path: Path) -> None:
    record, _ = run(spec(tmp_path, peers=1, pause=30.0, stall=0.5))
    assert "no peer made progress for 0.5 s" in record.timeout
    record, _ = run(spec(tmp_path, peers=1, timeout=0.4, pause=0.2))
    assert "did not end within 0.4 s" in record.timeout


def test_a_killed_peer_of_a_launch_is_brought_back(tmp_path: Path) -> None:
    """Under a launcher a supervisor sees one peer only; a join starts it anew when the others reach the step."""

    class Others:
        begin = time.monotonic()

        def furthest(self) -> int:
            return int((time.monotonic() - self.begin) / 0.03)

        def need_us(self) -> bool:
            return False

    faults = tuple(f for f in plan(parse("kill@3,join@30"), 2, 60, 1, points=("staged",), revive=True))
    slot = faults[0].slot
    assert slot is not None
    record, _ = run(spec(tmp_path, peers=1, slots=(slot,), faults=faults, others=Others(), steps=20))
    assert [(peer.name, peer.code) for peer in record.peers] == [(f"peer-{slot}", -9), (f"peer-{slot}.1", 0)]


SUPERVISE = """
import sys, json, os, signal
from pathlib import Path
from launch.supervisor import Spec, Supervisor
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
out, toy, misdeed = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def tell(entry):
    print(json.dumps(entry), flush=True)
record = Supervisor(Spec(slots=(0, 1), out=out,
    environ={**os.environ, "TOY_MEETING": str(out / "meeting"), "TOY_FOUNDERS": "2"},
    peer=[sys.executable, toy, "peer", "9999", "0.05", misdeed], start={},
    coordinator=[sys.executable, toy, "coordinator"], address="127.0.0.1:0", door=lambda address: 0,
    steps=9999), tell).run()
sys.exit(128 + record.signal)
"""


def supervise(tmp_path: Path, misdeed: str = "") -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    """Start a supervisor of two endless toys in a process of its own; return it and its children's pids."""
    popen = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), TOY, misdeed], stdout=subprocess.PIPE)
    assert popen.stdout is not None
    pids: dict[str, int] = {}
    working: set[str] = set()
    while working != {"peer-0", "peer-1"}:
        entry = json.loads(popen.stdout.readline())
        if entry["type"] == "started":
            pids[entry["peer"]] = entry["pid"]
        if entry["type"] == "progress":
            working.add(entry["source"])
    return popen, pids


def finish(popen: subprocess.Popen[bytes]) -> int:
    popen.communicate(timeout=10)
    return popen.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    popen, pids = supervise(tmp_path)
    os.kill(pids["peer-1"], signal.SIGSTOP)
    popen.send_signal(number)
    assert finish(popen) == 128 + number
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids.values())


def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    popen, pids = supervise(tmp_path, "deaf")
    popen.send_signal(signal.SIGINT)
    assert finish(popen) == 130
    assert all(gone(pid) for pid in pids.values())


def test_sigkill_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    popen, pids = supervise(tmp_path, "deaf")
    os.kill(pids["peer-1"], signal.SIGSTOP)
    popen.kill()
    finish(popen)
    until(lambda: all(gone(pid) for pid in pids.values()), "the end of every child, the stopped one too", timeout=2.0)


def test_the_children_are_out_of_the_terminals_reach(tmp_path: Path) -> None:
    """Ctrl-C goes to the foreground process group: no child may be in it."""
    popen, pids = supervise(tmp_path)
    groups = {os.getpgid(pid) for pid in pids.values()}
    assert os.getpgid(popen.pid) not in groups
    popen.terminate()
    assert finish(popen) == 143


ORPHAN = """
import os, sys, time
from launch.child import PARENT_PID, Link
os.environ[PARENT_PID] = sys.argv[1] if sys.argv[1] != "mine" else os.environ[PARENT_PID]
link = Link.enter()
link.listen(lambda command: None)
link.report("ready")
time.sleep(60)
"""


def orphan(tmp_path: Path, parent: str) -> tuple[Child, Inbox]:
    inbox: Inbox = queue.SimpleQueue()
    return Child(
        "toy", [sys.executable, "-c", ORPHAN, parent], os.environ, log=tmp_path / "toy.log", inbox=inbox
    ), inbox


def test_a_child_whose_parent_is_another_already_ends(tmp_path: Path) -> None:
    child, inbox = orphan(tmp_path, "1")
    assert inbox.get(timeout=5)[1]["code"] == 75
    child.close()


def test_the_end_of_the_control_pipe_ends_the_child(tmp_path: Path) -> None:
    child, inbox = orphan(tmp_path, "mine")
    assert inbox.get(timeout=5) == ("toy", {"type": "ready", "time": pytest.approx(time.time(), abs=5)})
    assert child.popen.stdin is not None
    child.popen.stdin.close()
    assert inbox.get(timeout=5)[1]["code"] == 75
    child.close()


def test_noise_on_the_report_pipe_harms_nobody(tmp_path: Path) -> None:
    inbox: Inbox = queue.SimpleQueue()
    noisy = "import os; os.write(int(os.environ['RINGHOLD_REPORT_FD']), bytes.fromhex('%s'))"
    noisy %= b'\xff\n[1]\n{"type": 3}\n{"type": "x"}'.hex()
    child = Child("toy", [sys.executable, "-c", noisy], os.environ, log=tmp_path / "toy.log", inbox=inbox)
    kinds = [inbox.get(timeout=5)[1]["type"] for _ in range(5)]
    assert kinds == ["malformed", "malformed", "malformed", "x", "exit"]
    assert not child.send({"do": "start"}) or not child.send({"do": "start"})
    end_all([child])
