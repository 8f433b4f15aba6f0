"""The doctor: checks by doing, what a broken core means, and looking into a running job."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from collectives.errors import CoordinatorUnreachable
from collectives.membership.protocol import LaneStatus, MemberStatus, Status
from collectives.options import Options
from launch import attach, console, doctor, machine
from launch.cli import ringhold


def test_this_machine_is_examined_by_doing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(psutil.Process().children(recursive=True))
    assert console.run(ringhold, ["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in answer["checks"]}
    assert answer["ok"]
    assert {name for name, check in found.items() if check["core"]} == {"python", "torch", "loopback", "gloo"}
    assert all(found[name]["status"] == "ok" for name in ("python", "torch", "loopback", "gloo"))
    assert {check["status"] for check in answer["checks"]} <= {"ok", "limited", "missing"}
    assert all(check["found"] and check["follows"] for check in answer["checks"])
    assert set(psutil.Process().children(recursive=True)) <= before


def finding(name: str, status: machine.Status, core: bool) -> machine.Finding:
    return machine.Finding(name, status, "as it is", "as it goes", core)


@pytest.mark.parametrize(
    ("status", "core", "code"), [("missing", True, 1), ("limited", True, 0), ("missing", False, 0), ("ok", True, 0)]
)
def test_only_a_broken_core_fails(
    status: machine.Status, core: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "CHECKS", (lambda: finding("gloo", status, core),))
    assert console.run(ringhold, ["doctor"]) == code
    shown = capsys.readouterr().out
    assert ("broken: gloo" in shown) == (code == 1)
    assert status in shown


def test_a_siblings_memory_is_really_read() -> None:
    found = machine.check_process_vm_readv()
    assert found.status in {"ok", "limited"}
    with pytest.raises(OSError, match=r".+"):
        machine.read_memory(os.getpid(), 8, 16)


def test_a_command_that_fails_is_a_finding_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GLOO", "raise SystemExit('no gloo here')")
    found = machine.check_gloo()
    assert (found.status, found.found) == ("missing", "no gloo here")
    monkeypatch.setattr(machine, "_MPI", "import json; print(json.dumps(['4.1.2', 'MPICH', [5, 0, 2], True]))")
    assert machine.check_mpi().status == "limited"
    monkeypatch.setattr(machine, "_MPI", "import json; print(json.dumps(['4.1.2', 'Open MPI', [5, 0, 11], True]))")
    assert machine.check_mpi().status == "ok"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "launch.coordinator", "--new", "--run", "exp1", "--listen", "127.0.0.1:0"]
    environ = {**os.environ, "RINGHOLD_TOKEN": "secret"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as popen:
        assert popen.stdout is not None
        yield popen.stdout.readline().split()[-1]
        popen.terminate()


def test_attach_asks_the_coordinator(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGHOLD_TOKEN", "secret")
    arguments = ["doctor", "--attach", address, "--run", "exp1"]
    assert console.run(ringhold, arguments) == 0
    assert "run 'exp1': epoch 0, 0 members" in capsys.readouterr().out
    assert console.run(ringhold, [*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "exp1"
    assert console.run(ringhold, ["doctor", "--attach", address]) == 2
    assert "serves run 'exp1'" in capsys.readouterr().err
    monkeypatch.setenv("RINGHOLD_TOKEN", "wrong")
    assert console.run(ringhold, arguments) == 2
    assert "wrong token" in capsys.readouterr().err


def test_attach_where_nobody_is() -> None:
    began = time.monotonic()
    with pytest.raises(CoordinatorUnreachable, match="is the address right"):
        attach.status("127.0.0.1", 1, b"secret", "exp1", Options())
    assert time.monotonic() - began < 10


def test_a_status_is_shown_with_lanes_and_who_waits_for_whom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lane = LaneStatus("main", 17, "all_reduce", "transfer", 3, 1.5)
    status = Status(
        "exp1", 4, 5, 1, [MemberStatus(1, 0, "member", 0.1, [lane]), MemberStatus(9, -1, "waiting", 0.2, [])]
    )
    monkeypatch.setattr(attach, "status", lambda *_: status)
    monkeypatch.setenv("RINGHOLD_TOKEN", "secret")
    assert console.run(doctor.command, ["--attach", "127.0.0.1:1"]) == 0
    shown = capsys.readouterr().out
    assert "epoch 4, changing to epoch 5, 1 members, 1 waiting" in shown
    assert [word for word in ("main", "all_reduce 17", "transfer for 1.5 s", "member 3") if word in shown] != []
    row = next(line for line in shown.splitlines() if "all_reduce 17" in line)
    assert row.split()[0] == "1"
    assert row.rstrip().endswith("member 3")
