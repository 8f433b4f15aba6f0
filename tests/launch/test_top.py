"""Looking at a running job: `ringhold top`, and the coordinator's page and metrics, of real processes."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from collectives.errors import CoordinatorUnreachable, UsageError
from collectives.membership.protocol import LaneStatus, MemberStatus, Status
from launch.cli import ringhold
from launch.live_page import LivePage
from launch.top import _columns, _looks
from launch.vitals import HEADINGS, Vitals, Watch
from tests.conformance.steered import steered
from tests.harness.cluster import TOKEN, Cluster

_HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
_MOST = 70000 if _HARD == resource.RLIM_INFINITY else min(70000, _HARD)


def status(seq: int) -> Status:
    lane = LaneStatus("main", seq, "all_reduce", "moving", 2, 0.5, ())
    return Status(
        "exp<1>", 3, 0, 1, [MemberStatus(1, 0, "member", 0.1, [lane]), MemberStatus(5, -1, "waiting", 0.2, [])]
    )


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_rates_are_over_the_last_seconds() -> None:
    now = [0.0]
    watch = Watch(lambda: now[0], window=2.0)
    assert watch.look(status(10)).rows[0].rate is None
    for _ in range(20):
        now[0] += 0.5
        vitals = watch.look(status(int(10 + 20 * now[0])))
    assert vitals.rows[0].rate == pytest.approx(20)
    assert vitals.rows[1].rate is None
    for _ in range(6):
        now[0] += 0.5
        vitals = watch.look(status(210))
    assert vitals.rows[0].rate == 0
    assert (vitals.members, vitals.waiting) == (1, 1)


def test_the_page_and_the_metrics() -> None:
    with LivePage("127.0.0.1", 0) as page:
        code, text = get(page.port, "/")
        assert code == 200
        assert "starting" in text
        assert get(page.port, "/metrics") == (200, "")
        page.tell(status(10))
        code, text = get(page.port, "/")
        assert "exp&lt;1&gt;" in text
        assert "all_reduce 10" in text
        found = samples(get(page.port, "/metrics")[1])
        assert found["ringhold_epoch"] == 3
        assert found["ringhold_operations_total main 1"] == 10
        assert found["ringhold_heartbeat_age_seconds 5"] == pytest.approx(0.2)
        assert get(page.port, "/secrets")[0] == 404
        assert get(page.port, "/", "POST")[0] == 501, "it is read-only"
        with pytest.raises(UsageError, match="choose another --http"):
            LivePage("127.0.0.1", page.port)


@pytest.mark.parametrize(
    ("host", "code"),
    [("localhost", 200), ("[::1]:80", 200), ("10.0.0.1:1", 200), (socket.gethostname(), 200), ("evil.example", 421)],
)
def test_no_page_of_elsewhere_reads_it_under_another_name(host: str, code: int) -> None:
    with LivePage("127.0.0.1", 0) as page:
        assert get(page.port, "/metrics", Host=host)[0] == code


def test_idle_readers_make_room_and_take_no_descriptors() -> None:
    with LivePage("127.0.0.1", 0) as page:
        before = len([*Path("/proc/self/fd").iterdir()])
        idle = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(100)]
        assert get(page.port, "/")[0] == 200
        assert len([*Path("/proc/self/fd").iterdir()]) - before - len(idle) <= 40
        for sock in idle:
            sock.close()


def test_a_coordinator_serves_its_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.coordinator", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    environ = {**os.environ, "RINGHOLD_TOKEN": "hidden-token"}
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (300, _MOST))
    popen = subprocess.Popen(
        [*command, "--journal", str(tmp_path / "j"), "--new"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=few,  # noqa: PLW1509 - no lock is held by another thread that this takes
    )
    try:
        assert popen.stderr is not None
        assert popen.stdout is not None
        assert "listens on" in popen.stdout.readline()
        line = next(line for line in popen.stderr if "live page at" in line)
        port = int(line.rstrip().rstrip("/").rpartition(":")[2])
        soft, hard = resource.prlimit(popen.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, 65536), "strangers shall not take all descriptors"
        for path in ("/", "/metrics"):
            code, text = get(port, path)
            assert code == 200
            assert "hidden-token" not in text
    finally:
        popen.send_signal(signal.SIGTERM)
        popen.communicate(timeout=30)
    assert popen.returncode == 0


def top(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setenv("RINGHOLD_TOKEN", TOKEN)
    return CliRunner().invoke(ringhold, ["top", *arguments])


def test_top_shows_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(founders=2) as cluster:
        members = cluster.peers(steered, 2)
        for process in members:
            process.expect("joined")
            process.tell("do", what="reduce", times=3)
        for process in members:
            process.expect("done")
        cluster.await_status(lambda seen: all(lane.seq == 3 for one in seen.members for lane in one.lanes))
        done = top(monkeypatch, cluster.address, "--run", cluster.RUN, "--once")
        assert done.exit_code == 0, done.output
        assert "2 members, 0 waiting" in done.output
        assert done.output.count("all_reduce 3") == 2
        done = top(monkeypatch, cluster.address, "--run", cluster.RUN, "--once", "--json")
        assert [row["seq"] for row in json.loads(done.output)["rows"]] == [3, 3]
        for process in members:
            process.tell("do", what="leave")
            process.result()


def test_top_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGHOLD_COORDINATOR", raising=False)
    assert "name the coordinator" in str(top(monkeypatch).exception)
    assert "no coordinator at 127.0.0.1:1" in str(top(monkeypatch, "127.0.0.1:1").exception)
    done = top(monkeypatch, "127.0.0.1:1", "--every", "nan")
    assert done.exit_code == 2
    assert "no finite number" in done.output


def test_top_waits_for_a_coordinator_that_is_away() -> None:
    watch = Watch()
    answers: list[Vitals | None] = [None, watch.look(status(2)), None, None]

    def look() -> Vitals:
        answer = answers.pop(0)
        if answer is None:
            raise CoordinatorUnreachable("no coordinator")
        return answer

    first = watch.look(status(1))
    seen = list(islice(_looks(first, look, 0.01, 100.0), 4))
    assert [(vitals.rows[0].seq, silent is None) for vitals, silent in seen] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    ]
    with pytest.raises(CoordinatorUnreachable):
        list(_looks(first, look, 0.01, 0.0))


def test_a_narrow_terminal_shows_fewer_columns() -> None:
    rows = [row.cells() for row in Watch().look(status(10)).rows]
    assert len(_columns(rows, 200)) == len(HEADINGS)
    assert [HEADINGS[column] for column in _columns(rows, 50)] == ["member", "state", "heard", "operation"]
    assert [HEADINGS[column] for column in _columns(rows, 10)] == ["member", "state", "operation"]
