"""`ringhold bench` with real ranks: the table, the JSON, wrong values, bad flags, launchers, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from collectives import choice
from collectives.busbw import bus_factor
from collectives.cost import Compute, Profile
from collectives.errors import UsageError
from collectives.topology import Link
from launch import bench_calibrate, bench_host, bench_roofline, console
from launch.bench_kinds import KINDS, bandwidth, elements
from launch.bench_report import Report
from launch.bench_request import Request, parse_size, steps
from launch.cli import ringhold
from parallel.machine import Machine
from tests.harness.cluster import Cluster
from tests.launch import bench_programs

SMALL = ("-b", "1K", "-e", "16K", "-f", "16", "-n", "2", "-w", "1")
BENCH = (sys.executable, "-m", "launch.bench")


def start(*arguments: str, command: tuple[str, ...] = BENCH, **environ: str) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("RINGHOLD_")}
    given = [*command, *arguments]
    return subprocess.Popen(given, env={**known, **environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(popen: subprocess.Popen[str], timeout: float = 60.0) -> tuple[int, str, str]:
    try:
        out, err = popen.communicate(timeout=timeout)
    finally:
        popen.kill()
    return popen.returncode, out, err


def check_row(row: dict[str, Any], rivals: set[str]) -> None:
    """The columns follow from each other as in nccl-tests."""
    assert row["time_us"] > 0
    assert row["algbw"] == pytest.approx(row["size"] / row["time_us"] / 1e3)
    assert row["busbw"] == pytest.approx(row["algbw"] * bus_factor(row["collective"], row["peers"]))
    assert row["wrong"] == 0
    assert set(row["vs"]) == rivals
    for rival in row["vs"].values():
        assert rival["ratio"] == pytest.approx(rival["time_us"] / row["time_us"])
        assert rival["wrong"] == 0


def test_table_and_json_of_an_all_reduce(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    vs = ("--vs", "gloo,ours:gloo", "--plot", str(tmp_path / "times.svg"))
    popen = start("all_reduce", "--peers", "2", "--transport", "sockets", *SMALL, *vs, "--json", str(file))
    code, out, err = finish(popen)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    data = [line.split() for line in lines if not line.startswith("#")]
    assert [row[:5] for row in data] == [["1024", "256", "float", "sum", "-1"], ["16384", "4096", "float", "sum", "-1"]]
    assert all(len(row) == 5 + 2 * (4 + 2) for row in data)
    assert all(word in lines[3] for word in ("time", "algbw", "busbw", "#wrong", "xgloo", "xours:gloo"))
    assert lines[-2:][0] == "# Out of bounds values : 0 OK"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["size"], row["inplace"]) for row in rows] == [(s, i) for s in (1024, 16384) for i in (False, True)]
    for row in rows:
        check_row(row, {"gloo", "ours:gloo"})
        assert (row["transport"], row["algorithm"], row["count"]) == ("sockets", "auto", row["size"] // 4)
    chart = (tmp_path / "times.svg").read_text()
    assert all(name in chart for name in ("ringhold sockets, in place", "gloo, out of place", "16K"))
    average = sum(row["busbw"] for row in rows) / len(rows)
    assert lines[-1] == f"# Avg bus bandwidth    : {average:.4f}"


KIND_OPTIONS: dict[str, dict[str, Any]] = {
    "all_reduce": {"op": "avg", "dtype": "half", "lanes": 2, "registered": True},
    "reduce_scatter": {"op": "max", "dtype": "bfloat16"},
    "all_gather": {"dtype": "bfloat16", "lanes": 2},
    "all_to_all": {"dtype": "int8"},
    "reduce": {"op": "prod", "dtype": "int32", "root": 2},
    "gather": {"root": 1},
    "scatter": {"dtype": "double", "root": 1},
    "broadcast": {"dtype": "uint8", "root": 2, "lanes": 2},
    "barrier": {},
}


def test_every_kind_is_right_and_so_are_its_columns() -> None:
    """Three ranks, so that no part is as large as another by chance."""
    assert KIND_OPTIONS.keys() == KINDS.keys()
    common: dict[str, Any] = {"transport": "sockets", "rivals": ("gloo",), "rounds": 2, "warmup": 1}
    requests = [
        Request(kind=kind, sizes=(0,) if kind == "barrier" else (1024, 30_000), **common, **more).to_json()
        for kind, more in KIND_OPTIONS.items()
    ]
    with Cluster(founders=3) as control, Cluster(founders=3) as ours:
        given = {"coordinators": {"control": control.address, "ours": ours.address}, "requests": requests}
        peers = [control.peer(bench_programs.measure, rank=rank, ranks=3, **given) for rank in range(3)]
        told, *others = [peer.result() for peer in peers]
    assert others == [[], []]
    rows = [message for message in told if message["type"] == "row"]
    for kind in KINDS.values():
        of_kind = [row for row in rows if row["collective"] == kind.name]
        assert len(of_kind) == (1 if kind.name == "barrier" else 2 * (kind.out_of_place + kind.in_place))
        for row in of_kind:
            check_row(row, {"gloo"})


def test_calibration_measures_fits_and_writes_a_profile(tmp_path: Path) -> None:
    request = Request(kind="all_reduce", sizes=(1024, 65536), transport="sockets", rounds=2, warmup=1, calibrate=True)
    with Cluster(founders=2) as control, Cluster(founders=2) as ours:
        given = {"coordinators": {"control": control.address, "ours": ours.address}, "requests": [request.to_json()]}
        peers = [control.peer(bench_programs.measure, rank=rank, ranks=2, **given) for rank in range(2)]
        told, _ = [peer.result() for peer in peers]
    file = tmp_path / "profile.json"
    with Report(request, 2, str(file), None) as report:
        for message in told:
            report(message)
    (found,) = [message for message in told if message["type"] == "profile"]
    assert found["times"].keys() == set(bench_calibrate.algorithms(2))
    saved = Profile.load(file)
    assert saved.near.bandwidth == found["profile"]["near"]["bandwidth"]
    assert saved.compute is not None
    assert saved.compute.flops == found["profile"]["compute"]["flops"]
    assert saved.compute.flops.keys() == {"float32", "bfloat16", "float64"}
    machine = Machine.load(str(file))
    assert (machine.flops, machine.half_flops, machine.double_flops) == tuple(saved.compute.flops.values())
    assert (machine.bandwidth, machine.kernel) == (saved.compute.bandwidth, saved.compute.kernel)
    assert told[-1] == {"type": "done", "wrong": 0}


def test_the_fit_finds_what_the_times_came_from() -> None:
    near = Link(latency=20e-6, bandwidth=1e9)
    truth = Profile(near=near, far=near, overhead=5e-6, reduce_rate=2e9, operation=200e-6)
    times = {
        name: {size: choice.predict("all_reduce", name, 4, size, truth) for size in (4096, 2**20, 2**23)}
        for name in bench_calibrate.algorithms(4)
    }
    found = bench_calibrate.fit("gloo", 4, times)
    assert found.error < 0.02
    assert abs(found.worst[0]) < 0.05
    assert found.loss < 1.05
    assert found.profile.operation == pytest.approx(200e-6, rel=0.2)
    assert found.profile.near.bandwidth == pytest.approx(1e9, rel=0.2)


def test_the_roofline_that_times_came_from_is_found() -> None:
    truth = Compute(flops={"float32": 9e10, "bfloat16": 1.5e11, "float64": 3e10}, bandwidth=5e9, kernel=12e-6)
    cases = [(name, rows) for name, sizes in bench_roofline.PRODUCTS.items() for rows in sizes]
    cases += [("add", size) for size in bench_roofline.ADDED]
    found = bench_roofline.fit({case: bench_roofline.seconds(truth, case) for case in cases})
    assert found.error < 0.02
    assert found.compute.kernel == pytest.approx(truth.kernel, rel=0.1)
    assert found.compute.bandwidth == pytest.approx(truth.bandwidth, rel=0.1)
    for name, rate in truth.flops.items():
        assert found.compute.flops[name] == pytest.approx(rate, rel=0.1)


def test_wrong_values_are_counted_and_fail_the_command(tmp_path: Path) -> None:
    """As a launcher would start them: two processes that meet by the environment, one of which adds wrongly."""
    ranks = []
    for rank, script in enumerate((("-m", "launch.bench"), (str(Path(__file__).with_name("bench_wrong.py")),))):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environ = {**place, "TORCHELASTIC_RUN_ID": "test", "XDG_RUNTIME_DIR": str(tmp_path)}
        arguments = ("all_reduce", "--transport", "sockets", "--algorithm", "ring", *SMALL)
        ranks.append(start(*arguments, command=(sys.executable, *script), **environ))
    (code, out, err), (other_code, other_out, other_err) = (finish(rank) for rank in ranks)
    assert (code, other_code, other_out) == (1, 1, ""), err + other_err
    assert "# Out of bounds values : " in out
    assert "FAILED" in out
    rows = [line.split() for line in out.splitlines() if not line.startswith("#")]
    # In each of two checks the last element of the chunk that the second rank reduced is wrong on both.
    assert [(row[8], row[12]) for row in rows] == [("4", "4")] * 2
    assert not any((tmp_path / "ringhold").iterdir())


def test_under_torchrun_rank_0_alone_speaks(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.bench")
    arguments = ("all_gather", "--transport", "sockets", *SMALL, "--vs", "gloo", "--json", "-")
    code, out, err = finish(start(*arguments, command=torchrun, XDG_RUNTIME_DIR=str(tmp_path)))
    assert code == 0, err
    assert [json.loads(line)["peers"] for line in out.splitlines()] == [2] * 4
    assert not any((tmp_path / "ringhold").iterdir())


def test_mpirun_is_started_where_mpi_is_asked_for() -> None:
    arguments = ("all_reduce", "--peers", "2", "--transport", "sockets", *SMALL, "--vs", "mpi", "--json", "-")
    code, out, err = finish(start(*arguments))
    assert code == 0, err
    for line in out.splitlines():
        check_row(json.loads(line), {"mpi"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_command_is_the_end_of_all(number: signal.Signals) -> None:
    popen = start("all_reduce", "--peers", "2", "--transport", "sockets", "-e", "64K", "-n", "9999999")
    end = time.monotonic() + 30
    while len(children := psutil.Process(popen.pid).children()) < 4:  # two ranks, two coordinators
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1.0)
    popen.send_signal(number)
    code, _, err = finish(popen, 20)
    assert (code, "Traceback" in err) == (130 if number == signal.SIGINT else -number, False)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "name a collective"),
        (["all_reduces"], "'all_reduces'"),
        (["all_reduce", "-b", "64Q"], "64Q"),
        (["all_reduce", "--sizes", "1K,x"], "'x'"),
        (["all_reduce", "-b", "1M", "-e", "64K"], "must not be the larger"),
        (["all_reduce", "-f", "1"], "--factor"),
        (["all_reduce", "-d", "fp8"], "--dtype"),
        (["all_reduce", "-o", "xor"], "--op"),
        (["all_reduce", "-o", "avg", "-d", "int32"], "not exact"),
        (["all_reduce", "--peers", "0"], "--peers"),
        (["broadcast", "--peers", "2", "-r", "2"], "--root"),
        (["barrier", "--plot", "x.svg"], "no sizes"),
        (["all_reduce", "--calibrate"], "drop the collective"),
        (["--calibrate", "--peers", "1"], "two --peers"),
        (["all_reduce", "--vs", "gloo,gloo"], "different rivals"),
        (["all_reduce", "--vs", "mpi", "-d", "half"], "no type"),
        (["all_reduce", "--json", "/nowhere/at/all"], "/nowhere/at/all"),
        (["all_reduce", "--peers", "1", "--transport", "pigeon"], "pigeon"),
        (["all_reduce", "--peers", "1", "--algorithm", "magic"], "magic"),
    ],
)
def test_usage_errors_take_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(ringhold, ["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert word in line


def test_mpi_needs_a_launcher_that_speaks_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert console.run(ringhold, ["bench", "all_reduce", "--vs", "mpi"]) == 2
    assert "mpirun" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UsageError, match="mpirun or mpiexec on PATH"):
        bench_host.through_mpirun(2)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("100", "64K", "1m", "2GiB")] == [100, 65536, 2**20, 2**31]
    assert steps(1024, 70_000, 4, 0) == (1024, 4096, 16384, 65536)
    assert steps(0, 20, 1, 8) == (0, 8, 16)
    assert steps(64, 64, 1, 0) == (64,)
    assert elements(KINDS["all_gather"], 1000, 4, 3, 1) == 249
    assert elements(KINDS["all_reduce"], 1000, 4, 3, 2) == 125
    assert bandwidth(2_000_000_000, 0.5) == 4.0


def test_a_request_travels_as_json() -> None:
    request = Request(kind="reduce", sizes=(1, 2), transport="gloo", rivals=("gloo", "mpi"), op="max", root=1)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert request.needs_mpi
    assert request.runs == {"control": "sockets", "ours": "gloo"}
