"""One training run from the command to the exit code: coordinator, peers and churn, then the proofs and the summary.

Called by `launch.train` and `launch.demo`. Alone, this process supervises all peers; under a launcher it supervises one
and meets the supervisors of the others in `launch.rendezvous`, where rank 0 judges for all.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collectives.errors import CoordinatorUnreachable, RingholdError, UsageError
from collectives.membership.wire import load_token
from collectives.options import Options
from launch import attach, console, display
from launch.config import JobConfig
from launch.environment import Launcher, peer_environment
from launch.faults import Planned
from launch.record import Entry, RunLog, RunRecord, entry
from launch.rendezvous import Rendezvous
from launch.supervisor import Spec, Supervisor

_MEETING_TIMEOUT = 60.0
"""Seconds that supervisors of one launch wait for rank 0's coordinator."""
_RECORD_TIMEOUT = 30.0
"""Seconds that rank 0 waits for the others' records once its own part is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for. `peers` counts all of the run's first peers, `faults` all of its churn."""

    peers: int
    config: JobConfig
    faults: tuple[Planned, ...] = ()
    coordinator: str = ""
    """HOST:PORT of a coordinator that runs elsewhere; empty: we host one."""
    run: str = "default"
    transport: str = "gloo"
    restart: bool = False
    pace: float = 0.0
    """A step takes at least this many seconds."""
    timeout: float = 3600.0
    stall: float = 120.0
    quiet: bool = False
    command: str = "train"
    replay: str = ""
    """The command that does the same again."""

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.config.out_dir


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the run went, before anything is proven: the record, whole on rank 0, and where this process stands."""

    record: RunRecord
    rank: int
    meeting: Rendezvous | None

    def conclude(self, code: int) -> int:
        """Rank 0: tell the other supervisors the exit code; return it."""
        if self.meeting is not None:
            self.meeting.announce(code)
        return code


def perform(request: Request, launcher: Launcher | None) -> Outcome:
    """Run the peers to the end.

    Under a launcher, ranks other than 0 come back with rank 0's verdict still to be awaited (`await_verdict`).

    Raises:
        UsageError: the output folder holds something, a token or a coordinator's address is missing.

    """
    if launcher is None:
        _fresh(request.out)
        token = _token(hosting=not request.coordinator)
        spec = _spec(request, token, slots=tuple(range(request.peers)), hosting=not request.coordinator)
        return Outcome(_supervise(spec, request), 0, None)
    if launcher.one_host:
        return _meet(request, launcher)
    if not request.coordinator:
        raise UsageError(
            f"{launcher.title} spans hosts: set RINGHOLD_COORDINATOR=HOST:PORT (`ringhold coordinator` runs there) "
            "and RINGHOLD_TOKEN for every process"
        )
    request.out.mkdir(parents=True, exist_ok=True)
    spec = _spec(request, _token(hosting=False), slots=(launcher.rank,), hosting=False)
    return Outcome(_supervise(spec, request), launcher.rank, None)


def await_verdict(outcome: Outcome, timeout: float) -> int | None:
    """Other ranks on one host: return the exit code that rank 0 found; None where this process has to judge itself."""
    if outcome.rank == 0 or outcome.meeting is None:
        return None
    return 128 + outcome.record.signal if outcome.record.signal else outcome.meeting.verdict(timeout)


class _Party:
    """The other supervisors of this launch, as a supervisor sees them."""

    def __init__(self, meeting: Rendezvous, size: int, hosting: bool) -> None:
        self._meeting, self._size, self._hosting = meeting, size, hosting

    def furthest(self) -> int:
        return self._meeting.furthest()

    def need_us(self) -> bool:
        return self._hosting and not all(self._meeting.has_record_of(rank) for rank in range(1, self._size))


def _meet(request: Request, launcher: Launcher) -> Outcome:
    """Supervise one peer of a launch on one host."""
    meeting = Rendezvous.of_launcher(launcher, os.environ)
    hosting = launcher.rank == 0 and not request.coordinator
    party = _Party(meeting, launcher.size, hosting)
    if launcher.rank == 0:
        _fresh(request.out)
        token = _token(hosting)

        def tell(address: str) -> None:
            meeting.publish({"coordinator": address, "out": str(request.out.absolute())}, token)

        if not hosting:
            tell(request.coordinator)
        spec = _spec(request, token, slots=(0,), hosting=hosting, others=party)
        record = _supervise(spec, request, meeting, tell if hosting else None)
        if not record.signal and record.coordinator_error is None:
            deadline = time.monotonic() + _RECORD_TIMEOUT
            for rank in range(1, launcher.size):
                record.merge(_record_of(meeting, rank, deadline - time.monotonic()))
        return Outcome(record, 0, meeting)
    facts = meeting.wait(_MEETING_TIMEOUT)
    token = meeting.token_file.read_text()
    request = _at(request, facts)
    spec = _spec(request, token, slots=(launcher.rank,), hosting=False, others=party)
    record = _supervise(spec, request, meeting)
    meeting.leave_record(record.to_json())
    return Outcome(record, launcher.rank, meeting)


def _at(request: Request, facts: dict[str, Any]) -> Request:
    """Return the request with rank 0's coordinator and output folder."""
    return replace(
        request, coordinator=facts["coordinator"], config=request.config.replace(out=facts["out"]), quiet=True
    )


