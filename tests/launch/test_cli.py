"""The command line: fast help, one-line errors, exit codes, and the coordinator's command."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from collectives.errors import JournalError, MemberLost, OperationTimeout, StorageFailed, UsageError
from launch import console, display
from launch.cli import COMMANDS, ringhold


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that was printed on stderr."""
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("ringhold: error: ")
    assert captured.out == ""
    return line


def test_help_and_version_come_without_torch() -> None:
    code = (
        "import sys; from launch import console, cli\n"
        "for arguments in (['--help'], ['--version'], ['train', '--help'], ['demo', '--help'], ['doctor', '--help'],\n"
        "                  ['coordinator', '--help'], ['bench', '--help'], ['trace', '--help']):\n"
        "    assert console.run(cli.ringhold, arguments) == 0, arguments\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert "ringhold 0." in done.stdout


def test_the_bare_command_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, []) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "--peers", "0"], "--peers"),
        (["train", "--peers", "x"], "--peers"),
        (["train", "--steps", "0"], "steps"),
        (["train", "--preset", "9t"], "preset"),
        (["train", "--dtype", "fp8"], "dtype"),
        (["train", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "--resume", "/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "--churn", "boom@3"], "boom@3"),
        (["train", "--churn", "kill@500"], "kill@500"),
        (["train", "--peers", "2", "--churn", "kill@3,kill@4"], "would leave nobody"),
        (["train", "--churn", "kill@3", "--churn-rate", "2"], "one of the two"),
        (["train", "--churn-rate", "-1"], "per 100 steps"),
        (["train", "--coordinator", "nowhere"], "HOST:PORT"),
        (["train", "--coordinator", "127.0.0.1:1", "--churn", "coordinator@3"], "coordinator of our own"),
        (["train", "--transport", "pigeon"], "pigeon"),
        (["doctor", "--attach", "nowhere"], "HOST:PORT"),
        (["coordinator", "--listen", "nowhere", "--new"], "HOST:PORT"),
        (["coordinator", "--heartbeat-timeout", "0.1", "--new"], "heartbeat_timeout"),
    ],
)
def test_usage_errors_take_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RINGHOLD_TOKEN", "secret")
    assert console.run(ringhold, arguments) == 2
    assert word in complaint(capsys)


def test_a_run_does_not_mix_with_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").write_text("result")
    assert console.run(ringhold, ["train", "--out", str(tmp_path)]) == 2
    assert "is not empty" in complaint(capsys)


def test_joining_another_coordinator_needs_its_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RINGHOLD_TOKEN", raising=False)
    arguments = ["train", "--out", str(tmp_path / "new"), "--coordinator", "127.0.0.1:1"]
    assert console.run(ringhold, arguments) == 2
    assert "RINGHOLD_TOKEN" in complaint(capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no"), 2),
        (MemberLost("gone"), 3),
        (JournalError("torn"), 4),
        (OperationTimeout("late"), 124),
        (KeyboardInterrupt(), 130),
        (click.FileError("x"), 2),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command("failing")
    def failing() -> None:
        raise error

    assert console.run(failing, []) == code
    complaint(capsys)


def test_a_defect_keeps_its_traceback() -> None:
    @click.command("broken")
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        console.run(broken, [])


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m launch.cli --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=20, check=False)
    assert done.stderr == b""


