"""What a peer of `benchmarks.kills` does: all-reduces without end, each one checked, until it is told to leave.

The words that it shares with the main process say where it was when it died (`ENTERED` > `LEFT`: inside an operation).
It strikes itself where the main process asks for it (`AIM`): a fault point is hit exactly so, and by chance never.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contributions import DTYPES, LARGEST, Contributions, shape_of
from collectives import faults, rawbytes
from collectives.communicator import Communicator
from collectives.errors import Evicted
from collectives.hashing import digest
from launch.crew import Desk, usage

ENTERED, LEFT, ACTIVE, AIM, AIM_SIGNAL, AIM_DELAY, STRUCK, LEAVE = range(8)
"""Words: numbers of operations; a count that moves while the peer does; 1 + number of the fault point to strike at,
the signal, microseconds to wait there; when that was (ns since 1970); whether to leave."""
SETTLE_SECONDS = 20.0
"""More than a thread stays behind whose build of a gloo group was abandoned."""
ADMIT_EVERY = 4
"""Operations between two safe points."""


def check_members(desk: Desk, seed: int, transport: str) -> None:
    """Be a member until told to leave; after an eviction, again. Ends with a "usage" message."""
    contributions = Contributions()
    buffers = {dtype: torch.zeros(LARGEST // dtype.itemsize, dtype=dtype) for dtype in DTYPES}
    before = usage()
    lives = 0
    while not desk.words[LEAVE]:
        lives += 1
        comm = desk.join(transport=transport)
        desk.report("joined", member=comm.member_id, epoch=comm.epoch)
        try:
            _Member(desk, comm, seed, contributions, buffers).run()
            comm.leave()
        except Evicted as error:
            desk.report("evicted", reason=str(error)[:500])
            comm.close()
    after = _settled(desk, before)
    desk.report(
        "usage", lives=lives, before=before, after=after, threads=[thread.name for thread in threading.enumerate()]
    )


class _Member:
    """One membership."""

    def __init__(
        self,
        desk: Desk,
        comm: Communicator,
        seed: int,
        contributions: Contributions,
        buffers: dict[torch.dtype, Tensor],
    ) -> None:
        self._desk, self._comm, self._seed = desk, comm, seed
        self._contributions, self._buffers = contributions, buffers
        self._member = comm.member_id
        self._number = 0
        self._epoch = 0

    def run(self) -> None:
        words = self._desk.words
        self._agree()
        while not words[LEAVE]:
            words[ACTIVE] += 1
            self._number += 1
            self._operate()
            if self._number % ADMIT_EVERY == 0 and self._comm.admit():
                self._agree()

    def _agree(self) -> None:
        """Tell those who are new the number of the last operation."""
        number = torch.tensor([self._number])
        self._comm.all_reduce(number, "max")
        self._number = int(number.item())

    def _operate(self) -> None:
        """One all-reduce in place, and the proof that it is the sum of what its contributors put in."""
        words, number = self._desk.words, self._number
        shape = shape_of(self._seed, number)
        tensor = self._buffers[shape.dtype][: shape.elements]
        self._contributions.fill(tensor, self._member, number)
        spoilt: list[str] = []
        faults.arm("begin", self._input_check(tensor, number, spoilt), skip=1)
        self._take_aim()
        words[ENTERED] = number
        outcome = self._comm.all_reduce(tensor, algorithm=shape.algorithm)
        words[LEFT] = number
        done = time.time()
        faults.disarm()
        words[ACTIVE] += 1
        wrong = self._wrong(tensor, outcome.contributors, spoilt)
        self._desk.report(
            "op",
            number=number,
            bytes=tensor.nbytes,
            epoch=outcome.epoch,
            contributors=outcome.contributors,
            attempts=outcome.attempts,
            from_staging=outcome.from_staging,
            digest=digest(rawbytes.read(tensor)).hex(),
            done=done,
            wrong=wrong,
        )

    def _wrong(self, tensor: Tensor, contributors: tuple[int, ...], spoilt: list[str]) -> list[str]:
        wrong = list(spoilt)
        shape = shape_of(self._seed, self._number)
        expected = self._contributions.total(shape, contributors, self._number)
        if not torch.equal(tensor, expected):
            count = int((tensor != expected).sum())
            wrong.append(f"{count} of {tensor.numel()} elements are not the sum of members {contributors}")
        if self._member not in contributors:
            wrong.append(f"member {self._member} got a result of {contributors}")
        epoch = self._comm.epoch
        if epoch < self._epoch:
            wrong.append(f"the epoch went from {self._epoch} back to {epoch}")
        self._epoch = epoch
        return wrong

    def _input_check(self, tensor: Tensor, number: int, spoilt: list[str]) -> Callable[[str], None]:
        """At the start of a second attempt the caller's tensor must be as it was."""

        def check(where: str) -> None:
            shape = shape_of(self._seed, number)
            if not torch.equal(tensor, self._contributions.one(shape, self._member, number)):
                spoilt.append(f"the input was changed before the second {where}")

        return check

    def _take_aim(self) -> None:
        """Strike this process at the fault point that the main process chose; again next time if it is not passed."""
        words = self._desk.words
        if not words[AIM]:
            return

        def strike(where: str) -> None:
            time.sleep(words[AIM_DELAY] / 1e6)
            words[AIM] = 0
            words[STRUCK] = time.time_ns()
            os.kill(os.getpid(), signal.Signals(words[AIM_SIGNAL]))

        faults.arm(faults.POINTS[words[AIM] - 1], strike)


def _settled(desk: Desk, before: dict[str, int]) -> dict[str, int]:
    """What is held after leaving; what gloo takes down in the background gets some time for that."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        after = usage()
        if time.monotonic() > end or all(after[key] <= before[key] for key in before if key != "rss"):
            return after
        time.sleep(0.05)
        desk.words[ACTIVE] += 1
