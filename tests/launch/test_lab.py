"""`ringhold lab`: commands on hosts of every shape, cables that are cut and healed, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from collectives.errors import UsageError
from launch import network
from launch.lab import parse_rate
from launch.lab_cuts import Cut, Switches, draw_cuts, parse_cut
from launch.network import Network, remove_stale
from launch.network_shape import shape_of
from launch.rendezvous import own_folder, runtime_folder

pytestmark = pytest.mark.timeout(100)

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
MEET = """
import os, socket, sys, time
me, hosts = int(os.environ["RINGHOLD_LAB_HOST"]), int(os.environ["RINGHOLD_LAB_HOSTS"])
with socket.create_server((os.environ["RINGHOLD_LISTEN"], 7000), backlog=64) as server:
    for other in range(hosts):
        while True:
            try:
                socket.create_connection((f"10.77.0.{other + 1}", 7000), 10).close()
                break
            except OSError:
                time.sleep(0.01)
    for _ in range(hosts):
        server.accept()[0].close()
print("met", hosts)
sys.exit(3 if me == 1 else 0)
"""
STAY = """
import os, subprocess, time
with subprocess.Popen(["sleep", "1000"], start_new_session=True) as child:
    print(os.getpid(), child.pid, flush=True)
    time.sleep(1000)
"""
ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("up", flush=True)
    while True:
        connection, _ = server.accept()
        connection.sendall(b"hello")
        connection.close()
"""
CALL = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), float(sys.argv[2])).recv(9).decode())"


def lab(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.lab", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize("topology", ["star", "ring", "mesh", "two-sites"])
def test_every_host_reaches_every_other_in_every_shape(topology: str) -> None:
    arguments = ["--hosts", "5", "--topology", topology, "--rate", "400mbit", "--coordinator", "none"]
    done = lab(*arguments, "--json", "--", sys.executable, "-I", "-c", MEET)
    assert done.returncode == 3, done.stderr  # the first code that is not 0
    assert sorted(done.stderr.splitlines()) == [f"host {host} | met 5" for host in range(5)]
    report = json.loads(done.stdout)
    assert [host["code"] for host in report["hosts"]] == [0, 3, 0, 0, 0]
    assert all(host["sent"] and host["received"] for host in report["hosts"])


def test_the_side_with_the_coordinator_goes_on_and_the_other_comes_back_when_the_cable_is_healed() -> None:
    arguments = ["--hosts", "3", "--topology", "two-sites", "--cut", "hub-hub2@0.5s..7s", "--timeout", "80", "--json"]
    program = [sys.executable, "-m", "tests.launch.lab_member"]
    done = lab(*arguments, "--", *program, RINGHOLD_HEARTBEAT_TIMEOUT="3.0")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said.count("host 2 | evicted") == 1
    assert {f"host {host} | together again" for host in range(3)} <= set(said)
    assert not {"host 0 | evicted", "host 1 | evicted"} & set(said)
    assert [(cut["what"], cut["cable"]) for cut in json.loads(done.stdout)["cuts"]] == [
        ("cut", "hub-hub2"),
        ("healed", "hub-hub2"),
    ]


@pytest.mark.parametrize("shape", ["ring", "mesh"])
def test_a_cable_between_two_hosts_is_cut_silently_and_no_other(shape: str) -> None:
    with Network(4, shape=shape) as net:
        served = net.start(1, [sys.executable, "-I", "-c", ECHO, net.address(1)], stdout=subprocess.PIPE)
        assert served.stdout is not None

        def call(host: int, patience: float) -> str:
            command = [sys.executable, "-I", "-c", CALL, net.address(1), str(patience)]
            asked = net.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            out, error = asked.communicate(timeout=30)
            return str(out.strip() or error.strip().rpartition("\n")[2])

        try:
            assert served.stdout.readline() == b"up\n"
            net.cut_cable("0", "1")
            net.cut_cable("1", "0")  # it is cut already
            assert call(0, 0.5) == "TimeoutError: timed out"
            assert call(2, 20.0) == "hello"
            net.heal_cable("0", "1")
            assert call(0, 20.0) == "hello"
            net.cut(1)
            assert call(2, 0.5) == "TimeoutError: timed out"
        finally:
            served.kill()
            served.communicate()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_lab_that_is_ended(number: signal.Signals) -> None:
    command = ["--hosts", "2", "--coordinator", "none", "--", sys.executable, "-I", "-c", STAY]
    with subprocess.Popen(
        [sys.executable, "-m", "launch.lab", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as made:
        assert made.stdout is not None
        pids = [int(word) for _ in range(2) for word in made.stdout.readline().rpartition("|")[2].split()]
        assert len(pids) == 4
        made.send_signal(number)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert made.returncode == expected[number]
    left = list(Path("/run/netns").glob(f"ringhold-{made.pid}-*"))
    assert len(left) == (3 if number == signal.SIGKILL else 0)
    folders = list(runtime_folder(os.environ).glob(f"launch-{made.pid}-*-lab"))
    assert len(folders) == (1 if number == signal.SIGKILL else 0)
    with own_folder("test"):  # as the next one does
        assert not any(folder.exists() for folder in folders)
    remove_stale()
    assert not list(Path("/run/netns").glob(f"ringhold-{made.pid}-*"))
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "fast"], "'fast' is no rate; write 400mbit"),
        (["--rate", "1kbit"], "a rate must be 80kbit to 40gbit a second, not 1000 bit"),
        (["--hots", "4"], "there is no option '--hots'"),
        (["--cut", "2-3@10s..20s"], "a star of 4 hosts has no cable 2-3; it has 0-hub"),
        (["--cut", "9@1"], "there is no host 9; there are 0 to 3"),
        (["--cut", "1@5..4"], "ends before it begins"),
        (["--cut", "soon"], "is not WHAT@FROM..TO"),
        (["--topology", "ring", "--hosts", "2"], "a ring has 3 hosts or more, not 2"),
        (["--topology", "mesh", "--coordinator", "hub"], "a mesh has no hub"),
        (["--coordinator", "4"], "a host from 0 to 3"),
        (["--between", "1mbit"], "it needs --topology two-sites"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str) -> None:
    done = lab(*arguments, "--", "true")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_that_does_not_exist_or_does_not_end_is_told() -> None:
    done = lab("--hosts", "1", "--coordinator", "none", "--", "no-such-command")
    assert done.returncode == 2
    assert "cannot run 'no-such-command': No such file or directory" in done.stderr
    done = lab("--hosts", "1", "--coordinator", "none", "--timeout", "0.3", "--", "sleep", "100")
    assert done.returncode == 124
    assert "did not end within 0.3 s (--timeout)" in done.stderr


def test_without_root_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Exception, match="network namespaces need root; run as root, or emulate links"):
        network.require()


