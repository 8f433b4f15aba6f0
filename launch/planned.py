"""The training job by plan: `ringhold train --plan auto`. A member holds the part of the state that the plan gives it.

The step is the job's own (model, loss, clipping, AdamW), captured as a graph and planned for the members that there
are. Its numbers are those of one process to rounding, so ledgers, proofs and the reference are those of every job.
Made by `launch.job` for a config with a plan.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collectives.errors import StateLost, UsageError
from collectives.state import state_hash
from launch import checkpoints
from launch.config import JobConfig
from launch.job import Membership, PeerResult
from launch.ledger import Back, Commit, Samples
from launch.trainer import Trainer
from parallel.capturing import capture
from parallel.clipping import clipped
from parallel.executing import Results
from parallel.graph import Graph, Role
from parallel.layout import Mesh, parse_placement
from parallel.planner import plan
from parallel.plans import Placements, Plan
from parallel.training import Planner, Training


class PlannedMembership(Membership):
    """One membership of a peer that trains by plan, from joining to its end. Nobody is admitted meanwhile."""

    _training: Training
    _planner: Planner
    _current: int
    """Step whose state the trainer's own tensors hold."""
    _first: int
    """Step at which this member came in."""
    _saved = -1
    """Step of the last checkpoint that this member knows to be there; -1: none of this run."""

    def run(self) -> PeerResult | None:
        """Train to the end."""
        comm, trainer = self.comm, self.trainer
        self.report("joined", rank=comm.rank, size=comm.size, epoch=comm.epoch, founder=comm.founder)
        try:
            graph = captured(self.config, trainer)  # before the sync: members wait for each other there
            self._planner = planner_of(self.config, graph)
            self._planner(comm.size)
            self._begin()
            self._first = trainer.step
            self._found()
            self._train()
            return self._end()
        finally:
            self.ledger.close()

    def _found(self) -> None:
        """Share out the state, of which every member has all."""
        self._training = Training(self.comm, self._planner, state_of(self.trainer), self.config.redundancy)
        self._current = self.trainer.step

    def _train(self) -> None:
        """Take all steps; at the end every member has the whole state."""
        while True:
            try:
                while self.trainer.step < self.config.steps:
                    self._step()
                    self._checkpoint()
                self._gather()
            except StateLost as error:
                self._go_back(error)
            else:
                return

    def _go_back(self, error: StateLost) -> None:
        """Go on from the last checkpoint, since nobody who is left has all of the state; all survivors call it.

        Raises:
            StateLost: this run has none.

        """
        store, trainer, was = self.config.checkpoint, self.trainer, self.trainer.step
        while True:
            with self.comm.step() as guard:
                oldest = self.comm.all_reduce(torch.tensor([self._saved]), "min").result
            if guard.committed:
                break
        assert oldest is not None
        self._saved = int(oldest)
        if self._saved < 0:
            way = f"{store} has no checkpoint of this run yet" if store else "--checkpoint STORE would have saved some"
            raise StateLost(f"{error}: {way}") from None
        trainer.absorb(checkpoints.load(f"{store}@{self._saved}"))
        del self.losses[trainer.step - self._first :]
        self.ledger.write(Back(trainer.step, self.comm.epoch))
        self._found()
        self.report("reloaded", step=trainer.step, was=was, url=store, lost=len(error.keys), epoch=self.comm.epoch)

    def _step(self) -> None:
        """Repeat one step until it counts for everybody."""
        started, step, attempt = time.perf_counter(), self.trainer.step, 0
        given = self._given(step)
        while True:
            self.ledger.write(Samples(step, attempt, self.comm.epoch, self._samples(step)))
            results = self._attempted(given)
            if results is not None:
                break
            attempt += 1
        epoch, members = self.comm.epoch, self.comm.members
        loss = float(results[Role.LOSS, "loss"])
        self.trainer.step += 1
        self.losses.append(loss)
        hashed = self.config.hash_every and (step + 1) % self.config.hash_every == 0
        evaluated = self.config.eval_every and (
            (step + 1) % self.config.eval_every == 0 or step + 1 == self.config.steps
        )
        self.ledger.write(Commit(step, attempt, epoch, members, loss, self._hash() if hashed else ""))
        seconds = time.perf_counter() - started
        self.report("step", step=step + 1, loss=loss, epoch=epoch, size=len(members), time=seconds, repeats=attempt)
        if evaluated:
            self._gather()
            self.report("eval", step=step + 1, loss=self._evaluate())
        if not self._training.plan.collectives:
            self.comm.barrier()  # a plan that sends nothing would not notice who is gone

    def _attempted(self, given: Mapping[str, Tensor]) -> Results | None:
        results = self._training.attempt(given)
        if results is None:
            tensors, copies = len(self._training.plan.graph.changed), len(self._training.from_copies)
            self.report("carried", step=self.trainer.step, epoch=self.comm.epoch, tensors=tensors, copies=copies)
        return results

    def _checkpoint(self) -> None:
        """Save the state, if it is time to. The store's files are those of any job: a resume need not be planned."""
        if self._saves(self.trainer.step):
            self._gather()
            super()._checkpoint()
            self._saved = self.trainer.step

    def _given(self, step: int) -> dict[str, Tensor]:
        """The whole batch of a step and its learning rate."""
        trainer = self.trainer
        windows = [sample % trainer.corpus.windows for sample in trainer.plan.samples(step)]
        inputs, targets = trainer.corpus.batch(windows)
        rate = torch.tensor(trainer.schedule.lr(step), dtype=torch.float64)
        return {"batch.0": inputs, "batch.1": targets, "lr.0": rate, "lr.1": rate}

    def _samples(self, step: int) -> tuple[int, ...]:
        """The samples that count as this member's: those whose first holder by rank it is."""
        plan, rank = self._training.plan, self.comm.rank
        samples = self.trainer.plan.samples(step)
        if self.comm.members != self._training.members:
            return tuple(samples) if rank == 0 else ()  # an attempt that only finds out who is left
        layout, shape = plan.layouts["batch.0"], (self.config.batch, self.config.context)
        first: dict[int, int] = {}
        for holder in sorted(layout.mesh.ranks):
            box = layout.shard(shape, holder).box
            for row in range(box.start[0], box.stop[0]):
                first.setdefault(row, holder)
        return tuple(sample for row, sample in enumerate(samples) if first[row] == rank)

    def _hash(self) -> str:
        self._gather()
        return state_hash(self.trainer.state())

    def _gather(self) -> None:
        """Bring the whole state of now into the trainer."""
        if self._current != self.trainer.step:
            absorb(self.trainer, self._training.whole())
            self._current = self.trainer.step


