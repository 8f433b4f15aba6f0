"""What a peer of a churn run does: operations without end, each one checked, and state that it shares and heals.

The words that it shares with the lab say where it was when it died, and where the lab wants it to be struck: a point of
the protocol is hit exactly so, and by chance never. Whatever it finds wrong it reports; `launch.churn_audit` compares
what the members report.
"""

import ctypes
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from checkpoint import save
from collectives import faults
from collectives.communicator import Communicator
from collectives.errors import Evicted, MemberLost, RingholdError
from collectives.hashing import digest
from collectives.outcome import Outcome
from collectives.state import state_hash
from collectives.transports import mpi_spawn, mpi_world
from launch.churn_cases import LARGEST, Case, Trial, Workbench, case_of, side_expected, side_trial
from launch.churn_plan import Phase
from launch.crew import Desk, usage
from launch.crew_ranks import SPAWN, spawn

PHASES: tuple[Phase, ...] = ("operation", "sync", "giver", "admit", "save")
SETTLE_SECONDS = 60.0
"""More than a thread stays behind whose build of a gloo group was abandoned: gloo gives up peer by peer, 15 s each."""
ADMIT_EVERY = 4
"""Operations between two safe points."""
SAVE_EVERY = 14
"""Operations between two checkpoints."""
STATE_BYTES = 3 << 20
_KEPT = 4096
"""Weights that a checkpoint keeps: enough for some chunks, few enough for an hour of checkpoints."""
_SLOT = 257
_LINKS = 100
"""Members of whom a member tells how many bytes it has sent them: a message has a limit."""


class Word(IntEnum):
    """What the lab and a peer share: numbers in memory that outlives the peer."""

    ENTERED = 0
    """Number of the last operation that was entered, and LEFT, that was left: inside an operation while they differ."""
    LEFT = 1
    ACTIVE = 2
    """Counts up while the peer does anything."""
    LEAVE = 3
    """Whether to leave."""
    AIM = 4
    """1 + index of the fault point to be struck at; behind it the phase (index), the kind of operation (index, 0: any),
    how many passings to let go by, the signal, and microseconds to wait there."""
    AIM_PHASE = 5
    AIM_KIND = 6
    AIM_SKIP = 7
    AIM_SIGNAL = 8
    AIM_DELAY = 9
    STRUCK = 10
    """When it struck itself, ns since 1970."""
    HOLD = 11
    """Milliseconds for which to hold the interpreter's lock."""
    FLIP = 12
    """1: damage a frame of data, 2: of control; behind it the place in the frame, in millionths."""
    FLIP_PLACE = 13
    SPAWN = SPAWN
    """Over MPI: 1 + name of a peer that this one is to spawn."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What all peers of a run are told: `kinds` of operations, bytes of the largest, and where checkpoints go."""

    seed: int
    transport: str
    kinds: tuple[str, ...]
    checkpoints: str
    largest: int = LARGEST


def live(desk: Desk, orders: Orders) -> None:
    """Be a member until told to leave; after an eviction, again. Ends with a "usage" message."""
    before = usage()
    lives = 0
    spawning: list[threading.Thread] = []
    while not desk.words[Word.LEAVE]:
        lives += 1
        try:
            comm = desk.join(transport=orders.transport)
        except Evicted as error:
            desk.report("evicted", reason=str(error)[:500])
            continue
        desk.report("joined", member=comm.member_id, epoch=comm.epoch, founder=comm.founder)
        try:
            _Member(desk, comm, orders, spawning).run()
            desk.report("leaving", member=comm.member_id)
            comm.leave()
        except Evicted as error:
            desk.report("evicted", reason=str(error)[:500])
            comm.close()
        desk.report("traffic", member=comm.member_id, to=dict(Counter(comm.meter.to).most_common(_LINKS)))
    for thread in spawning:
        while thread.is_alive():
            thread.join(0.1)
            desk.words[Word.ACTIVE] += 1
    desk.report("left")
    lent = _lent(orders.transport)
    before = {key: count + lent.get(key, 0) for key, count in before.items()}
    after = _settled(desk, before)
    threads = [thread.name for thread in threading.enumerate()][:20]
    desk.report("usage", lives=lives, before=before, after=after, threads=threads, lent=lent)


