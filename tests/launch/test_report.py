"""The page of a run: what a log says is on it, it needs nothing from elsewhere, and an hour of churn stays small."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launch.cli import ringhold
from launch.record import Entry
from launch.report_page import page
from launch.story import Story, tell


def log_of(*rows: tuple[float, str, str, dict[str, Any]]) -> list[Entry]:
    return [{"time": 1000.0 + at, "source": source, "type": kind, **more} for at, source, kind, more in rows]


def epoch(name: str, number: int, members: list[int], lost: list[int], joined: list[int]) -> dict[str, Any]:
    return {"event": name, "epoch": number, "members": members, "lost": lost, "joined": joined}


def small() -> list[Entry]:
    """Two peers; one is killed at 3.0, noticed at 3.1; a new epoch is there at 3.3, an operation done at 3.6."""
    return log_of(
        (0.0, "supervisor", "run", {"command": "train", "seed": 7, "replay": "ringhold train --seed 7"}),
        (0.1, "supervisor", "started", {"peer": "peer-0"}),
        (0.2, "supervisor", "started", {"peer": "peer-1"}),
        (1.0, "peer-0", "joined", {"member": 1, "epoch": 1}),
        (1.0, "peer-1", "joined", {"member": 2, "epoch": 1}),
        (1.1, "peer-0", "event", epoch("epoch", 1, [1, 2], [], [1, 2])),
        (1.5, "peer-0", "synced", {}),
        (1.6, "peer-1", "synced", {}),
        (2.0, "peer-0", "progress", {"step": 1, "loss": 5.0}),
        (2.5, "peer-1", "progress", {"step": 2, "loss": 4.0}),
        (3.0, "supervisor", "fault", {"what": "kill", "peer": "peer-1", "step": 2}),
        (3.05, "peer-1", "exit", {"code": -9}),
        (3.1, "peer-0", "event", epoch("fenced", 2, [], [], [])),
        (3.3, "peer-0", "event", epoch("epoch", 2, [1], [2], [])),
        (3.6, "peer-0", "event", epoch("recovered", 2, [], [], [])),
        (4.0, "peer-0", "progress", {"step": 3, "loss": 3.0}),
        (4.5, "peer-0", "traffic", {"member": 1, "to": {"2": 4096}}),
        (5.0, "peer-0", "done", {"member": 1}),
        (
            60.0,
            "supervisor",
            "verdict",
            {
                "passed": True,
                "checks": [{"name": "state", "ok": True, "detail": "<all> equal"}],
                "losses": [5.0, 4.0, 3.0],
                "reference": [5.0, 4.0, 3.0001],
            },
        ),
    )


def test_the_story_of_a_log() -> None:
    story = tell(small())
    assert (story.command, story.seed, story.passed, story.seconds) == ("train", 7, True, 5.0)
    first, second = story.lives
    assert [(span.state, span.start) for span in second.spans] == [
        ("starting", pytest.approx(0.2)),
        ("healing", 1.0),
        ("alive", pytest.approx(1.6)),
    ]
    assert (second.ended, first.ended) == ("dead", "done")
    assert [count for _, count in story.world] == [2, 1]
    (mark,) = story.marks
    assert mark.life is second
    assert mark.kind == "kill"
    assert mark.at == pytest.approx(3.05)
    (recovery,) = story.recoveries
    assert recovery.label == "kill of peer-1"
    assert (recovery.detect, recovery.reform, recovery.first) == pytest.approx((0.05, 0.2, 0.3))
    assert story.losses == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert story.traffic == {(1, 2): 4096}


def churned(*rows: tuple[float, str, str, dict[str, Any]]) -> Story:
    """Two members, of which peer-1 is struck, then `rows`."""
    return tell(
        log_of(
            (0.0, "supervisor", "run", {"command": "churn"}),
            (0.1, "supervisor", "started", {"peer": "peer-0"}),
            (0.1, "supervisor", "started", {"peer": "peer-1"}),
            (1.0, "peer-0", "event", epoch("epoch", 1, [1, 2], [], [1, 2])),
            (1.0, "peer-1", "joined", {"member": 2}),
            (1.1, "peer-1", "synced", {}),
            *rows,
        )
    )


def test_a_fault_strikes_when_the_log_says_so_not_when_it_was_sent() -> None:
    story = churned(
        (2.0, "supervisor", "fault", {"what": "slow", "peer": "peer-1"}),
        (5.0, "supervisor", "fault", {"what": "stop", "peer": "peer-1", "aim": "sync before"}),
        (6.0, "peer-1", "synced", {}),
        (7.1, "supervisor", "struck", {"what": "stop", "peer": "peer-1", "at": 1007.0}),
        (9.0, "peer-0", "event", epoch("fenced", 2, [], [], [])),
        (9.1, "peer-0", "event", epoch("epoch", 2, [1], [2], [])),
        (9.2, "supervisor", "fault", {"what": "join", "peer": ""}),
        (9.2, "supervisor", "started", {"peer": "peer-2"}),
        (9.3, "peer-0", "event", epoch("fenced", 3, [], [], [])),
        (9.4, "peer-0", "event", epoch("epoch", 3, [1, 3], [], [3])),
        (9.5, "peer-0", "event", epoch("recovered", 3, [], [], [])),  # it never did in the epoch before
        (12.0, "peer-1", "event", epoch("fenced", 2, [], [], [])),  # it wakes
    )
    (recovery,) = story.recoveries
    assert (recovery.label, recovery.kind) == ("stop of peer-1", "stop")
    assert (recovery.at, recovery.detect, recovery.reform, recovery.first) == pytest.approx((7.0, 2.0, 0.1, 0.4))
    alive, stopped = story.lives[1].spans[-2:]
    assert (alive.state, stopped.state) == ("alive", "stopped")
    assert (alive.start, stopped.start) == pytest.approx((6.0, 7.0))
    assert story.marks[-1].peer == "peer-2"


def test_a_member_that_is_cut_off_is_shown_so() -> None:
    story = churned(
        (2.0, "supervisor", "fault", {"what": "partition", "peer": "peer-1"}),
        (5.0, "supervisor", "woken", {"peer": "peer-1"}),
        (6.0, "peer-1", "left", {}),
    )
    assert [span.state for span in story.lives[1].spans[-3:]] == ["alive", "cut off", "joining"]
    assert "cut off" in Reader(page(story, "run.jsonl")).text


class Reader(HTMLParser):
    """Sees that elements are closed in order, and what is fetched from where."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.data: Any = None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line", "rect", "circle", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("line", "rect", "circle", "path", "polyline"), f"{tag} closes {self.open}"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.data = json.loads(data) if data.startswith("{") else self.data
        elif self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_says_it_and_stands_alone() -> None:
    reader = Reader(page(tell(small()), "run.jsonl"))
    assert reader.fetched == []
    for said in (
        "passed",
        "ringhold train --seed 7",
        "kill of peer-1",
        "<all> equal",
        "largest difference 1.0e-04",
        "4 KiB",
    ):
        assert said in reader.text, said
    assert reader.data["lanes"][1] == [["peer-1", "2", [[4, 0.2], [1, 1.0], [0, 1.6]], 3.05, "dead"]]
    assert reader.data["marks"] == [[3.05, 1, 0, "peer-1", "step 2"]]


