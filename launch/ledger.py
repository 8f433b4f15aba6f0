"""Who computed which samples: a file per member, and the proof that every step's batch was computed exactly once.

`launch.job` writes `OUT/peers/<member>.jsonl`, one JSON object a line, each by one write before the member goes on, so
that a SIGKILL costs at most the end of the last line. `verify` trusts nothing but the files: it works out from the
run's seed what each step had to use and holds every line against it and against the other members' lines.

The lines, in order: `start` (once), then for each step one `samples` an attempt, written before the first byte of the
attempt's gradients leaves, and `commit` once the attempt was everybody's; `back` where the members take up a checkpoint
because state was lost with one of them; `done` at the end of a member that finished.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec

from collectives.errors import UsageError
from launch.data import Plan

PEERS = "peers"
_MOST_PROBLEMS = 20


class Start(msgspec.Struct, frozen=True, tag_field="event", tag="start", forbid_unknown_fields=True):
    """A member takes part from `step` on; the others are those of `launch.data.Plan`."""

    member: int
    step: int
    windows: int
    batch: int
    seed: int

    @property
    def plan(self) -> Plan:
        """Which samples each step has to use."""
        return Plan(self.windows, self.batch, self.seed)


class Samples(msgspec.Struct, frozen=True, tag_field="event", tag="samples", forbid_unknown_fields=True):
    """The member computes these samples in an attempt (0, 1, ...) of a step, as a member of `epoch`."""

    step: int
    attempt: int
    epoch: int
    samples: tuple[int, ...]


class Commit(
    msgspec.Struct, frozen=True, tag_field="event", tag="commit", forbid_unknown_fields=True, omit_defaults=True
):
    """An attempt of a step counts: `contributors` are member ids by rank, `loss` is the mean over the batch.

    `hash` is that of the whole state after the step, at some steps.
    """

    step: int
    attempt: int
    epoch: int
    contributors: tuple[int, ...]
    loss: float
    hash: str = ""


class Back(msgspec.Struct, frozen=True, tag_field="event", tag="back", forbid_unknown_fields=True):
    """The member goes on from the state before `step`, in `epoch`: what was committed of later steps before is void."""

    step: int
    epoch: int


class Done(msgspec.Struct, frozen=True, tag_field="event", tag="done", forbid_unknown_fields=True):
    """The member ended in order after `step` steps with a state of this hash."""

    step: int
    hash: str


Line: TypeAlias = Start | Samples | Commit | Back | Done
_decoder = msgspec.json.Decoder(Line)


class Ledger:
    """A member's own file, opened by the member when it joins.

    Raises:
        UsageError: the folder already holds a ledger of this member, so of another run.

    """

    def __init__(self, out: Path, member: int) -> None:
        path = out / PEERS / f"{member}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise UsageError(f"{path} exists: {out} holds another run; choose another folder") from None

    def write(self, line: Line) -> None:
        """Append a line; it outlives this process from here on."""
        data = msgspec.json.encode(line) + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What the ledgers of a run prove."""

    members: int
    """Members that took part, counting one that came back as a new one."""
    first_step: int
    """The step before which nothing is on record: 0, or where the run was resumed."""
    losses: tuple[float, ...]
    """Loss of each committed step from `first_step` on."""
    epochs: int
    """Membership epochs in which steps were committed."""
    repeated: int
    """Attempts that lost a member and were repeated."""
    withdrawn: int
    """Committed steps that were lost with a member's state, and taken again from a checkpoint."""
    samples: int
    """Samples that committed steps used."""
    complete: bool
    """Whether some member ended in order, after the last step."""
    hash: str
    """Of the state that members ended with; empty if none did, or not all with the same."""
    problems: tuple[str, ...]
    """What contradicts the claim that each committed step used its batch exactly once; the first few."""

    @property
    def ok(self) -> bool:
        """Whether the claim holds for all committed steps."""
        return not self.problems

    @property
    def steps(self) -> int:
        """Number of committed steps."""
        return len(self.losses)


