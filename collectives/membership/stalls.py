"""Rule R11: who is at fault when a link or an operation is stuck. Called by the coordinator."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from collectives.membership.protocol import LaneStatus, Verdict
from collectives.options import Options


def link_to_evict(link: frozenset[int], bad: Iterable[frozenset[int]]) -> int:
    """Choose the end of a failed link that has fewer good links (it is in more bad ones); on a tie the higher id."""
    bad = list(bad)
    return max(link, key=lambda member: (sum(member in other for other in bad), member))


Rows = Mapping[int, Mapping[str, LaneStatus]]
"""Per member the status of its lanes, as of its last heartbeat."""

Op = tuple[str, int]
"""An operation: its lane and number."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why an operation does not end; one of the three is set."""

    absent: tuple[int, ...] = ()
    """Members to evict."""
    crossed: tuple[Op, ...] = ()
    """Operations that wait for each other."""
    stuck: Op | None = None
    """Everybody is in this one and it does not move: a link is dead without a sound."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to do about a complaint: evict, or let these operations end, or neither: a change with the same members."""

    evict: tuple[int, ...] = ()
    why: str = ""
    verdicts: tuple[Verdict, ...] = ()


@dataclass(slots=True)
class Complaints:
    """What members complain of in the current epoch, and which links were mended before."""

    options: Options
    _broken: dict[tuple[int, int], float] = field(default_factory=dict)
    """(who says so, the other end) -> since when."""
    _stalls: dict[Op, tuple[int, float]] = field(default_factory=dict)
    """Who said so first, and when."""
    _mended: set[frozenset[int]] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self._broken or self._stalls)

    def link_down(self, member: int, peer: int, now: float) -> None:
        """A link failed."""
        self._broken.setdefault((member, peer), now)

    def stalled(self, member: int, op: Op, now: float) -> None:
        """An operation does not end."""
        self._stalls.setdefault(op, (member, now))

    def clear(self) -> None:
        """Another epoch begins: what still does not work in it is complained of again."""
        self._broken.clear()
        self._stalls.clear()

    def judge(self, rows: Rows, beaten: float, now: float) -> Remedy | None:
        """Tell what is to be done now, if anything.

        Args:
            rows: what the members are doing.
            beaten: when the oldest of these rows came.
            now: the time.

        """
        for (lane, seq), (member, since) in list(self._stalls.items()):
            # Judged on heartbeats that everybody sent after the complaint; and they may have waited for nothing but
            # our word, if we were away: a little more time for all.
            if beaten <= since or now - since < self.options.heartbeat_timeout:
                continue
            del self._stalls[lane, seq]
            if member in rows and lane in rows[member] and under_way(rows[member][lane], seq):
                remedy = self._judge_stall(rows, lane, seq, member, now)
                if remedy is not None:
                    return remedy
        return self._judge_links(now)

    def _judge_stall(self, rows: Rows, lane: str, seq: int, member: int, now: float) -> Remedy | None:
        judgement = judge_stall(rows, lane, seq, self.options.op_timeout)
        if judgement.absent:
            late = f"absent from operation {seq} of lane {lane!r} for {self.options.op_timeout:g} s"
            return Remedy(judgement.absent, late)
        if judgement.crossed:
            text = f"operations {judgement.crossed} (lane, number) wait for each other on different members"
            return Remedy(verdicts=tuple(Verdict(name, number, "crossed", text) for name, number in judgement.crossed))
        assert judgement.stuck is not None
        for link in silent_links(rows, *judgement.stuck) or [(member, member)]:
            self._broken.setdefault(link, now - self.options.heartbeat)
        return None

    def _judge_links(self, now: float) -> Remedy | None:
        """One change with the same members; if a link fails again, one of its ends goes.

        A link that broke because its other end died is left to the loss itself, which is noticed in the meantime.
        """
        if all(now - since < self.options.heartbeat for since in self._broken.values()):
            return None
        bad = {frozenset(pair) for pair in self._broken}
        again = sorted(bad & self._mended, key=sorted)
        self._mended |= bad
        if not again:
            return Remedy()
        victim = link_to_evict(again[0], bad)
        if others := sorted(again[0] - {victim}):
            return Remedy((victim,), f"its links to {others} failed twice")
        return Remedy((victim,), "operations that it waited in stood still twice, and no link was known to be silent")


def judge_stall(rows: Rows, lane: str, seq: int, patience: float) -> Judgement:
    """Tell why operation `seq` of `lane` does not end.

    Who has not come to it may be stuck in another one itself, where somebody else is at fault: that one is judged then.

    Args:
        rows: what the members are doing.
        lane: lane of the operation.
        seq: its number.
        patience: seconds after which an operation that all have entered counts as stuck.

    """
    trail: list[Op] = []
    while True:
        op = _first_stuck(rows, lane, seq)
        if op in trail:
            return Judgement(crossed=tuple(sorted(trail[trail.index(op) :])))
        trail.append(op)
        absent = _absent_from(rows, op)
        if not absent:
            return Judgement(stuck=op)
        elsewhere = {member: _stuck_elsewhere(rows, member, op[0], patience) for member in absent}
        idle = tuple(member for member in absent if elsewhere[member] is None)
        if idle:
            return Judgement(absent=idle)
        lane, seq = elsewhere[absent[0]] or op


def _first_stuck(rows: Rows, lane: str, seq: int) -> Op:
    """Return the first operation of a lane that somebody is still in: others stand behind it, they are not absent."""
    here = (lanes[lane] for lanes in rows.values() if lane in lanes)
    return lane, min([seq, *(row.seq for row in here if row.phase != "idle")])


def _absent_from(rows: Rows, op: Op) -> list[int]:
    name, number = op
    group = next((lanes[name].group for lanes in rows.values() if name in lanes), ())
    concerned = {m: lanes for m, lanes in rows.items() if not group or m in group}
    return sorted(m for m, lanes in concerned.items() if name not in lanes or lanes[name].seq < number)


def _stuck_elsewhere(rows: Rows, member: int, lane: str, patience: float) -> Op | None:
    """Return the operation of another lane that a member waits in, None if it waits for nobody."""
    for name, row in sorted(rows[member].items()):
        waits = row.phase != "idle" and name != lane
        if waits and (row.seconds > patience or _absent_from(rows, (name, row.seq))):
            return name, row.seq
    return None


def under_way(row: LaneStatus, seq: int) -> bool:
    """Whether a lane is in the middle of operation `seq`."""
    return row.seq == seq and row.phase != "idle"


def silent_links(rows: Rows, lane: str, seq: int) -> list[tuple[int, int]]:
    """Return the links (who waits, for whom) that an operation waits on though everybody has entered it."""
    waiting = {member: lanes[lane] for member, lanes in rows.items() if lane in lanes}
    return [
        (member, row.waiting_for)
        for member, row in waiting.items()
        if under_way(row, seq) and row.waiting_for in rows and row.waiting_for != member
    ]