def test_what_a_log_says_is_text_on_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    log = [*small(), *log_of((6.0, "supervisor", "started", {"peer": evil}), (7.0, evil, "ready", {}))]
    log[0] |= {"command": evil, "replay": evil}
    text = page(tell(log), evil)
    assert "alert" not in text.replace("&lt;script&gt;alert", "").replace("\\u003cscript>alert", "")


def test_a_run_that_ended_early_has_a_page_too() -> None:
    for log in (small()[:4], small()[:1], []):
        assert "no verdict" in Reader(page(tell(log), "run.jsonl")).text
    failed = small()
    failed[-1]["passed"] = False
    assert "failed" in Reader(page(tell(failed), "run.jsonl")).text


def test_an_hour_of_churn_is_no_huge_page() -> None:
    story = tell(hour())
    text = page(story, "run.jsonl")
    Reader(text)
    assert len(story.recoveries) > 1000
    assert len(text) < 1 << 20
    part = page(story, "run.jsonl", (600.0, 660.0))
    assert len(part) < len(text)


def hour() -> list[Entry]:
    """Ten peers, of which one is killed every two seconds and replaced."""
    rows: list[tuple[float, str, str, dict[str, Any]]] = [(0.0, "supervisor", "run", {"command": "churn", "seed": 1})]
    living, draw = [f"peer-{number}" for number in range(10)], random.Random(1)
    for peer in living:
        rows += [(0.1, "supervisor", "started", {"peer": peer}), (0.5, peer, "joined", {"member": int(peer[5:]) + 1})]
        rows.append((0.6, peer, "synced", {}))
    for number in range(10, 1810):
        at = 2.0 * (number - 9)
        victim = living.pop(draw.randrange(10))
        newcomer = f"peer-{number}"
        living.append(newcomer)
        lost, members = int(victim[5:]) + 1, [int(peer[5:]) + 1 for peer in living[:-1]]
        rows += [
            (at, "supervisor", "fault", {"what": "kill", "peer": victim}),
            (at + 0.02, victim, "gone", {"code": -9}),
            (at + 0.05, living[0], "event", epoch("fenced", number, [], [], [])),
            (at + 0.06, living[0], "event", epoch("epoch", number, members, [lost], [])),
            (at + 0.08, living[0], "event", epoch("recovered", number, [], [], [])),
            (at + 0.1, "supervisor", "started", {"peer": newcomer}),
            (at + 0.9, newcomer, "joined", {"member": number + 1}),
            (at + 1.0, newcomer, "synced", {}),
            (at + 1.1, "supervisor", "rate", {"operations": 50, "members": 10}),
        ]
    return log_of(*rows)