class _Member:
    """One membership."""

    def __init__(self, desk: Desk, comm: Communicator, orders: Orders, spawning: list[threading.Thread]) -> None:
        self._desk, self._comm, self._orders, self._spawning = desk, comm, orders, spawning
        self._me = comm.member_id
        self._epoch = 0
        # A founder's is the run's. Newcomers all hold the same wrong one, as if they had started from one seed.
        self._state = _fresh_state(0 if comm.founder else 1)

    @property
    def _number(self) -> int:
        return int(self._state["number"].item())

    def run(self) -> None:
        words = self._desk.words
        self._sync()
        while not words[Word.LEAVE]:
            words[Word.ACTIVE] += 1
            self._suffer()
            if words[Word.SPAWN]:
                name, words[Word.SPAWN] = words[Word.SPAWN] - 1, 0
                self._spawning.append(threading.Thread(target=self._spawn, args=(name,), name=f"spawn peer {name}"))
                self._spawning[-1].start()
            self._operate(case_of(self._orders.seed, self._number + 1, self._orders.kinds, self._orders.largest))
            if self._number % SAVE_EVERY == 0:
                self._save()
            if self._number % ADMIT_EVERY == 0 and self._admit():
                self._sync()

    def _spawn(self, name: int) -> None:
        """Start another peer of this MPI job, beside operations; it takes as long as that needs to start."""
        try:
            spawn(self._comm, name)
            self._desk.report("spawned", peer=name)
        except RingholdError as error:
            self._desk.report("unspawned", peer=name, why=str(error)[:500])

    def _admit(self) -> bool:
        with self._aimed("admit"):
            return self._comm.admit()

    def _sync(self) -> None:
        """Share the state, and tell the audit whose it was."""
        with self._aimed("sync", "giver"):
            report = self._comm.sync(self._state)
        self._desk.report(
            "synced",
            member=self._me,
            number=self._number,
            state=state_hash(self._state)[:32],
            winner=report.winner[:32],
            givers=report.givers,
            healed=report.healed,
        )

    def _save(self) -> None:
        """Write a checkpoint, which must be whole whoever is lost meanwhile: every member holds everything."""
        self._comm.barrier()  # all mean the same members by it, also right behind a loss
        kept = kept_of(self._state)
        with self._aimed("save"):
            report = save(self._orders.checkpoints, kept, comm=self._comm, step=self._number)
        self._desk.report("saved", number=self._number, state=state_hash(kept)[:32], lost=len(report.lost))

    # --- operations ---

    def _operate(self, case: Case) -> None:
        """One operation, and the proof that it came to what its contributors put in, or left all inputs alone."""
        words = self._desk.words
        trial = Workbench(self._comm, case).trial()
        wrong: list[str] = []
        side = side_trial(self._comm, case)
        beside = self._comm.all_reduce(side, lane="side", async_op=True) if case.beside else None
        words[Word.ENTERED] = case.number
        outcome: Outcome | None = None
        with self._aimed("operation", kind=case.kind), self._input_check(trial, case, wrong):
            try:
                outcome = trial.call()
            except MemberLost as error:
                wrong += _complaints(error, trial, case, self._me)
                if case.on_loss == "raise":
                    self._comm.resume()
        words[Word.LEFT] = case.number
        done = time.time()
        words[Word.ACTIVE] += 1
        shown = ""
        if outcome is not None:
            shown = self._check(outcome, trial, case, wrong)
        if beside is not None:
            ended = beside.wait()
            if not torch.equal(side, side_expected(case, ended.contributors)):
                wrong.append(f"the all-reduce in another lane is not the sum of members {ended.contributors}")
        contributors = outcome.contributors if outcome is not None else ()
        self._advance(case, contributors if case.kind != "send_recv" else ())
        self._desk.report(
            "op",
            number=case.number,
            operation=case.kind,
            bytes=sum(tensor.nbytes for tensor in trial.inputs),
            done=done,
            contributors=contributors,
            attempts=outcome.attempts if outcome is not None else 0,
            from_staging=outcome is not None and outcome.from_staging,
            epoch=outcome.epoch if outcome is not None else 0,
            digest=shown,
            history=self._state["history"].numpy().tobytes().hex()[:16],
            wrong=wrong,
        )

    def _check(self, outcome: Outcome, trial: Trial, case: Case, wrong: list[str]) -> str:
        """Compare results with what the contributors put in; return their digest where all members have the same."""
        expected = trial.expected(outcome)
        results = list(outcome.results) or ([outcome.result] if outcome.result is not None else [])
        if expected is not None and not _equal(results, expected):
            wrong.append(f"{case} of members {outcome.contributors} came to other values than theirs")
        if self._me not in outcome.contributors:
            wrong.append(f"member {self._me} got a result of {outcome.contributors}")
        if outcome.epoch < self._epoch:
            wrong.append(f"the epoch went from {self._epoch} back to {outcome.epoch}")
        self._epoch = max(self._epoch, outcome.epoch)
        if not trial.shared or case.kind == "send_recv":
            return ""
        return digest(b"".join(result.contiguous().numpy().tobytes() for result in results)).hex()[:32]

    def _advance(self, case: Case, contributors: Sequence[int]) -> None:
        """Let the state depend on all that ever happened, so that members who disagree cannot hide it."""
        history = self._state["history"]
        told = history.numpy().tobytes() + repr((case.number, tuple(contributors))).encode()
        history.copy_(torch.frombuffer(bytearray(digest(told)), dtype=torch.uint8))
        self._state["number"].fill_(case.number)
        weights = self._state["weights"]
        slots = len(weights) // _SLOT
        weights[case.number % slots :: slots] += int(history[0]) + 1

    @contextmanager
    def _input_check(self, trial: Trial, case: Case, wrong: list[str]) -> Iterator[None]:
        """At the start of a second attempt the caller's tensors must be as they were.

        The operation runs in this thread; one beside it, in another, is none of its attempts.
        """
        here, begun = threading.get_ident(), 0

        def check(where: str) -> None:
            nonlocal begun
            begun += threading.get_ident() == here
            if begun == 2 and trial.spoilt():
                wrong.append(f"an input was changed before the second {where}")
            if begun < 2:
                faults.arm("begin", check, kind=case.kind)

        faults.arm("begin", check, kind=case.kind)
        yield

    # --- being struck ---

    @contextmanager
    def _aimed(self, *phases: Phase, kind: str = "") -> Iterator[None]:
        """While inside, this process strikes itself at the point that the lab chose, if it is one of these phases."""
        words = self._desk.words
        wanted = self._orders.kinds[words[Word.AIM_KIND] - 1] if words[Word.AIM_KIND] else ""
        if words[Word.AIM] and PHASES[words[Word.AIM_PHASE]] in phases and wanted in ("", kind):
            point = faults.POINTS[words[Word.AIM] - 1]
            faults.arm(point, self._strike, kind=wanted, skip=words[Word.AIM_SKIP])
        try:
            yield
        finally:
            faults.disarm()

    def _strike(self, _where: str) -> None:
        words = self._desk.words
        if not words[Word.AIM]:
            return  # the lab has thought better of it
        time.sleep(words[Word.AIM_DELAY] / 1e6)
        words[Word.AIM] = 0
        words[Word.STRUCK] = time.time_ns()
        os.kill(os.getpid(), signal.Signals(words[Word.AIM_SIGNAL]))

    def _suffer(self) -> None:
        """Hold the interpreter's lock, or damage a frame that goes out next, as the lab wishes."""
        words = self._desk.words
        if words[Word.HOLD]:
            milliseconds, words[Word.HOLD] = words[Word.HOLD], 0
            _hold(milliseconds)
            self._desk.report("held", seconds=milliseconds / 1000)
        if words[Word.FLIP]:
            what, words[Word.FLIP] = words[Word.FLIP], 0
            place = words[Word.FLIP_PLACE] / 1e6
            faults.damage("data" if what == 1 else "control", place, self._flipped)

    def _flipped(self, what: str) -> None:
        self._desk.report("flipped", what=what)