def test_rates_cuts_and_ways() -> None:
    assert parse_rate("400mbit") == 50e6
    assert parse_rate("1.5Gbit") == 187.5e6
    mesh = Network(4, shape="mesh")
    assert str(parse_cut("2-3@10s..20s", mesh)) == "2-3"
    assert parse_cut("1@5", mesh).end is None
    with pytest.raises(UsageError, match="no cable hub-1"):
        parse_cut("hub-1@5", mesh)
    ring = shape_of("ring", 5)
    assert [ring.next(0, target) for target in range(1, 5)] == ["1", "1", "4", "4"]
    assert shape_of("two-sites", 5).cables[-3:] == (("3", "hub2"), ("4", "hub2"), ("hub", "hub2"))


def test_drawn_cuts_are_of_cables_that_are_healed_and_the_same_for_a_seed() -> None:
    shape = shape_of("two-sites", 4)
    cuts = draw_cuts(shape, 600.0, seed=1)
    assert cuts == draw_cuts(shape, 600.0, seed=1) != draw_cuts(shape, 600.0, seed=2)
    assert {(cut.one, cut.other) for cut in cuts} == set(shape.cables)
    for cable in shape.cables:
        times = [time for cut in cuts if (cut.one, cut.other) == cable for time in (cut.begin, cut.end or 0.0)]
        assert times == sorted(times)
        assert times[-1] <= 600.0
    assert len(cuts) > 100


def test_a_cable_that_two_cuts_share_is_healed_when_both_are_over() -> None:
    told: list[tuple[str, str, str]] = []

    class Told(Network):
        def cut_cable(self, one: str, other: str) -> None:
            told.append(("cut", one, other))

        def heal_cable(self, one: str, other: str) -> None:
            told.append(("heal", one, other))

    switches, host, cable = Switches(Told(3, shape="mesh")), Cut("1", "", 1, 4), Cut("2", "1", 2, 5)
    switches.cut(host)
    switches.cut(cable)
    switches.heal(host)
    assert told == [("cut", "0", "1"), ("cut", "1", "2"), ("heal", "0", "1")]
    switches.heal(cable)
    assert told[3:] == [("heal", "1", "2")]
