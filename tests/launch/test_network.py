"""Network namespaces: what is made is there, limits and cuts hold, and nothing is left behind."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collectives.errors import Unsupported, UsageError
from launch import network
from launch.network import Network, remove_stale

pytestmark = pytest.mark.timeout(60)

Python = Callable[..., subprocess.Popen[str]]

SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    with connection:
        while data := connection.recv(65536):
            if len(sys.argv) > 2:
                connection.sendall(data)
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        connection.sendall(bytes(65536))
"""
CALL = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    for line in sys.stdin:
        connection.sendall(line.encode())
        print(connection.recv(100).decode(), end="", flush=True)
"""
HOLD = """
import sys
from launch.network import Network
with Network(2):
    print("made", flush=True)
    sys.stdin.read()
"""


def ours(pid: int) -> list[str]:
    return sorted(path.name for path in Path("/run/netns").glob(f"ringhold-{pid}-*"))


@pytest.fixture
def python() -> Iterator[Python]:
    """Start a program of this file on a host; it has ended when the test has."""
    with contextlib.ExitStack() as stack:

        def start(net: Network, host: int | None, program: str, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-I", "-c", program, *arguments]
            process = net.start(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_network_comes_and_goes(python: Python) -> None:
    with Network(3) as net:
        assert len(ours(os.getpid())) == 4  # the hosts and the hub
        served = python(net, 2, SERVE, net.address(2), "echo")
        called = python(net, 0, CALL, net.address(2), line(served))
        out, _ = called.communicate("through\n", timeout=20)
        assert out == "through\n"
    assert not ours(os.getpid())


def test_two_networks_do_not_meet(python: Python) -> None:
    with Network(1) as one, Network(1) as other:
        served = python(one, 0, SERVE, one.address(0))
        port = line(served)
        called = python(other, 0, CALL, one.address(0), port)
        assert called.wait(timeout=20) != 0  # nobody listens there


@pytest.mark.parametrize("sender", [0, None])
def test_a_rate_holds_in_either_direction(python: Python, sender: int | None) -> None:
    rate = 20e6
    with Network(2, rate) as net:
        target = net.address(1)
        served = python(net, 1, SERVE, target)
        python(net, sender, SEND, target, line(served), "30")
        assert 0.4 * rate < speed(net, 0.6) < 1.2 * rate


def test_a_limit_can_change_and_be_lifted(python: Python) -> None:
    with Network(2, 1e6) as net:
        served = python(net, 1, SERVE, net.address(1))
        python(net, 0, SEND, net.address(1), line(served), "30")
        slow = speed(net, 0.4)
        net.limit(1, None)
        net.limit(0, None)
        net.limit(0, None)  # nothing is left to lift
        assert speed(net, 0.4) > 3 * slow


def speed(net: Network, seconds: float) -> float:
    """Bytes a second that arrive at host 1, from when they flow."""
    while net.traffic(1).received < 8 * network.BURST:
        time.sleep(0.01)
    before, begun = net.traffic(1).received, time.monotonic()
    time.sleep(seconds)
    return (net.traffic(1).received - before) / (time.monotonic() - begun)


def test_a_cut_host_hears_nothing_until_it_is_healed(python: Python) -> None:
    with Network(2) as net:
        served = python(net, 1, SERVE, net.address(1), "echo")
        called = python(net, 0, CALL, net.address(1), line(served))
        assert called.stdin is not None
        assert called.stdout is not None
        print("before", file=called.stdin, flush=True)
        assert line(called) == "before"
        net.cut(1)
        print("meanwhile", file=called.stdin, flush=True)
        assert not select.select([called.stdout], [], [], 0.4)[0]
        assert called.poll() is None  # a cut is silent
        net.heal(1)
        assert line(called) == "meanwhile"


def test_a_fork_enters_a_host_and_leaves_the_network_alone() -> None:
    with Network(2) as net:
        child = os.fork()
        if child == 0:
            net.enter(1)
            net.close()  # not the child's to remove
            with socket.create_server((net.address(1), 0)):
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(ours(os.getpid())) == 3
        with pytest.raises(OSError, match="assign requested address"):
            socket.create_server((net.address(1), 0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_maker_that_is_ended(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert line(maker) == "made"
        made = ours(maker.pid)
        assert len(made) == 3
        assert not set(made) & set(remove_stale())  # its maker lives
        maker.send_signal(number)
    if number == signal.SIGKILL:
        assert ours(maker.pid) == made
        remove_stale()
    assert not ours(maker.pid)


def test_what_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1 to 64 hosts"):
        Network(0)
    with pytest.raises(UsageError, match="burst no less"):
        Network(1, burst=1500)
    with pytest.raises(UsageError, match="rate must be"):
        Network(1, rate=10)
    with Network(1) as net, pytest.raises(UsageError, match="no host 1"):
        net.cut(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(Unsupported, match="need root"):
            Network(1).__enter__()
    script = tmp_path / "tc"
    script.write_text("#!/bin/sh\necho 'Error: Specified qdisc kind is unknown.' >&2\nexit 2\n")
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(Unsupported, match="no token buckets"):
            Network(1, rate=1e6).__enter__()
        assert not ours(os.getpid())
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(Unsupported, match="install iproute2"):
            Network(1).__enter__()
