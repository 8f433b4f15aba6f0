"""One rank of a benchmark: joins the runs, lets the competitors take turns, checks their results, tells the numbers.

`Rank` is what a process does, whoever started it (`bench_host`, `bench_child`). Rank 0 alone tells, what it heard from
all.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from collectives.busbw import bus_factor
from collectives.communicator import Communicator
from collectives.gather_bytes import gather_bytes
from collectives.options import Options
from launch import bench_calibrate, bench_roofline
from launch.bench_cases import Case
from launch.bench_kinds import bandwidth
from launch.bench_memory import Bandwidth, measure_bandwidth, reduction_floor
from launch.bench_request import CONTROL, OURS, Request
from launch.bench_rivals import Competitor, Mpi, Ours, TorchGloo

Tell = Callable[[dict[str, Any]], None]
"""Takes messages: "progress", "row", "memory", "done"; see `Rank`."""

_BATCH_SECONDS = 10e-3
"""Operations shorter than this are timed many at a time, as in nccl-tests: waking up from the barrier before each turn
would count as much as they do."""
_MOST_AT_ONCE = 200
_PATIENCE = 10.0
"""Heartbeat timeout unless the user sets one: a benchmark loads the machine fully and is no test of detection."""
_LIMIT_FROM = 1 << 24
"""Smaller messages are not bound by memory but by caches (bytes)."""
_LARGEST_COPY = 1 << 26


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: its number, how many there are, and HOST:PORT of the coordinator of each run."""

    rank: int
    ranks: int
    coordinators: Mapping[str, str]
    token: str