def _record_of(meeting: Rendezvous, rank: int, timeout: float) -> RunRecord:
    try:
        return RunRecord.from_json(meeting.record_of(rank, timeout))
    except CoordinatorUnreachable as error:
        return RunRecord(timeout=str(error))


def _supervise(
    spec: Spec, request: Request, meeting: Rendezvous | None = None, on_listening: Callable[[str], None] | None = None
) -> RunRecord:
    """Run the supervisor with the run's log and display as observers."""
    name = "run.jsonl" if spec.slots[0] == 0 else f"run.{spec.slots[0]}.jsonl"
    log = RunLog(spec.out / name)
    step = 0
    with display.choose(request.config.steps, request.quiet) as shown:

        def observe(seen: Entry) -> None:
            nonlocal step
            log(seen)
            shown(seen)
            if meeting is not None and seen["type"] == "progress" and seen["step"] > step:
                step = seen["step"]
                meeting.progress(step)
            if on_listening is not None and seen["type"] == "listening":
                on_listening(seen["address"])

        if spec.slots[0] == 0:
            log(entry("supervisor", "run", command=request.command, seed=request.config.seed, replay=request.replay))
        try:
            return Supervisor(spec, observe).run()
        finally:
            log.close()


def _spec(request: Request, token: str, *, slots: tuple[int, ...], hosting: bool, others: Any = None) -> Spec:
    environ = peer_environment(os.environ, keep_mpi=request.transport == "mpi")
    environ.pop("RINGHOLD_TOKEN_FILE", None)
    environ["RINGHOLD_TOKEN"] = token
    # The arithmetic is single-threaded by design; without this every process would start a pool for each core.
    environ.setdefault("OMP_NUM_THREADS", "1")
    if hosting:
        environ["RINGHOLD_FOUNDERS"] = str(request.peers)
    journal = str(request.out / "coordinator.journal")
    here = [sys.executable, "-m"]
    options = Options.resolve(environ=environ)
    return Spec(
        slots=slots,
        out=request.out,
        environ=environ,
        peer=[*here, "launch.peer"],
        start={
            "config": request.config.to_json(),
            "run": request.run,
            "transport": request.transport,
            "pace": request.pace,
        },
        coordinator=[*here, "launch.coordinator", "--run", request.run, "--journal", journal] if hosting else None,
        address=request.coordinator or f"{options.listen}:0",
        door=lambda address: _waiting(address, token, request.run, options),
        steps=request.config.steps,
        faults=tuple(fault for fault in request.faults if others is None or _ours(fault, slots, hosting)),
        heartbeat_timeout=options.heartbeat_timeout,
        restart=request.restart,
        others=others,
        timeout=request.timeout,
        stall=request.stall,
    )


def _waiting(address: str, token: str, run: str, options: Options) -> int:
    """Ask the coordinator how many peers wait to be let in; 0 if it does not answer."""
    try:
        host, port = console.split_address(address, "coordinator")
        return attach.status(host, port, token.encode(), run, options, timeout=1.0).waiting
    except RingholdError:
        return 0


def _ours(fault: Planned, slots: tuple[int, ...], hosting: bool) -> bool:
    """Under a launcher each supervisor strikes its own peer, and rank 0 its coordinator too."""
    return hosting if fault.slot is None else fault.slot in slots


def _token(hosting: bool) -> str:
    """Return the run's token: what the user set, else a new one where we host the coordinator."""
    if hosting and not os.environ.get("RINGHOLD_TOKEN") and not os.environ.get("RINGHOLD_TOKEN_FILE"):
        return secrets.token_urlsafe(32)
    return load_token().decode()


def _fresh(out: Path) -> None:
    """Make the run's folder, which has to be new or empty: results of two runs must never mix."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"the folder {out} is not empty; name a new one with --out, or remove what is in it")
    except OSError as error:
        raise UsageError(f"cannot use the folder {out}: {error.strerror}; name another one with --out") from None
