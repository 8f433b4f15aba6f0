"""`ringhold simulate`: how long a collective would take on a network that a file describes, without running it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from collectives import choice
from collectives.errors import UsageError
from collectives.simulate import SEGMENT_BYTES, Timing, simulate
from collectives.topology import Topology
from collectives.topology_file import load
from launch import console, units
from launch.bench_request import parse_size
from launch.chart import line_chart
from launch.display import print_table

_SIZES = 8
"""Sizes that a chart shows if one is given: this one, a quarter of it, and so on."""


@click.command("simulate", context_settings={"max_content_width": 100})
@click.argument("kind", metavar=f"[{'|'.join(choice.kinds())}]")
@click.option("--topology", "path", type=click.Path(path_type=Path), required=True, help="File of the network.")
@click.option("--ranks", type=click.IntRange(1), help="The first so many ranks of it.  [default: all]")
@click.option("--algorithm", default="auto", show_default=True, help='Names with commas between; "all" compares.')
@click.option("--size", "sizes", default="64M", show_default=True, help="Bytes with K, M or G; several with commas.")
@click.option("--itemsize", type=click.IntRange(1), default=4, show_default=True, help="Bytes of an element.")
@click.option("--root", type=click.IntRange(0), default=0, show_default=True, help="Rank of the root.")
@click.option("--segment", default=str(SEGMENT_BYTES), show_default=True, help="Bytes that are sent on at a time.")
@click.option("--reduce-rate", default=None, help="Bytes a second that a rank reduces.  [default: no limit]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--plot", type=console.OutputFile(), help="Draw the times over the sizes, as SVG.")
def command(
    kind: str,
    path: Path,
    ranks: int | None,
    algorithm: str,
    sizes: str,
    itemsize: int,
    root: int,
    segment: str,
    reduce_rate: str | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Time a collective on a network that is described in a file, without running it.

    The size is that of nccl-tests: the larger of what a rank gives and gets. Files are described in
    collectives/topology_file.py, with examples in examples/topologies. What is approximate is said in
    collectives/simulate.py; the last column tells which way a line was found.

    \b
    ringhold simulate all_reduce --algorithm all --ranks 64 --size 256M --topology examples/topologies/fat-tree.json
    """
    topology = load(path)
    case = _Case(kind, topology, ranks or topology.ranks, itemsize, root, parse_size(segment), _rate(reduce_rate))
    wanted = sorted({parse_size(text) for text in sizes.split(",")})
    if plot is not None and len(wanted) == 1:
        wanted = sorted({max(itemsize, wanted[0] // 4**power) for power in range(_SIZES)})
    results = case.compare(algorithm, wanted)
    if as_json:
        print(json.dumps(case.report(results)))
    else:
        case.show(results)
    if plot is not None:
        case.plot(results, plot)


@dataclass(frozen=True, slots=True)
class _Result:
    algorithm: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class _Case:
    """What is the same for all algorithms and sizes."""

    kind: str
    topology: Topology
    ranks: int
    itemsize: int
    root: int
    segment_bytes: int
    reduce_rate: float

    def compare(self, algorithm: str, sizes: list[int]) -> list[_Result]:
        """Time each algorithm at each size; "all" leaves out those that cannot do it, and says so.

        Raises:
            UsageError: there is no such kind, algorithm or rank.

        """
        known = choice.names(self.kind)
        if self.ranks > self.topology.ranks:
            raise UsageError(
                f"--ranks {self.ranks}: topology {self.topology.name!r} has {self.topology.ranks} ranks; "
                f"take fewer, or describe a larger network"
            )
        results = []
        for size in sizes:
            names = known if algorithm == "all" else algorithm.split(",")
            for name in names:
                try:
                    results.append(self._time(name, size))
                except UsageError as error:
                    if algorithm != "all":
                        raise
                    print(f"{self.kind} by {name}: {error}", file=sys.stderr)
        if not results:
            raise UsageError(f"no algorithm of {self.kind} can do this")
        return results

    def _time(self, name: str, size: int) -> _Result:
        world, count = self.ranks, size // self.itemsize
        if (
            self.kind == "all_to_all"
        ):  # a rank gives `size` bytes, a block to each; the work buffer has all ranks' blocks
            count = count // world * world * world
        hosts = self.topology.hosts[:world] if self.topology.hosts is not None else None
        if name == "auto":
            name = choice.choose(self.kind, world, count * self.itemsize, hosts=hosts)
        root = self.root if "root" in choice.takes(self.kind, name) else 0
        schedule = choice.build(self.kind, name, world, count, root=root, hosts=hosts)
        timing = simulate(
            schedule,
            self.topology,
            segment_bytes=self.segment_bytes,
            itemsize=self.itemsize,
            reduce_rate=self.reduce_rate,
        )
        return _Result(name, timing)

    def show(self, results: list[_Result]) -> None:
        """Print a table, the fastest first for each size."""
        print(f"{self.kind} on {self.ranks} ranks of {self.topology.name!r}")
        rows = []
        for result in sorted(results, key=lambda result: (result.timing.nbytes, result.timing.time)):
            timing = result.timing
            rows.append(
                (
                    units.size(timing.nbytes),
                    result.algorithm,
                    units.duration(timing.time),
                    units.rate(timing.algbw),
                    units.rate(timing.busbw),
                    timing.bottleneck,
                    f"{_load(timing):.0%}",
                    "each message" if timing.exact else "step by step",
                )
            )
        print_table(("size", "algorithm", "time", "algbw", "busbw", "busiest link", "busy", "followed"), rows)

    def report(self, results: list[_Result]) -> dict[str, Any]:
        """JSON values: seconds, bytes, bytes a second."""
        return {
            "kind": self.kind,
            "ranks": self.ranks,
            "topology": self.topology.name,
            "segment_bytes": self.segment_bytes,
            "itemsize": self.itemsize,
            "results": [
                {
                    "algorithm": result.algorithm,
                    "size": result.timing.nbytes,
                    "time": result.timing.time,
                    "algbw": result.timing.algbw,
                    "busbw": result.timing.busbw,
                    "busiest": result.timing.bottleneck,
                    "busiest_load": _load(result.timing),
                    "busiest_bytes": result.timing.port_bytes.max(),
                    "exact": result.timing.exact,
                }
                for result in results
            ],
        }

    def plot(self, results: list[_Result], path: Path) -> None:
        """Draw times over sizes. UsageError: the file cannot be written."""
        series: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            series.setdefault(result.algorithm, []).append((float(result.timing.nbytes), result.timing.time))
        text = line_chart(
            series,
            f"{self.kind} on {self.ranks} ranks: {self.topology.name}",
            "size",
            "time",
            log_x=True,
            log_y=True,
            x_format=units.size,
            y_format=units.duration,
            x_ticks=sorted({float(result.timing.nbytes) for result in results}),
        )
        try:
            path.write_text(text)
        except OSError as error:
            raise UsageError(f"--plot {path}: {error.strerror or error}") from None


def _load(timing: Timing) -> float:
    """For which part of the time the busiest link is busy."""
    return float(timing.port_busy.max() / timing.time) if timing.time else 0.0


def _rate(text: str | None) -> float:
    return float("inf") if text is None else float(parse_size(text))
