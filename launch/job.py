"""The training loop of one peer: join, agree on the state, train through every change of the membership, end together.

Run by a supervisor's child process with its communicator and pipe, and with `Communicator.solo()` by anybody who wants
one process. All that could be lost with a peer is what it had not yet contributed: a step counts once every member has
the whole gradient of the whole batch, and only then does anything move.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from collectives.communicator import Communicator
from collectives.errors import Evicted, RingholdError, StateDiverged, StateLost, UsageError
from collectives.outcome import Outcome
from collectives.region import split
from collectives.state import state_hash
from launch import checkpoints, data, finals, gradient, model
from launch.config import JobConfig
from launch.ledger import Commit, Done, Ledger, Samples, Start
from launch.trainer import Trainer, one_thread

Event = dict[str, Any]
Report = Callable[[Event], None]
"""Takes one event, a dict of JSON values. `event` is one of

joined: `member`, `rank`, `size`, `epoch`, `founder`. A peer that was evicted joins again under another member id.
synced: `member`, `step` (steps done), `bytes` received, `seconds`, `healed` (the state was another one before).
step: `member`, `step` (steps done, this one included), `loss`, `epoch`, `size`, `time` (seconds), `repeats`.
eval: `member`, `step`, `loss` of held-out text.
checkpoint: `member`, `step`, `url` of the store, `bytes` of the state, of these `written`, ranks that were `lost`
meanwhile, `seconds`.
evicted: `member`, `message`. The peer joins again.
traffic: `member`, bytes of tensors that it has sent, `to` each member.
left: `member`, `step`. It departed in order, as asked.
late: the run was over before this peer could take part.
sample: `text` that the trained model wrote. From the first rank only.
done: `member`, `rank`, `step`, `loss`, `hash` of the state, `path` of the result.
"""


@dataclass(frozen=True, slots=True)
class PeerResult:
    """How a peer ended that finished with the run."""

    hash: str
    """Of the final state, the same on every member."""
    losses: tuple[float, ...]
    """Losses of the steps that this peer took part in, since it joined last."""
    text: str
    """What the trained model wrote; empty on all but the first rank."""


def run_peer(
    config: JobConfig,
    comm_factory: Callable[[], Communicator],
    report: Report,
    leaving: threading.Event | None = None,
) -> PeerResult | None:
    """Train as one member until the run is over; come back as a new member after an eviction.

    Args:
        config: the same on every member, but for `resume`, which only founders read.
        comm_factory: joins the run; called again after an eviction. What it returns is left or closed here.
        report: told of everything that happens; called from this thread.
        leaving: once set, the peer departs in order at the next step's end.

    Returns:
        The result, or None if the peer left, or came when the run was over.

    Raises:
        UsageError: the text or the state to resume from do not fit, or the folder holds another run.
        QuorumLost, CoordinatorUnreachable, StateLost, StateDiverged, JoinRefused: the run goes on without this peer,
            or not at all.

    """
    with one_thread():
        corpus = data.load(config.data, config.context, config.batch)
        while True:
            # All that takes time comes before joining: the others wait for a member, not for a peer.
            trainer = Trainer(config, corpus)
            try:
                comm = comm_factory()
            except Evicted:  # let in, and taken for dead before its first epoch stood
                continue
            try:
                return _kind(config)(config, trainer, comm, report, leaving or threading.Event()).run()
            except Evicted as error:
                report({"event": "evicted", "member": comm.member_id, "message": str(error)})
                over = finals.exists(config.out_dir)
            except StateLost:
                # A joiner alone: the run ended while it was on its way, or nobody is left who knows its state.
                over = not comm.founder and finals.exists(config.out_dir)
                if not over:
                    raise
            finally:
                comm.close()
            if over:
                report({"event": "late"})
                return None


def _kind(config: JobConfig) -> type["Membership"]:
    """How this job trains: every member has all of the state, or a part of it by a plan."""
    if not config.plan:
        return Membership
    from launch.planned import PlannedMembership  # brings in torch's compiler

    return PlannedMembership


class Membership:
    """One membership of a peer, from joining to its end."""

    def __init__(
        self, config: JobConfig, trainer: Trainer, comm: Communicator, report: Report, leaving: threading.Event
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.comm = comm
        self.leaving = leaving
        self.losses: list[float] = []
        self._report = report
        if comm.founder and finals.exists(config.out_dir):
            raise UsageError(f"{config.out} holds the result of another run; choose another folder")
        self.ledger = Ledger(config.out_dir, comm.member_id)

    def run(self) -> PeerResult | None:
        """Train to the end; None if asked to leave before."""
        comm, trainer = self.comm, self.trainer
        self.report("joined", rank=comm.rank, size=comm.size, epoch=comm.epoch, founder=comm.founder)
        try:
            self._begin()
            while trainer.step < self.config.steps:
                self._step()
                self._checkpoint()
                if trainer.step == self.config.steps:
                    break
                if self.leaving.is_set():
                    comm.leave()
                    self.report("left", step=trainer.step)
                    return None
                if comm.admit():
                    self._sync()
            return self._end()
        finally:
            self.ledger.close()

    def report(self, event: str, **values: Any) -> None:
        """Tell the supervisor."""
        self._report({"event": event, "member": self.comm.member_id, **values})

    def _begin(self) -> None:
        """Come to the state that the others have, or for founders the first rank's."""
        trainer = self.trainer
        if self.comm.founder and self.config.resume is not None:
            trainer.absorb(checkpoints.load(self.config.resume))
            if trainer.step >= self.config.steps:
                raise UsageError(
                    f"{self.config.resume} is of step {trainer.step} and the run is to end after {self.config.steps}; "
                    "ask for more steps"
                )
        self._sync()
        plan = trainer.plan
        self.ledger.write(Start(self.comm.member_id, trainer.step, plan.windows, plan.batch, plan.seed))

    def _sync(self) -> None:
        started = time.perf_counter()
        state = self.trainer.state()
        done = self.comm.sync(state)
        self.trainer.absorb(state)
        self.report(
            "synced",
            step=self.trainer.step,
            bytes=done.bytes_received,
            seconds=time.perf_counter() - started,
            healed=done.healed,
        )

    def _step(self) -> None:
        """Attempt one step until it counts for everybody, then move."""
        started = time.perf_counter()
        step, attempt = self.trainer.step, 0
        while (outcome := self._attempt(step, attempt)) is None:
            attempt += 1
        loss = self._loss(outcome, self.trainer.tokens)
        self.trainer.apply()
        hashed = self.config.hash_every and (step + 1) % self.config.hash_every == 0
        digest = state_hash(self.trainer.state()) if hashed else ""
        self.ledger.write(Commit(step, attempt, outcome.epoch, outcome.contributors, loss, digest))
        self.losses.append(loss)
        self.report(
            "step",
            step=step + 1,
            loss=loss,
            epoch=outcome.epoch,
            size=len(outcome.contributors),
            time=time.perf_counter() - started,
            repeats=attempt,
        )
        every = self.config.eval_every
        if every and ((step + 1) % every == 0 or step + 1 == self.config.steps):
            self.report("eval", step=step + 1, loss=self._evaluate())

    def _checkpoint(self) -> None:
        """Save the state, if it is time to."""
        config, step = self.config, self.trainer.step
        if not self._saves(step):
            return
        done = checkpoints.save(config.checkpoint, self.trainer.state(), self.comm, config.shard_optimizer)
        self.report(
            "checkpoint",
            step=step,
            url=done.url,
            bytes=done.nbytes,
            written=done.written.stored,
            lost=list(done.lost),
            seconds=done.seconds,
        )

    def _saves(self, step: int) -> bool:
        config = self.config
        return bool(config.checkpoint) and (not step % config.checkpoint_every or step == config.steps)

    def _attempt(self, step: int, attempt: int) -> Outcome | None:
        """Compute this member's share and sum everybody's; None if a member was lost, on every member alike.

        Nothing needs to be restored then: all that has moved are the gradient buckets, which the next attempt clears.
        """
        comm, trainer = self.comm, self.trainer
        with comm.step() as guard:
            samples = trainer.share(comm.rank, comm.size)
            self.ledger.write(Samples(step, attempt, comm.epoch, tuple(samples)))
            outcome = gradient.reduce(trainer, comm, samples)
        return outcome if guard.committed else None

    def _evaluate(self) -> float:
        """Return the mean loss over the first windows of the held-out text, of which every member computes a share."""
        comm = self.comm
        windows = range(min(self.config.eval_samples, self.trainer.corpus.validation_windows))
        while True:
            with comm.step() as guard:
                start, stop = split(len(windows), comm.size)[comm.rank]
                total = self.trainer.evaluate(windows[start:stop])
                counts = torch.tensor([total, (stop - start) * self.config.context], dtype=torch.float64)
                outcome = comm.all_reduce(counts)
            if guard.committed:
                return self._loss(outcome, len(windows) * self.config.context)

    def _loss(self, outcome: Outcome, tokens: int) -> float:
        """Return the mean of a reduced (sum of losses, number of tokens), once it is sure to cover all tokens."""
        assert outcome.result is not None
        total, counted = outcome.result.tolist()
        if counted != tokens:
            raise RingholdError(
                f"members {outcome.contributors} summed {counted:.0f} of {tokens} tokens at step {self.trainer.step}: "
                "a share is missing or counted twice; this is a defect, please report it with the files in peers/"
            )
        if not math.isfinite(total):
            raise RingholdError(f"the loss is {total} at step {self.trainer.step}; try a lower learning rate (lr)")
        return float(total / tokens)

    def _end(self) -> PeerResult:
        """Prove that all have the same state, write it, depart together."""
        comm, trainer = self.comm, self.trainer
        details = {"config": self.config.to_dict(), "loss": self.losses[-1]}
        while True:
            with comm.step() as guard:
                digest = self._compare()
                if comm.rank == 0:
                    finals.save(self.config.out_dir, trainer.state(), details)
            if guard.committed:
                break
        rank = comm.rank
        self.ledger.write(Done(trainer.step, digest))
        self.report("traffic", to=comm.meter.to)
        # Everybody has passed the last step's barrier: nobody's departure can make another repeat anything.
        comm.leave()
        text = self._write_sample() if rank == 0 else ""
        path = str(self.config.out_dir / finals.FINAL)
        self.report("done", rank=rank, step=trainer.step, loss=self.losses[-1], hash=digest, path=path)
        return PeerResult(digest, tuple(self.losses), text)

    def _compare(self) -> str:
        """Return the hash of the state, which is the same on every member.

        Raises:
            StateDiverged: it is not.

        """
        own = state_hash(self.trainer.state())
        outcome = self.comm.all_gather(torch.frombuffer(bytearray.fromhex(own), dtype=torch.uint8))
        assert outcome.result is not None
        found = [bytes(row.tolist()).hex() for row in outcome.result]
        if len(set(found)) > 1:
            listing = ", ".join(f"{digest[:12]} on {m}" for m, digest in zip(outcome.contributors, found, strict=True))
            raise StateDiverged(
                f"members ended with different states: {listing}; if their torch or CPU differ, make them equal"
            )
        return own

    def _write_sample(self) -> str:
        if not self.config.sample_tokens:
            return ""
        prompt = bytes(self.trainer.corpus.validation[:16].tolist())
        written = model.generate(self.trainer.model, prompt, self.config.sample_tokens, self.trainer.generator)
        text = written.decode(errors="replace")
        self.report("sample", text=text)
        return text