def captured(config: JobConfig, trainer: Trainer) -> Graph:
    """The job's step as a graph: loss, gradients, clipping and AdamW in two groups."""
    ours = trainer.optimizer
    named = dict(trainer.model.named_parameters())
    groups = [
        {"params": [named[name] for name in group.members], "weight_decay": group.weight_decay}
        for group in ours.groups.values()
    ]
    some = next(iter(ours.groups.values()))
    theirs = torch.optim.AdamW(groups, lr=config.lr, betas=(some.beta1, some.beta2), eps=some.eps)
    tokens = torch.zeros(config.batch, config.context, dtype=torch.int64)
    return clipped(capture(_loss, trainer.model, theirs, (tokens, tokens)).graph, config.clip)


def planner_of(config: JobConfig, graph: Graph) -> Planner:
    """Plans for any number of members; remembered.

    Raises:
        UsageError: a pin names nothing, or placements that the tensor cannot have.
        NoPlan: nothing suits the pins.

    """
    known: dict[int, Plan] = {}

    def planned(members: int) -> Plan:
        if members not in known:
            mesh = mesh_of(config.plan, members)
            pins = {name: placed(text, mesh) for name, text in config.pins.items()}
            known[members] = plan(graph, mesh, pins=pins, redundancy=config.redundancy)
        return known[members]

    return planned


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and moments by the graph's names."""
    state = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    for name, moments in trainer.optimizer.moments.items():
        state |= {f"{name}.exp_avg": moments.exp_avg, f"{name}.exp_avg_sq": moments.exp_avg_sq}
    state["step"] = torch.tensor(float(trainer.step), dtype=torch.float64)
    return state


def absorb(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Take over what `state_of` gave."""
    for name, parameter in trainer.model.named_parameters():
        moments = trainer.optimizer.moments[name]
        parameter.detach().copy_(state[name])
        moments.exp_avg.copy_(state[f"{name}.exp_avg"])
        moments.exp_avg_sq.copy_(state[f"{name}.exp_avg_sq"])
        moments.step.fill_(int(state["step"]))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def mesh_of(wanted: str, members: int) -> Mesh:
    """The mesh that `JobConfig.plan` asks for, for so many members."""
    sizes = [int(size) for size in wanted.split("x")] if "x" in wanted else [members]
    if len(sizes) == 2 and sizes[0] * sizes[1] == members:
        return Mesh((("x", sizes[0]), ("y", sizes[1])))
    return Mesh((("x", members),))


def placed(text: str, mesh: Mesh) -> Placements:
    """A pin's placements; on a mesh of one axis the first of two."""
    found = tuple(map(parse_placement, text.split(",")))
    if len(found) < len(mesh.axes):
        raise UsageError(f"pin {text}: the mesh {mesh} has {len(mesh.axes)} axes and needs as many placements")
    return found[: len(mesh.axes)]
