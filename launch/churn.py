"""`ringhold churn`: the churn lab. Real processes are struck by a seeded plan, and every result is checked."""

import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from collectives.errors import Unsupported, UsageError
from launch import console
from launch.bench_request import parse_size
from launch.churn_plan import KINDS, Kind, Plan, parse_kinds
from launch.record import Entry, RunLog, entry

_OP_TIMEOUT = 15.0
_JOIN_TIMEOUT = 30.0
_WITHIN_A_HOST = {
    "shm": "shared memory is within one host, where no link can be cut",
    "mpi": "the ranks that one mpirun starts here share a host, where no link can be cut",
}
_LEAST = 2
_MOST = 64


@click.command("churn", context_settings={"max_content_width": 100})
@click.option("--peers", default="3..6", show_default=True, metavar="LEAST..MOST", help="How many there are at a time.")
@click.option(
    "--seconds", type=console.Finite(0, min_open=True), default=60.0, show_default=True, help="How long it strikes."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of faults, victims, operations and sizes.")
@click.option("--faults", "faults_text", default="all", show_default=True, help=f"Some of {', '.join(KINDS)}.")
@click.option("--ops", default="all", show_default=True, help="Kinds of operations, with commas between.")
@click.option("--transport", default="gloo", show_default=True, help="What carries the tensors.")
@click.option("--every", default="0.5..2", show_default=True, metavar="SECONDS..SECONDS", help="Between two faults.")
@click.option("--largest", default="4M", show_default=True, help="Bytes of the largest operation, with K or M.")
@click.option("--heartbeat-timeout", type=float, default=2.0, show_default=True, help="Seconds of silence that evict.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of log and evidence.  [default: none is kept]",
)
@click.option("--json", "json_file", type=console.OutputFile(), help="Write the figures there.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    peers: str,
    seconds: float,
    seed: int,
    faults_text: str,
    ops: str,
    transport: str,
    every: str,
    largest: str,
    heartbeat_timeout: float,
    out: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> int:
    """Strike the members and the coordinator of a run, and check every value that it computes.

    Faults strike at random instants and at chosen points: before, in and after each step of each operation, while a
    peer joins, while the state is synced (also whoever gives it), while members are let in, while another recovery
    runs.

    \b
    kill         SIGKILL                           coordinator  SIGKILL or SIGSTOP of the coordinator
    stop         SIGSTOP until evicted             partition    a member is cut off, in network namespaces (root)
    leave, join  in order                          slow         a member stands still, not for long enough
    corrupt      one bit of a frame is flipped: of a control frame, and with a checked transport also of data

    It fails (exit code 1) on a wrong value, members that disagree, a changed input, a hang, a leak, state that was lost
    or given by somebody who was not healed, and prints the command that replays the seed.
    """
    from launch.churn_cases import KINDS_OF_OPERATIONS

    least, most = _range(peers, "--peers")
    shortest, longest = _range(every, "--every")
    if not _LEAST <= least <= most <= _MOST or least != int(least) or most != int(most):
        raise UsageError(f"--peers {peers}: two numbers from {_LEAST} to {_MOST} with .. between, such as 2..10")
    wanted = parse_kinds(faults_text)
    kinds, left_out = _possible(wanted, transport, strict=faults_text != "all")
    operations = _operations(ops, KINDS_OF_OPERATIONS)
    size = parse_size(largest)
    replay = _replay(
        peers=peers,
        seconds=f"{seconds:g}",
        seed=str(seed),
        faults=",".join(kinds),
        ops=ops,
        transport=transport,
        every=every,
        largest=largest,
        heartbeat_timeout=f"{heartbeat_timeout:g}",
    )
    from launch.churn_peer import Orders
    from launch.churn_report import Settings
    from launch.churn_run import Request

    request = Request(
        orders=Orders(seed, transport, operations, "", size),
        plan=Plan(seed, kinds, operations, shortest, longest, data=transport.startswith("checked:")),
        kinds=kinds,
        least=int(least),
        most=int(most),
        seconds=seconds,
        heartbeat_timeout=heartbeat_timeout,
    )
    settings = Settings(peers, seconds, seed, transport, kinds, operations, replay, left_out)
    with console.terminated(), _folder(out) as folder:
        return _run(request, settings, folder, json_file, quiet=quiet, kept=out is not None)


def _run(request: Any, settings: Any, folder: Path, json_file: Path | None, *, quiet: bool, kept: bool) -> int:
    from launch import churn_report
    from launch.churn_lab import Lab
    from launch.churn_run import Failed, Hang, evidence
    from launch.crew import Crew
    from launch.crew_ranks import RankCrew
    from launch.network import Network

    log = RunLog(folder / "run.jsonl")
    progress = _Progress(request.seconds, quiet)

    def observe(one: Entry) -> None:
        log(one)
        progress(one)

    observe(entry("supervisor", "run", command="churn", seed=settings.seed, replay=settings.replay))
    began = time.monotonic()
    options = {
        "founders": request.least,
        "heartbeat_timeout": request.heartbeat_timeout,
        "op_timeout": _OP_TIMEOUT,
        "join_timeout": _JOIN_TIMEOUT,
    }
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(request.most)) if "partition" in request.kinds else None
        logs = folder / "logs"
        logs.mkdir()
        scratch = folder / "scratch"
        scratch.mkdir()
        # Whatever members write to the temporary folder must be gone when they are.
        stack.enter_context(_temporary_folder(scratch))
        request = replace(request, orders=replace(request.orders, checkpoints=str(folder / "checkpoints")))
        kind = RankCrew if request.orders.transport == "mpi" else Crew
        crew = stack.enter_context(kind(options, network, logs))
        lab = Lab(crew, request, network, observe)
        try:
            lab.run()
        except Failed as error:
            lab.audit.wrong.append(str(error))
        except Hang as error:
            lab.hangs.append(str(error))
        if lab.audit.wrong or lab.hangs:
            where = evidence(crew, folder)
            if kept:
                print(f"stacks and logs are in {where}", file=sys.stderr)
    lab.audit.wrong += churn_report.prove_checkpoints(folder / "checkpoints", lab.audit.saved)
    lab.audit.leaks += [f"{path.name} is left in the temporary folder" for path in scratch.iterdir()]
    report = churn_report.summary(lab, settings, time.monotonic() - began, logs)
    failed = bool(report["complaints"])
    observe(entry("supervisor", "verdict", passed=not failed, report=report))
    log.close()
    progress.close()
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    churn_report.show(report, lab.audit.false_evictions)
    if failed:
        print(f"FAILED, seed {settings.seed}; again: {settings.replay}")
    return 1 if failed else 0


class _Progress:
    """One line on a terminal."""

    def __init__(self, seconds: float, quiet: bool) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._seconds, self._began = seconds, time.monotonic()
        self._operations = self._faults = 0

    def __call__(self, one: Entry) -> None:
        """Take one log entry."""
        self._faults += one["type"] == "fault"
        if self._shown and one["type"] == "rate":
            self._operations += one["operations"]
            passed = time.monotonic() - self._began
            text = f"{passed:5.0f}/{self._seconds:g} s, {one['members']} members, {self._faults} faults, "
            print(f"\r{text}{self._operations} operations ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        if self._shown:
            print(file=sys.stderr)


def _range(text: str, option: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    try:
        least, most = float(low), float(high if dots else low)
    except ValueError:
        raise UsageError(f"{option} {text!r} is no number, or two with .. between, such as 2..10") from None
    if not 0 < least <= most < 1e6:
        raise UsageError(f"{option} {text!r}: the first number must be positive, and the second no smaller")
    return least, most


def _possible(wanted: tuple[Kind, ...], transport: str, *, strict: bool) -> tuple[tuple[Kind, ...], dict[str, str]]:
    """Return the faults that can be had here, and why the others cannot; `strict`: refuse then."""
    from collectives.epochs import parse_transport
    from launch import crew_ranks, network

    name = parse_transport(transport)[0]
    left_out: dict[str, str] = {}
    if name == "mpi":
        crew_ranks.require()
    if "partition" in wanted:
        if name in _WITHIN_A_HOST:
            left_out["partition"] = _WITHIN_A_HOST[name]
        else:
            try:
                network.require()
            except Unsupported as error:
                left_out["partition"] = str(error)
    if strict and left_out:
        raise Unsupported("; ".join(f"--faults {kind}: {why}" for kind, why in left_out.items()))
    kinds = tuple(kind for kind in wanted if kind not in left_out)
    for kind, why in left_out.items():
        print(f"without {kind}: {why}", file=sys.stderr)
    return kinds, left_out


def _operations(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if text == "all" else tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := sorted(set(names) - set(known)):
        raise UsageError(f"--ops: there is no operation {unknown[0]!r}; there are {', '.join(known)}")
    if not names:
        raise UsageError(f"--ops names no operation; there are {', '.join(known)}")
    return names


def _replay(**options: str) -> str:
    words = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in options.items()]
    return " ".join(["ringhold churn", *words])


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """The folder of the run: a new or empty one that stays, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="ringhold-churn-") as name:
            yield Path(name)
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        used = any(out.iterdir())
    except OSError as error:
        raise UsageError(f"--out: cannot use the folder {out}: {error.strerror}; name another one") from None
    if used:
        raise UsageError(f"--out: the folder {out} is not empty; name a new one")
    yield out


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[None]:
    former, tempfile.tempdir = tempfile.tempdir, str(folder)
    variable = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = former
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


if __name__ == "__main__":
    sys.exit(console.run(command))