class Rank:
    """A context manager. `measure` is called once, on all ranks alike."""

    def __init__(self, request: Request, place: Place, tell: Tell) -> None:
        self._request, self._place, self._tell = request, place, tell
        self._held = ExitStack()
        self._competitors: dict[str, Competitor] = {}
        torch.set_num_threads(1)  # the cores belong to the ranks: a pool of threads in each would only get in the way

    def __enter__(self) -> "Rank":
        try:
            self._control = self._join(CONTROL, self._request.runs[CONTROL])
            self._held.callback(self._control.leave)
            for name, compete in self._entrants():
                self._competitors[name] = compete()
                self._held.callback(self._competitors[name].close)
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def measure(self) -> int:
        """Measure all sizes; return how many values were wrong, on all ranks together."""
        if self._request.calibrate:
            return self._calibrate()
        request, wrong, row = self._request, 0, None
        forms = [
            inplace for inplace in (False, True) if (request.what.in_place if inplace else request.what.out_of_place)
        ]
        total = len(request.sizes) * len(forms)
        for number, (size, inplace) in enumerate((size, inplace) for size in request.sizes for inplace in forms):
            self._say("progress", done=number, of=total, size=size)
            row = self._row(size, inplace)
            wrong += row["wrong"] + sum(rival["wrong"] for rival in row["vs"].values())
            self._say("row", **row)
        if request.kind == "all_reduce" and row is not None and row["size"] >= _LIMIT_FROM and self._place.ranks > 1:
            self._compare_with_memory(row)
        self._say("done", wrong=wrong)
        return wrong

    def _entrants(self) -> Iterator[tuple[str, Callable[[], Competitor]]]:
        """The competitors in order, ours first, and how to make them."""
        request, ranks = self._request, self._place.ranks
        if request.calibrate:
            comm = self._join(OURS, request.transport)
            for algorithm in bench_calibrate.algorithms(ranks):
                yield algorithm, lambda algorithm=algorithm: Ours(comm, algorithm)  # type: ignore[misc]
            return
        for run, transport in request.runs.items():
            if run != CONTROL:
                yield run, lambda run=run, transport=transport: Ours(self._join(run, transport), request.algorithm)  # type: ignore[misc]
        if "gloo" in request.rivals:
            yield "gloo", lambda: TorchGloo(self._folder(), self._place.rank, ranks)
        if "mpi" in request.rivals:
            yield "mpi", lambda: Mpi(ranks)

    def _join(self, run: str, transport: str) -> Communicator:
        options = {} if "RINGHOLD_HEARTBEAT_TIMEOUT" in os.environ else {"heartbeat_timeout": _PATIENCE}
        place = self._place
        return Communicator.join(place.coordinators[run], run, place.token, transport, Options.resolve(options))

    def _folder(self) -> Path:
        """Return one folder for all ranks, made by one of them, which removes it when all have done with it."""
        mine = ""
        if self._place.rank == 0:
            mine = self._held.enter_context(tempfile.TemporaryDirectory(prefix="ringhold-bench-"))
        self._held.callback(self._control.barrier)
        return Path(b"".join(gather_bytes(self._control, mine.encode()).rows).decode())

    def _row(self, size: int, inplace: bool) -> dict[str, Any]:
        """Measure and check one size in one form, with everybody; the same on all ranks."""
        request = self._request
        ours = self._competitors[OURS]
        empty = ours.comm.empty if request.registered and isinstance(ours, Ours) else torch.empty
        cases = [Case(request, size, self._place.ranks, empty) for _ in range(request.lanes)]
        times, wrong, batches = self._compare(cases, inplace)
        count = sum(case.each for case in cases)
        moved = sum(case.count for case in cases) * cases[0].dtype.itemsize
        seconds = times[OURS]
        algbw = bandwidth(moved, seconds)
        return {
            "collective": request.kind,
            "size": moved,
            "count": count,
            "dtype": request.dtype,
            "redop": cases[0].op or "none",
            "root": request.root if request.what.rooted else -1,
            "peers": self._place.ranks,
            "transport": request.transport,
            "algorithm": request.algorithm,
            "inplace": inplace,
            "time_us": seconds * 1e6,
            "algbw": algbw,
            "busbw": algbw * bus_factor(request.what.name, self._place.ranks),
            "wrong": wrong[OURS],
            "rounds": request.rounds,
            "batch": batches[OURS],
            "vs": {
                name: {
                    "time_us": times[name] * 1e6,
                    "ratio": times[name] / seconds,
                    "wrong": wrong[name],
                }
                for name in request.rivals
            },
        }

    def _compare(self, cases: list[Case], inplace: bool) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
        """By competitor: seconds an operation, wrong values on all ranks, operations a turn; the same on all ranks."""
        samples, batches = self._take_turns(cases, inplace)
        wrong = {name: self._check(competitor, cases, inplace) for name, competitor in self._competitors.items()}
        reports = self._gather({"samples": samples, "wrong": wrong})
        times = {name: _median_of_slowest([report["samples"][name] for report in reports]) for name in samples}
        return times, {name: sum(report["wrong"][name] for report in reports) for name in samples}, batches

    def _calibrate(self) -> int:
        """Measure every algorithm at all sizes, fit the cost model, tell the profile."""
        request, ranks = self._request, self._place.ranks
        times: dict[str, dict[int, float]] = {name: {} for name in self._competitors}
        wrong = 0
        for number, size in enumerate(request.sizes):
            self._say("progress", done=number, of=len(request.sizes), size=size)
            found, wrong_now, _ = self._compare([Case(request, size, ranks)], False)
            wrong += sum(wrong_now.values())
            for name, seconds in found.items():
                times[name][size] = seconds
        host, computed = self._measure_memory(_LARGEST_COPY), self._measure_compute()
        if self._place.rank == 0:
            found_fit, roofline = bench_calibrate.fit(request.transport, ranks, times), bench_roofline.fit(computed)
            profile = msgspec.to_builtins(msgspec.structs.replace(found_fit.profile, compute=roofline.compute))
            about = {"error": found_fit.error, "worst": found_fit.worst, "loss": found_fit.loss}
            about["compute_error"] = roofline.error
            self._say("profile", profile=profile, times=times, copy=host.copy, add=host.add, **about)
        self._say("done", wrong=wrong)
        return wrong

    def _take_turns(self, cases: list[Case], inplace: bool) -> tuple[dict[str, list[float]], dict[str, int]]:
        """Seconds an operation of this rank, a number for each competitor's turn; and operations in a turn."""
        names = list(self._competitors)
        batches = self._warm_up(cases, inplace)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self._request.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(self._time(self._competitors[name], cases, inplace, batches[name]))
        return samples, batches

    def _warm_up(self, cases: list[Case], inplace: bool) -> dict[str, int]:
        """Run everything some times; return how many operations of each make a turn, the same on all ranks."""
        lasted = {}
        for name, competitor in self._competitors.items():
            times = [self._time(competitor, cases, inplace, 1) for _ in range(max(1, self._request.warmup))]
            lasted[name] = times[-1]
        reports = self._gather(lasted)
        slowest = {name: max(float(report[name]) for report in reports) for name in lasted}
        return {name: max(1, min(_MOST_AT_ONCE, int(_BATCH_SECONDS / slowest[name]))) for name in slowest}

    def _time(self, competitor: Competitor, cases: list[Case], inplace: bool, batch: int) -> float:
        for case in cases:
            case.reset()
        self._control.barrier()
        competitor.align()
        begun = time.perf_counter()
        for _ in range(batch):
            competitor.run(cases, inplace)
        return (time.perf_counter() - begun) / batch

    def _check(self, competitor: Competitor, cases: list[Case], inplace: bool) -> int:
        """Count this rank's wrong values in turns of their own, each with other data."""
        wrong = 0
        for turn in range(self._request.checks):
            for lane, case in enumerate(cases):
                case.load(competitor.rank, turn + lane, inplace)
            self._control.barrier()
            results = competitor.run(cases, inplace)
            for lane, (case, result) in enumerate(zip(cases, results, strict=True)):
                wrong += case.wrong(result, competitor.rank, turn + lane)
        return wrong

    def _compare_with_memory(self, row: dict[str, Any]) -> None:
        """Tell what of the host's memory bandwidth the all-reduce of `row` reaches."""
        host = self._measure_memory(min(row["size"], _LARGEST_COPY))
        floor = reduction_floor(row["size"], self._place.ranks, host)
        fraction = floor / (row["time_us"] / 1e6)
        self._say("memory", copy=host.copy, add=host.add, size=row["size"], floor_us=floor * 1e6, fraction=fraction)

    def _measure_memory(self, size: int) -> Bandwidth:
        """Measure all ranks at once; return what they have together."""
        self._control.barrier()
        mine = measure_bandwidth(size)
        reports = self._gather({"copy": mine.copy, "add": mine.add})
        return Bandwidth(sum(report["copy"] for report in reports), sum(report["add"] for report in reports))

    def _measure_compute(self) -> dict[bench_roofline.Case, float]:
        """Let all ranks compute at once; return seconds by case, the mean of all ranks."""
        self._control.barrier()
        mine = bench_roofline.measure()
        reports = self._gather({"seconds": list(mine.values())})
        means = map(statistics.fmean, zip(*(report["seconds"] for report in reports), strict=True))
        return dict(zip(mine, means, strict=True))

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(row) for row in gather_bytes(self._control, json.dumps(mine).encode()).rows]

    def _say(self, kind: str, **fields: Any) -> None:
        if self._place.rank == 0:
            self._tell({"type": kind, **fields})


def _median_of_slowest(samples: list[list[float]]) -> float:
    """Return the median over the turns of the time of the slowest rank."""
    return float(statistics.median(map(max, zip(*samples, strict=True))))