def test_the_command(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in small()))
    for given, target in (
        ([str(tmp_path)], tmp_path / "run.html"),
        ([str(log), "-o", str(tmp_path / "a.html")], tmp_path / "a.html"),
    ):
        done = CliRunner().invoke(ringhold, ["report", *given])
        assert done.exit_code == 0, done.output
        assert str(target) in done.output
        assert "kill of peer-1" in target.read_text()


@pytest.mark.parametrize(
    ("content", "given", "error", "said"),
    [
        (None, [], "UsageError", "cannot read"),
        ("", [], "UsageError", "is empty"),
        ("no json\n", [], "CorruptFile", "line 1 of"),
        ('{"a": 1}\n', [], "CorruptFile", "is no entry of a run's log"),
        ('{"time": 1e400, "source": "a", "type": "ready"}\n', [], "CorruptFile", "is no entry"),
        ('{"time": 1, "source": "a", "type": "joined"}\n', [], "CorruptFile", "no log of this release"),
        ("[1]\n", [], "CorruptFile", "is no entry"),
        (json.dumps(small()[0]) + "\n", ["--from", "9", "--to", "3"], "UsageError", "nothing lies between"),
        (json.dumps(small()[0]) + "\n", ["-o", "/no/such/folder/a.html"], "UsageError", "cannot write"),
    ],
)
def test_what_is_no_log_is_refused(
    tmp_path: Path, content: str | None, given: list[str], error: str, said: str
) -> None:
    log = tmp_path / "run.jsonl"
    if content is not None:
        log.write_text(content)
    done = CliRunner().invoke(ringhold, ["report", str(log), *given])
    assert type(done.exception).__name__ == error
    assert said in str(done.exception)
    assert not list(tmp_path.glob("*.html"))


def test_an_empty_story_is_drawn() -> None:
    Reader(page(Story(), "nothing"))


def test_a_log_that_ends_within_a_line_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in small()[:-1]) + '{"time": 1005.5, "sou')
    done = CliRunner().invoke(ringhold, ["report", str(log)])
    assert done.exit_code == 0, done.output
    assert "no verdict" in (tmp_path / "run.html").read_text()


def test_the_page_does_not_take_the_place_of_the_log_or_of_a_device(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in small()))
    before = log.read_bytes()
    done = CliRunner().invoke(ringhold, ["report", str(log), "-o", str(log)])
    assert "is the log itself" in str(done.exception)
    assert log.read_bytes() == before
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        done = CliRunner().invoke(ringhold, ["report", str(log), "-o", str(pipe)])
        assert "kill of peer-1" in read.result(30)
    assert done.exit_code == 0
    assert pipe.is_fifo()