def _complaints(error: MemberLost, trial: Trial, case: Case, me: int) -> list[str]:
    """What is wrong about an operation that a loss ended."""
    wrong = [f"{case} ended with {error}, and an input was changed"] if trial.spoilt() else []
    if error.survivors and me not in error.survivors:
        wrong.append(f"{case}: member {me} is told that it is not among the survivors {error.survivors}")
    return wrong


def _equal(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(results) == len(expected) and all(map(torch.equal, results, expected))


def _fresh_state(start: int) -> dict[str, Tensor]:
    """The state at the beginning: the number of the last operation, a digest of the history, and some weights."""
    return {
        "number": torch.full((1,), -start, dtype=torch.int64),
        "history": torch.full((32,), start, dtype=torch.uint8),
        "weights": torch.full((STATE_BYTES // 8,), start, dtype=torch.int64),
    }


def kept_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state that checkpoints keep."""
    return {**state, "weights": state["weights"][:_KEPT]}


def _hold(milliseconds: int) -> None:
    """Sleep without letting any other thread of this process run, as a C extension does that keeps the lock."""
    sleep: Callable[[int], int] = ctypes.PyDLL(None).usleep
    end = time.monotonic() + milliseconds / 1000
    while (left := end - time.monotonic()) > 0:
        sleep(min(900_000, int(left * 1e6) + 1))


def _lent(transport: str) -> dict[str, int]:
    """What a library may hold for as long as the process lives, by the names of `usage`.

    Open MPI has a connection with each process that was not started together with this one and exchanged data with it,
    and each of its calls whose other end died in the middle may keep a thread.
    """
    if transport != "mpi":
        return {}
    calls = mpi_spawn.stuck()
    return {"descriptors": len(mpi_world.enter().universes) - 1, "threads": calls, "python_threads": calls}


def _settled(desk: Desk, before: dict[str, int]) -> dict[str, int]:
    """What is held after leaving; what gloo takes down in the background gets some time for that."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        after = usage()
        if time.monotonic() > end or all(after[key] <= before[key] for key in before if key != "rss"):
            return after
        time.sleep(0.05)
        desk.words[Word.ACTIVE] += 1