def verify(out: Path) -> LedgerReport:
    """Hold the ledgers of all members in folder `out` against each other and against the run's plan.

    Raises:
        UsageError: there are no ledgers there.

    """
    paths = sorted((out / PEERS).glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    if not paths:
        raise UsageError(f"{out} holds no ledgers ({PEERS}/*.jsonl); name the --out folder of a training run")
    check = _Check()
    for path in paths:
        check.read(path)
    return check.report()


@dataclass(slots=True)
class _Member:
    """What one file says."""

    start: Start
    samples: dict[tuple[int, int], Samples] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)
    backs: list[Back] = field(default_factory=list)
    void: set[tuple[int, int]] = field(default_factory=set)
    """Step and epoch of what it committed before it went back."""
    done: Done | None = None
    next_step: int = 0
    """The step that the file's last line is about, or the one after if it committed it."""
    next_attempt: int = 0


class _Check:
    """Gathers the files, then the problems."""

    def __init__(self) -> None:
        self.members: dict[int, _Member] = {}
        self.problems: list[str] = []

    def read(self, path: Path) -> None:
        """Take in a file, with checks of its own order."""
        data = path.read_bytes()
        lines = data.split(b"\n")
        # What follows the last newline is the line that a killed member did not finish.
        for number, text in enumerate(lines[:-1], 1):
            where = f"{path.name} line {number}"
            try:
                line = _decoder.decode(text)
            except msgspec.DecodeError as error:
                self.problems.append(f"{where} cannot be read: {error}")
                return
            if number == 1:
                if not isinstance(line, Start) or str(line.member) != path.stem:
                    self.problems.append(f"{where} is not the start of member {path.stem}")
                    return
                self.members[line.member] = _Member(line, next_step=line.step)
            else:
                self._take(int(path.stem), line, where)

    def _take(self, member: int, line: Line, where: str) -> None:
        own = self.members[member]
        if own.done is not None or isinstance(line, Start):
            self.problems.append(f"{where} does not belong there: {type(line).__name__.lower()} after the end or start")
        elif isinstance(line, Done):
            own.done = line
            if line.step != own.next_step:
                self.problems.append(f"{where}: member {member} was done at step {line.step} but is at {own.next_step}")
        elif isinstance(line, Back):
            self._go_back(own, line, where)
        elif line.step != own.next_step:
            self.problems.append(
                f"{where} is about step {line.step} where step {own.next_step} is due: a step is missing"
            )
            own.next_step = line.step + isinstance(line, Commit)
        elif isinstance(line, Samples):
            if line.attempt != own.next_attempt:
                self.problems.append(f"{where} is attempt {line.attempt} where attempt {own.next_attempt} is due")
            own.samples[line.step, line.attempt] = line
            own.next_attempt = line.attempt + 1
        else:
            own.commits[line.step] = line
            own.next_step += 1
            own.next_attempt = 0

    def _go_back(self, own: _Member, line: Back, where: str) -> None:
        """What the file says of later steps is void; they follow once more."""
        if not own.start.step <= line.step <= own.next_step:
            self.problems.append(f"{where} goes back to step {line.step} from {own.next_step}")
            return
        own.void |= {(step, commit.epoch) for step, commit in own.commits.items() if step >= line.step}
        own.commits = {step: commit for step, commit in own.commits.items() if step < line.step}
        own.samples = {at: samples for at, samples in own.samples.items() if at[0] < line.step}
        own.next_step, own.next_attempt = line.step, 0
        own.backs.append(line)

    def _standing(self) -> dict[int, dict[int, Commit]]:
        """What members committed, by step, without what the others went back behind when a member was lost."""
        backs = {back for own in self.members.values() for back in own.backs}
        commits: dict[int, dict[int, Commit]] = defaultdict(dict)
        for member, own in self.members.items():
            for step, commit in own.commits.items():
                if not any(step >= back.step and commit.epoch < back.epoch for back in backs):
                    commits[step][member] = commit
        return commits

    def report(self) -> LedgerReport:
        """Check all that concerns several members and return the outcome."""
        commits = self._standing()
        first = min((own.start.step for own in self.members.values()), default=0)
        plans = {own.start.plan for own in self.members.values()}
        if len(plans) > 1:
            self.problems.append("members had different ideas of the batch, the text or the seed")
        agreed = {step: self._agree(step, commits[step]) for step in sorted(commits)}
        self._contiguous(first, agreed)
        samples = {step: self._samples_of(step, commit) for step, commit in agreed.items()}
        if len(plans) == 1:
            self._used_once(plans.pop(), samples)
        ending = self._ends(first + len(agreed))
        return LedgerReport(
            members=len(self.members),
            first_step=first,
            losses=tuple(agreed[step].loss for step in sorted(agreed)),
            epochs=len({commit.epoch for commit in agreed.values()}),
            repeated=sum(commit.attempt for commit in agreed.values()),
            withdrawn=len({void for own in self.members.values() for void in own.void}),
            samples=sum(map(len, samples.values())),
            complete=any(own.done is not None for own in self.members.values()),
            hash=ending,
            problems=_shorten(self.problems),
        )

    def _agree(self, step: int, commits: dict[int, Commit]) -> Commit:
        """All who committed the step have to say the same of it, and all who contributed have to have committed it."""
        (first, commit), *others = sorted(commits.items())
        for member, other in others:
            if other != commit:
                names = [name for name in commit.__struct_fields__ if getattr(commit, name) != getattr(other, name)]
                self.problems.append(f"step {step}: members {first} and {member} differ in {', '.join(names)}")
        for member in sorted(commits.keys() - set(commit.contributors)):
            self.problems.append(f"step {step}: member {member} committed it but did not contribute")
        for member in commit.contributors:
            own = self.members.get(member)
            # A member may have died between the step's end and its line, but then it says nothing after it either.
            if own is not None and member not in commits and (own.next_step > step or own.done is not None):
                self.problems.append(f"step {step}: contributor {member} went on without committing it")
        return commit

    def _contiguous(self, first: int, agreed: dict[int, Commit]) -> None:
        missing = sorted(set(range(first, max(agreed, default=first - 1) + 1)) - agreed.keys())
        if missing:
            self.problems.append(f"no member committed step {', '.join(map(str, missing[:5]))}, but later ones")

    def _used_once(self, plan: Plan, samples: dict[int, list[int]]) -> None:
        """Each committed step used exactly its batch, and over all of them no sample was used twice."""
        times: Counter[int] = Counter()
        for step, used in samples.items():
            times.update(used)
            self._compare(step, Counter(plan.samples(step)), Counter(used))
        twice = sorted(sample for sample, count in times.items() if count > 1)
        if twice:
            self.problems.append(f"{_name(plan, twice)} was used more than once in the run")

    def _compare(self, step: int, due: Counter[int], used: Counter[int]) -> None:
        for what, samples in (("missing from", due - used), ("used too often in", used - due)):
            if samples:
                few = ", ".join(map(str, sorted(samples.elements())[:5]))
                self.problems.append(f"step {step}: sample {few} {what} the contributors' lines")

    def _samples_of(self, step: int, commit: Commit) -> list[int]:
        """All samples that the contributors computed in the attempt that counts."""
        used: list[int] = []
        for member in commit.contributors:
            own = self.members.get(member)
            line = own.samples.get((step, commit.attempt)) if own is not None else None
            if line is None:
                self.problems.append(f"step {step}: contributor {member} has no samples of attempt {commit.attempt}")
            else:
                used += line.samples
        return used

    def _ends(self, steps: int) -> str:
        """Check that all who came to the end ended alike; return the hash of the state."""
        ends = {(own.done.step, own.done.hash) for own in self.members.values() if own.done is not None}
        if len(ends) > 1:
            self.problems.append("members ended with different states or after different steps")
        elif ends and next(iter(ends))[0] != steps:
            self.problems.append(f"members were done after step {next(iter(ends))[0]}, but {steps} are on record")
        return next(iter(ends))[1] if len(ends) == 1 else ""


def _name(plan: Plan, samples: Iterable[int]) -> str:
    return ", ".join(f"sample {sample % plan.windows} of data epoch {sample // plan.windows}" for sample in samples)


def _shorten(problems: list[str]) -> tuple[str, ...]:
    unique = list(dict.fromkeys(problems))
    more = len(unique) - _MOST_PROBLEMS
    return (*unique[:_MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else []))
