"""`ringhold bench`, also `python -m launch.bench` under torchrun or MPI launchers: how fast the collectives are here.

The form is that of nccl-tests. Each rank is a process of its own; the competitors (ours, torch's gloo, the MPI library)
take turns in the same processes, so that whatever else the machine does meets all alike.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

from collectives.errors import UsageError
from launch import bench_host, console
from launch.bench_kinds import DTYPES, KINDS, OPS
from launch.bench_report import Report
from launch.bench_request import Request, parse_size, steps
from launch.environment import Launcher, detect

_DEFAULT_TRANSPORT = "gloo"
_CALIBRATION_SIZES = (4096, 32768, 262144, 2097152, 8388608)


@click.command("bench", context_settings={"max_content_width": 100})
@click.argument("collective", required=False)
@click.option("--peers", type=click.IntRange(1), help="Ranks to start.  [default: 4; under a launcher its processes]")
@click.option("--transport", default=_DEFAULT_TRANSPORT, show_default=True, help="What carries the tensors.")
@click.option("--algorithm", default="auto", show_default=True, help="Of the collective.")
@click.option(
    "-b", "--begin", "first", default="64K", show_default=True, help="Smallest size in bytes; K, M and G are known."
)
@click.option("-e", "--end", "last", default="64M", show_default=True, help="Largest size.")
@click.option("-f", "--factor", type=click.IntRange(1), default=4, show_default=True, help="From one size to the next.")
@click.option("-i", "--increment", default="0", help="Grow by so many bytes instead.")
@click.option("--sizes", "listed", default="", metavar="LIST", help="These sizes instead, such as 64K,1M,16M.")
@click.option("-n", "--iters", "rounds", type=click.IntRange(1), default=20, show_default=True, help="Timed rounds.")
@click.option("-w", "--warmup", type=click.IntRange(0), default=3, show_default=True, help="Rounds before them.")
@click.option(
    "-c",
    "--check",
    "checks",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Rounds whose every value is checked, apart from the timing.",
)
@click.option("-d", "--dtype", default="float", show_default=True, help=", ".join(DTYPES) + ".")
@click.option("-o", "--op", default="sum", show_default=True, help=", ".join(OPS) + ".")
@click.option("-r", "--root", type=click.IntRange(0), default=0, show_default=True, help="Rank of the root.")
@click.option(
    "--lanes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Cut each message in so many, one a lane, all at once.",
)
@click.option("--registered", is_flag=True, help="Use memory that the transport registers (Communicator.empty).")
@click.option(
    "--vs",
    default="",
    metavar="LIST",
    help="Rivals that take turns with us: gloo (torch's), mpi (the library's), or transports of ours (ours:gloo).",
)
@click.option(
    "--json",
    "json_to",
    default="",
    metavar="FILE",
    help="Write one JSON object a row; - for stdout, without the table.",
)
@click.option("--plot", "plot_to", type=console.OutputFile(), help="Draw time over size (SVG).")
@click.option("--calibrate", is_flag=True, help="Fit the cost model to this machine; --json is the profile.")
def command(collective: str | None, **given: Any) -> int:
    """Measure a collective as nccl-tests does, against gloo and MPI, and check its values.

    COLLECTIVE is all_reduce, reduce_scatter, all_gather, all_to_all, reduce, gather, scatter, broadcast or barrier.

    A round is a turn of each competitor, in the same processes; a turn is as many operations as take ten milliseconds,
    at least one. Times are medians over the rounds of the slowest rank. Exits with 1 if any value was wrong.

    \b
    torchrun --nproc-per-node 4 -m launch.bench all_reduce [OPTIONS]
    mpirun -n 4 ringhold bench all_reduce [OPTIONS]

    measure among the processes of the launcher. Where MPI is asked for (--vs mpi, --transport mpi) without a launcher,
    the command runs itself through mpirun.
    """
    launcher = detect(os.environ)
    peers = _peers(given["peers"], launcher)
    request = _request(collective, given, peers)
    if request.needs_mpi:
        if launcher is None:
            bench_host.through_mpirun(peers)
        if launcher.kind == "torchrun":
            raise UsageError("MPI needs processes that mpirun or mpiexec started; torchrun's are none")
    return 1 if _measure(request, launcher, peers, given["json_to"], given["plot_to"]) else 0


def _measure(request: Request, launcher: Launcher | None, peers: int, json_to: str, plot_to: Path | None) -> int:
    """Run it and print it (rank 0 alone); return how many values were wrong."""
    if launcher is not None and launcher.rank:
        return bench_host.launched(request, launcher, lambda message: None)
    with Report(request, peers, json_to, plot_to) as report:
        if launcher is None:
            return bench_host.alone(request, peers, report)
        return bench_host.launched(request, launcher, report)


def _peers(given: int | None, launcher: Launcher | None) -> int:
    if launcher is not None and given not in (None, launcher.size):
        raise UsageError(f"under {launcher.title} each of its {launcher.size} processes is a rank; drop --peers")
    return launcher.size if launcher is not None else given or 4


def _request(collective: str | None, given: dict[str, Any], peers: int) -> Request:
    """Check the options and make the request of them. Raises `UsageError`."""
    if given["calibrate"]:
        return _calibration(collective, given, peers)
    if collective is None:
        raise UsageError(f"name a collective: {', '.join(KINDS)}")
    if given["root"] >= peers:
        raise UsageError(f"--root {given['root']} is no rank among {peers}; ranks begin at 0")
    if collective == "barrier" and given["plot_to"]:
        raise UsageError("a barrier has no sizes to draw over; drop --plot")
    sizes = (0,) if collective == "barrier" else _sizes(given)
    names = ("transport", "algorithm", "dtype", "op", "root", "lanes", "registered", "rounds", "warmup", "checks")
    rivals = tuple(given["vs"].split(",")) if given["vs"] else ()
    return Request(kind=collective, sizes=sizes, rivals=rivals, **{name: given[name] for name in names})


def _sizes(given: dict[str, Any]) -> tuple[int, ...]:
    if given["listed"]:
        return tuple(parse_size(text) for text in given["listed"].split(","))
    first, last = parse_size(given["first"]), parse_size(given["last"])
    return steps(first, last, given["factor"], parse_size(given["increment"]))


def _calibration(collective: str | None, given: dict[str, Any], peers: int) -> Request:
    if collective is not None or given["vs"] or given["plot_to"]:
        raise UsageError("--calibrate measures all_reduce by all algorithms; drop the collective, --vs and --plot")
    if peers < 2:
        raise UsageError("--calibrate needs two --peers or more: one moves nothing")
    return Request(
        kind="all_reduce",
        sizes=_CALIBRATION_SIZES,
        transport=given["transport"],
        rounds=given["rounds"],
        warmup=given["warmup"],
        checks=given["checks"],
        calibrate=True,
    )


if __name__ == "__main__":
    sys.exit(console.run(command))
