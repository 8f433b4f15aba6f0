"""Traces of real groups: spans nest, arrows have two ends, faults and epochs are there, and files can be joined."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from collectives.errors import CorruptFile
from launch import console, trace
from launch.cli import ringhold
from tests.collectives import trace_programs
from tests.harness.cluster import Cluster

Event = dict[str, Any]
PHASES = {"agree", "move", "confirm", "copy out"}


def spans(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["name"] == name]


def check_nesting(events: list[Event]) -> None:
    """On each thread, two spans are apart or one holds the other."""
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["name"]))
    for found in threads.values():
        open_ends: list[float] = []
        for begin, minus, name in sorted(found):
            end = begin - minus
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 0.01, name  # a hundredth of a microsecond: rounding
            open_ends.append(end)


def ends_of_hops(events: list[Event]) -> tuple[dict[str, Event], dict[str, Event]]:
    begins, ends = ([e for e in events if e["ph"] == ph] for ph in "sf")
    by_id = {event["id"]: event for event in begins}, {event["id"]: event for event in ends}
    assert (len(by_id[0]), len(by_id[1])) == (len(begins), len(ends)), "a name is used once"
    return by_id


@pytest.mark.parametrize("transport", ["gloo", "sockets"])
def test_operations_are_spans_with_phases_and_hops(tmp_path: Path, transport: str) -> None:
    with Cluster(founders=3, transport=transport, trace=str(tmp_path)) as cluster:
        members = cluster.run(trace_programs.operate, 3)
    paths = sorted(tmp_path.glob("*.json"))
    assert len(paths) == 3
    traces = [trace.read(path) for path in paths]
    assert [json.loads(path.read_text())[-1] for path in paths] == [{}] * 3  # whole JSON as it is
    events = trace.merge(traces)
    check_nesting(events)
    for member in members:
        mine = [event for event in events if event["pid"] == member]
        sums = spans(mine, "all_reduce")
        assert [(span["args"]["bytes"], span["args"]["attempts"]) for span in sums][:2] == [(400, 1), (4_000_000, 1)]
        lanes = {event["args"]["name"]: event["tid"] for event in mine if event["name"] == "thread_name"}
        assert set(lanes) == {"lane main", "lane left", "lane right"}
        assert len({span["tid"] for span in sums}) == 3
        big = sums[1]
        inside = [e for e in mine if e["ph"] == "X" and e["tid"] == big["tid"] and e is not big]
        names = {e["name"] for e in inside if big["ts"] <= e["ts"] and e["ts"] + e["dur"] <= big["ts"] + big["dur"] + 1}
        assert names >= PHASES
        assert any(name.startswith("bulk from" if transport == "gloo" else "note from") for name in names)
    begins, ends = ends_of_hops(events)
    # Who leaves behind the last barrier may complete it for the others, who then do not take what is on its way.
    assert {name for name in begins.keys() ^ ends.keys() if not name.startswith("test 1 main 5 ")} == set()
    begins = {name: event for name, event in begins.items() if name in ends}
    assert all(begins[name]["ts"] <= ends[name]["ts"] for name in begins)
    assert all(begins[name]["pid"] != ends[name]["pid"] for name in begins)


def test_a_killed_member_leaves_its_fault_and_the_others_their_recovery(tmp_path: Path) -> None:
    with Cluster(founders=3, trace=str(tmp_path)) as cluster:
        peers = [cluster.peer(trace_programs.lose_one, victim=victim) for victim in (False, False, True)]
        assert peers[2].ending().signal == 9
        survivors = [peer.result() for peer in peers[:2]]
    assert survivors[0] == survivors[1]
    assert len(survivors[0]) == 2
    events = trace.merge([trace.read(path) for path in tmp_path.glob("*.json")])
    check_nesting(events)
    (victim,) = {event["pid"] for event in events} - set(survivors[0])
    (fault,) = [event for event in events if event["name"].startswith("fault: reduce of all_reduce")]
    assert fault["pid"] == victim
    assert spans(events, "all_reduce")[-1]["args"]["attempts"] >= 1
    for survivor in survivors[0]:
        mine = [event for event in events if event["pid"] == survivor]
        assert spans(mine, "recover")
        assert [span["args"]["attempts"] for span in spans(mine, "all_reduce")][-1] == 2
        assert any(event["ph"] == "i" and event["args"].get("lost") == [victim] for event in mine)


def test_the_profiler_of_torch_sees_operations() -> None:
    with Cluster(founders=2) as cluster:
        for seen in cluster.run(trace_programs.profile, 2):
            assert sorted(seen) == ["ringhold::all_reduce", "ringhold::barrier"]


def written(folder: Path, name: str, boot: str, monotonic: float, wall: float, times: list[float]) -> None:
    clock = {"run": "r", "monotonic_us": monotonic, "wall_us": wall, "boot": boot}
    events: list[Event] = [{"ph": "M", "name": "clock", "pid": int(name), "tid": 0, "args": clock}]
    events += [{"ph": "i", "s": "p", "name": "tick", "ts": ts, "pid": int(name), "tid": 0, "args": {}} for ts in times]
    (folder / f"r-{name}.json").write_text("[\n" + "".join(f"{json.dumps(event)},\n" for event in events))


def test_clocks_of_hosts_are_aligned_and_torn_lines_left_out(tmp_path: Path) -> None:
    written(tmp_path, "1", "here", 1_000.0, 900_000.0, [1_100.0, 1_200.0])
    written(tmp_path, "2", "there", 50_000.0, 900_050.0, [50_000.0])
    with (tmp_path / "r-2.json").open("a") as file:
        file.write('{"ph": "i", "na')
    assert console.run(ringhold, ["trace", "merge", str(tmp_path), "-o", str(tmp_path / "all.json")]) == 0
    merged = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    ticks = sorted((event["ts"], event["pid"]) for event in merged if event["name"] == "tick")
    assert ticks == [(0.0, 2), (50.0, 1), (150.0, 1)]


def test_what_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["trace", "merge", str(tmp_path), "-o", str(tmp_path / "all.json")]) == 2
    assert "RINGHOLD_TRACE" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"a": 1}\n')
    with pytest.raises(CorruptFile, match="no trace of a member"):
        trace.read(tmp_path / "other.json")