def test_addresses() -> None:
    assert console.split_address("127.0.0.1:29400", "x") == ("127.0.0.1", 29400)
    assert console.split_address("[::1]:7", "x") == ("::1", 7)
    assert console.join_address("::1", 7) == "[::1]:7"
    for wrong in ("", "host", "host:", ":7", "host:70000", "host:x"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            console.split_address(wrong, "x")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


ENTRIES: list[dict[str, Any]] = [
    {"source": "supervisor", "type": "started", "peer": "coordinator", "pid": 1},
    {"source": "supervisor", "type": "started", "peer": "peer-0", "pid": 2, "spare": False},
    {"source": "peer-0", "type": "joined", "member": 1, "epoch": 1},
    {"source": "peer-0", "type": "progress", "step": 3, "loss": 2.5, "member": 1},
    {"source": "supervisor", "type": "fault", "what": "stop", "step": 3, "peer": "peer-0", "fault": 0},
    {"source": "peer-0", "type": "exit", "code": -9},
]


@pytest.mark.parametrize(("stream", "expected"), [(Screen(), "dead"), (io.StringIO(), "ended by SIGKILL")])
def test_progress_is_shown_on_a_terminal_and_elsewhere(stream: io.StringIO, expected: str) -> None:
    with display.choose(10, quiet=False, stream=stream) as shown:
        for entry in ENTRIES:
            shown({"time": time.time(), **entry})
    text = stream.getvalue()
    for words in ("step 3/10, loss 2.5000", "stopped peer-0 (SIGSTOP)", "peer-0 is member 1 of epoch 1", expected):
        assert words in text


def test_quiet_is_quiet() -> None:
    stream = io.StringIO()
    with display.choose(10, quiet=True, stream=stream) as shown:
        shown({"time": time.time(), **ENTRIES[-1]})
    assert stream.getvalue() == ""


def coordinator(tmp_path: Path, *arguments: str, token: str = "secret") -> subprocess.Popen[str]:
    environ = {**os.environ, "RINGHOLD_TOKEN": token}
    command = [sys.executable, "-m", "launch.cli", "coordinator", "--listen", "127.0.0.1:0", *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def refused(tmp_path: Path, *arguments: str, token: str = "secret") -> tuple[int, str]:
    with coordinator(tmp_path, *arguments, token=token) as popen:
        _, err = popen.communicate(timeout=20)
    assert "Traceback" not in err
    return popen.returncode, err.splitlines()[-1]


def test_the_coordinator_runs_in_the_foreground(tmp_path: Path) -> None:
    with coordinator(tmp_path, "--run", "exp1") as first:  # the journal of the default name is made
        assert first.stdout is not None
        line = first.stdout.readline()
        assert line.startswith("coordinator of run 'exp1' listens on 127.0.0.1:")
        port = line.rpartition(":")[2].strip()
        code, line = refused(tmp_path, "--listen", f"127.0.0.1:{port}", "--new", "--journal", "other.journal")
        assert (code, "the port is in use" in line) == (2, True)
        assert not (tmp_path / "other.journal").exists()  # so that the same command works once the port is free
        code, line = refused(tmp_path, "--run", "exp1")
        assert (code, "another coordinator" in line) == (4, True)
        first.send_signal(signal.SIGTERM)
        assert first.wait(10) == 0
    code, line = refused(tmp_path, "--new", "--run", "exp1")
    assert (code, "drop --new" in line) == (2, True)
    with coordinator(tmp_path, "--run", "exp1") as again:
        assert again.stdout is not None
        assert "listens" in again.stdout.readline()
        again.send_signal(signal.SIGINT)
        assert again.wait(10) == 0


def test_what_the_coordinator_refuses(tmp_path: Path) -> None:
    code, line = refused(tmp_path, "--journal", "mistyped.journal")
    assert (code, "--new" in line) == (2, True)
    code, line = refused(tmp_path, "--new", token="")
    assert (code, "RINGHOLD_TOKEN" in line) == (2, True)
    code, line = refused(tmp_path, "--new", "--token-file", "nowhere")
    assert (code, "nowhere" in line) == (2, True)
    (tmp_path / "torn.journal").write_text("not a journal\n")
    code, line = refused(tmp_path, "--journal", "torn.journal")
    assert (code, "checksum" in line) == (4, True)


def test_a_port_that_is_taken_by_something_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, line = refused(tmp_path, "--new", "--listen", f"127.0.0.1:{server.getsockname()[1]}")
    assert (code, "the port is in use" in line) == (2, True)


def test_a_full_disk_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def fill() -> None:
        with Path("/dev/full").open("w", buffering=1) as file:
            file.write("a line\n")

    assert console.run(fill, []) == StorageFailed.exit_code
    assert "there is no space left on the disk" in complaint(capsys)


@pytest.mark.parametrize("given", ["nan", "inf", "-1"])
def test_numbers_of_options_are_finite(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @click.option("--seconds", type=console.Finite(0))
    def wait(seconds: float) -> None:
        raise AssertionError(seconds)

    assert console.run(wait, ["--seconds", given]) == 2
    complaint(capsys)


def test_a_file_that_could_not_be_written_is_refused_before_there_is_something_to_write(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("kept")
    console.require_writable(there, "--json")
    assert there.read_text() == "kept"
    console.require_writable(tmp_path / "new", "--json")
    assert not (tmp_path / "new").exists()
    for path in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(UsageError, match="--json: cannot write"):
            console.require_writable(path, "--json")


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--example", "mlp", "--html"],
        ["attention", "--trace"],
        ["attention", "--svg"],
        ["bench", "all_reduce", "--plot"],
        ["simulate", "all_reduce", "--topology", "none.json", "--plot"],
        ["churn", "--json"],
    ],
)
def test_commands_refuse_such_a_file_before_they_begin(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(ringhold, [*words, str(tmp_path / "missing" / "file")]) == 2
    assert f"{words[-1]}: cannot write" in capsys.readouterr().err
