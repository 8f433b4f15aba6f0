"""Training end to end: real peers, a real coordinator, churn, signals, launchers; and what the run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from collectives.errors import UsageError
from launch import session, train
from launch.environment import Launcher
from launch.record import read_log

SMALL = ["--batch", "8", "--context", "16", "--quiet"]
TOKEN = "a-token-that-nobody-should-ever-see"


def start(out: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    environ = {**os.environ, "RINGHOLD_TOKEN": TOKEN, "XDG_RUNTIME_DIR": str(out.parent)}
    command = [*launcher, "-m", "launch.train", "--out", str(out), *SMALL, *arguments]
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(popen: subprocess.Popen[str], timeout: float = 90.0) -> tuple[int, str, str]:
    try:
        out, err = popen.communicate(timeout=timeout)
    finally:
        popen.kill()
    return popen.returncode, out, err


def until(condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"never saw: {what}"
        time.sleep(0.05)


def started(out: Path) -> dict[str, int]:
    """Pids of all processes that the run has started."""
    log = read_log(out / "run.jsonl")
    return {entry["peer"]: entry["pid"] for entry in log if entry["type"] == "started"}


def trains(out: Path, step: int = 1) -> bool:
    """Whether some peer has reached `step`."""
    try:
        return any(entry["type"] == "progress" and entry["step"] >= step for entry in read_log(out / "run.jsonl"))
    except (OSError, json.JSONDecodeError):
        return False


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def reveals_token(out: Path) -> list[str]:
    return [str(path) for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_churn_of_every_kind_and_a_right_result(tmp_path: Path) -> None:
    out = tmp_path / "run"
    churn = "kill@2,stop@4,join@8,leave@14,coordinator@17"
    sizes = ("--peers", "4", "--steps", "24", "--pace", "0.05", "--dtype", "fp64")
    popen = start(out, *sizes, "--churn", churn, "--reference", "--json")
    until(lambda: trains(out), "a first step")
    for pid in (popen.pid, *started(out).values()):
        assert TOKEN not in " ".join(psutil.Process(pid).cmdline())
    code, text, err = finish(popen)
    assert code == 0, text + err
    summary: dict[str, Any] = json.loads(text)
    checks = {check["name"]: check["ok"] for check in summary["checks"]}
    assert checks == dict.fromkeys(("run", "peers", "faults", "state", "ledger", "reference"), True)
    assert (summary["ok"], summary["steps"]) == (True, 24)
    assert len(set(summary["hashes"].values())) == 1
    assert summary["loss"] == pytest.approx(summary["reference_loss"], abs=1e-12)
    faults = {fault["fault"]: fault for fault in summary["faults"]}
    assert faults["kill"]["detail"].startswith("in ")
    for kind in ("kill", "stop"):
        assert 0 < faults[kind]["detected"] <= faults[kind]["reformed"] <= faults[kind]["recovered"]
    assert faults["coordinator"]["back"] > 0
    assert faults["join"]["back"] > 0
    assert json.loads((out / "summary.json").read_text()) == summary
    assert all(gone(pid) for pid in started(out).values())
    assert (out / "final.safetensors").exists()
    assert reveals_token(tmp_path) == []


def test_the_seed_replays_the_plan() -> None:
    arguments = ["--churn-rate", "10", "--seed", "5"]
    first, again = (train.make_request(None, **train.options(arguments)) for _ in range(2))
    other = train.make_request(None, **train.options([*arguments[:-1], "6"]))
    assert first.faults == again.faults != other.faults
    assert first.faults


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_command_is_the_end_of_all(tmp_path: Path, number: signal.Signals) -> None:
    """With a stopped peer, as in the middle of a fault."""
    out = tmp_path / "run"
    popen = start(out, "--peers", "2", "--steps", "5000", "--pace", "0.05")
    until(lambda: trains(out), "a first step")
    pids = started(out)
    os.kill(pids["peer-1"], signal.SIGSTOP)
    popen.send_signal(number)
    code, _, _ = finish(popen, 20)
    assert code == (130 if number == signal.SIGINT else -number)
    assert sorted(pids) == ["coordinator", "peer-0", "peer-1"]
    until(lambda: all(gone(pid) for pid in pids.values()), "the end of every child", timeout=2.0)


def test_a_peer_that_somebody_kills_fails_the_run_and_restart_mends_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    popen = start(out, "--peers", "2", "--steps", "30", "--pace", "0.15", "--restart", "--json")
    until(lambda: trains(out, 2), "a second step")
    os.kill(started(out)["peer-1"], signal.SIGKILL)
    code, text, err = finish(popen)
    assert code == 0, text + err
    names = [peer["name"] for peer in json.loads(text)["peers"]]
    assert names == ["peer-0", "peer-1", "peer-1.1"]


def test_peers_that_fail_alike_give_their_exit_code_and_their_words(tmp_path: Path) -> None:
    (tmp_path / "wrong.safetensors").write_bytes(b"no state at all")
    arguments = ("--peers", "2", "--steps", "5", "--resume", str(tmp_path / "wrong.safetensors"))
    code, text, err = finish(start(tmp_path / "run", *arguments))
    assert code == 4
    assert "CorruptFile" in text
    assert "Traceback" not in text + err


def test_torchrun_starts_supervisors_that_outlive_their_peers(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    out = tmp_path / "run"
    churn = "kill@2:0,join@10"
    arguments = ("--steps", "34", "--pace", "0.2", "--churn", churn, "--json")
    code, text, err = finish(start(out, *arguments, launcher=torchrun))
    assert code == 0, text + err
    (line,) = text.splitlines()  # rank 0 alone speaks
    summary = json.loads(line)
    assert {peer["name"]: peer["code"] for peer in summary["peers"]} == {"peer-0": -9, "peer-0.1": 0, "peer-1": 0}
    assert [fault["fault"] for fault in summary["faults"]] == ["kill", "join"]
    assert not any((tmp_path / "ringhold").iterdir())  # the supervisors' meeting place
    assert reveals_token(tmp_path) == []


def test_hosts_need_a_coordinator_that_all_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGHOLD_COORDINATOR", raising=False)
    launcher = Launcher("openmpi", 1, 4, 0, 2)
    request = train.make_request(launcher, **train.options(["--out", str(tmp_path / "run")]))
    with pytest.raises(UsageError, match="RINGHOLD_COORDINATOR=HOST:PORT"):
        session.perform(request, launcher)
    with pytest.raises(UsageError, match="drop --peers"):
        train.make_request(launcher, **train.options(["--peers", "3"]))
