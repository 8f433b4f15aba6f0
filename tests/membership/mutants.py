"""Rules taken out one by one, to prove that the simulation notices: `break_rule(name)` patches the code under test.

Each mutant is the code as it might look if somebody had not thought of that rule.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from collectives.membership import coordinator, decisions, frontiers, stalls
from collectives.membership.coordinator import Action, Coordinator, Persist, Send, Stop
from collectives.membership.member import Completed, Lane, Member
from collectives.membership.protocol import (
    Decision,
    Evict,
    LaneFrontier,
    LaneReport,
    LinkDown,
    Prepare,
    Prepared,
    Record,
    Verdict,
)
from collectives.membership.stalls import Complaints, Judgement
from tests.membership.runner import Runner

Patch = tuple[Any, str, Any]

_judge = Complaints.judge
_begin = Coordinator._begin
_decide = Coordinator._decide
_settle = Coordinator._settle
_restore = Coordinator._restore
_resume = Coordinator._resume
_lose = Coordinator._lose
_on_decision = Member.on_decision
_enter = Member.enter
_verdict = Member.verdict
_frontiers = frontiers.frontiers


def _complete_ignoring_the_fence(self: Member, name: str, seq: int, epoch: int) -> bool:
    lane = self.lanes[name]
    if (lane.staged, lane.staged_epoch) != (seq, epoch):
        return False
    lane.finish(seq, epoch)
    return True


def _stage_ignoring_the_fence(self: Member, name: str, seq: int, epoch: int) -> bool:
    lane = self.lanes[name]
    lane.staged, lane.staged_epoch, lane.phase = seq, epoch, "confirming"
    return self.error is None


def _report_without_staged(self: Lane) -> LaneReport:
    return LaneReport(self.complete, self.complete_epoch, 0, 0, self.entered, self.entered - self.busy)


def _frontiers_of_any(reports: frontiers.Reports) -> dict[str, LaneFrontier]:
    """What anybody staged is taken for complete."""
    lanes = _frontiers(reports)
    for name, frontier in lanes.items():
        rows = [report[name] for report in reports.values() if name in report]
        staged, epoch = max((row.staged, row.staged_epoch) for row in rows)
        if staged > frontier.complete:
            lanes[name] = LaneFrontier(staged, epoch, frontier.entered)
    return lanes


def _frontiers_of_complete_only(reports: frontiers.Reports) -> dict[str, LaneFrontier]:
    lanes: dict[str, LaneFrontier] = {}
    for name in sorted({name for lanes in reports.values() for name in lanes}):
        rows = [report[name] for report in reports.values() if name in report]
        complete, epoch = max((row.complete, row.complete_epoch) for row in rows)
        lanes[name] = LaneFrontier(complete, epoch, max(row.entered for row in rows))
    return lanes


def _frontiers_of_the_slowest(reports: frontiers.Reports) -> dict[str, LaneFrontier]:
    """The lowest complete operation instead of the highest."""
    lanes: dict[str, LaneFrontier] = {}
    for name in sorted({name for lanes in reports.values() for name in lanes}):
        rows = [report.get(name, LaneReport(0, 0, 0, 0, 0, 0)) for report in reports.values()]
        complete, epoch = min((row.complete, row.complete_epoch) for row in rows)
        lanes[name] = LaneFrontier(complete, epoch, max(row.entered for row in rows))
    return lanes


def _frontiers_without_entered(reports: frontiers.Reports) -> dict[str, LaneFrontier]:
    """Joiners begin to count at the beginning."""
    return {name: LaneFrontier(f.complete, f.complete_epoch, 0) for name, f in _frontiers(reports).items()}


def _begin_without_persist(self: Coordinator) -> list[Action]:
    return [a for a in _begin(self) if not (isinstance(a, Persist) and isinstance(a.record, Prepared))]


def _begin_sending_first(self: Coordinator) -> list[Action]:
    return sorted(_begin(self), key=lambda a: isinstance(a, Persist))


def _decide_announcing_first(self: Coordinator, change: Any) -> list[Action]:
    actions = _decide(self, change)
    decided = [a for a in actions if isinstance(a, Persist) and isinstance(a.record, Decision)]
    return [a for a in actions if a not in decided] + decided


def _restore_from_decisions(self: Coordinator, records: Sequence[Record], now: float) -> None:
    """Numbers that were used for a change that came to nothing are used again."""
    _restore(self, [record for record in records if not isinstance(record, Prepared)], now)


def _restore_without_members(self: Coordinator, records: Sequence[Record], now: float) -> None:
    """The last decision is not announced again: nobody of it is known."""
    _restore(self, records, now)
    self.peers.clear()


def _restore_without_ids(self: Coordinator, records: Sequence[Record], now: float) -> None:
    _restore(self, records, now)
    self._next_member = 1


def _resume_without_a_change(self: Coordinator, connection: int, message: Any, now: float) -> list[Action]:
    """Whoever fenced for a change that died with the coordinator is left to itself."""
    actions = _resume(self, connection, message, now)
    if any(isinstance(action, Persist) for action in actions):
        self.change = None
        return [a for a in actions if not isinstance(a, Persist) and not _is_prepare(a)]
    return actions


def _resume_without_the_prepare(self: Coordinator, connection: int, message: Any, now: float) -> list[Action]:
    return [a for a in _resume(self, connection, message, now) if not _is_prepare(a)]


def _is_prepare(action: Action) -> bool:
    return isinstance(action, Send) and isinstance(action.message, Prepare)


def _resume_without_the_decision(self: Coordinator, connection: int, message: Any, now: float) -> list[Action]:
    actions = _resume(self, connection, message, now)
    return [a for a in actions if not (isinstance(a, Send) and isinstance(a.message, Decision))]


def _decision_of_any_age(self: Member, decision: Decision) -> bool:
    """Whatever is announced is applied."""
    if self.error is None and any(info.member == self.member for info in decision.members):
        self.epoch, self.promised = (self.epoch and 1), 0
        return _on_decision(self, decision)
    return False


def _decision_without_promise(self: Member, decision: Decision) -> bool:
    promised, self.promised = self.promised, 0
    if _on_decision(self, decision):
        return True
    self.promised = promised
    return False


def _begin_with_everybody(self: Coordinator) -> list[Action]:
    """Joiners come in with any change."""
    before = self._safe
    self._safe = set(self.members)
    actions = _begin(self)
    if self.change is not None and len(self.change.members) == len(before):
        self._safe = before
    return actions


def _one_is_safe(self: Coordinator, sender: int, message: Any) -> list[Action]:
    """One member at a safe point is enough."""
    if self.decision is None or message.epoch != self.decision.epoch or sender not in self.members:
        return []
    self._safe.update(self.members)
    return self._consider()


def _settle_keeping_safe(self: Coordinator, decision: Decision) -> None:
    """Who stood at a safe point once is taken to stand there for ever."""
    safe = set(self._safe)
    _settle(self, decision)
    self._safe |= safe & {info.member for info in decision.members}


def _never_silent(self: Coordinator, now: float) -> list[Action]:
    self._notice_gap(now)
    self._ticked = now
    return self._remedy(now)


def _all_silent_are_dead(self: Coordinator, now: float) -> None:
    """Coordinator._wait_for_all that gives nobody time."""


def _deaths_change_nothing(self: Coordinator, members: Sequence[int], why: str) -> list[Action]:
    """The change under way goes on with the dead in it."""
    change = self.change
    actions = _lose(self, members, why)
    if change is not None and self.change is not change and self.members:
        self.change = change
        return [a for a in actions if not isinstance(a, Persist) and not _is_prepare(a)]
    return actions


def _farewell_first(self: Coordinator, members: Sequence[int], why: str) -> list[Action]:
    """Who left is told before it is on disk."""
    return sorted(_lose(self, members, why), key=lambda a: not (isinstance(a, Send) and isinstance(a.message, Evict)))


def _needs_coordinator_by_fence(self: Member) -> bool:
    """A member that is merely stuck waits for ever."""
    return self.epoch > 0 and self.fenced


def _no_quorum(self: Coordinator, survivors: int, listed: int) -> str:
    return ""


def _interrupt_in_silence(self: Member, name: str, epoch: int, peer: int) -> list[Any]:
    """A failed link is not reported."""
    if epoch == self.epoch:
        self.lanes[name].interrupted = epoch
    return []


def _interrupt_and_go_on(self: Member, name: str, epoch: int, peer: int) -> list[Any]:
    """A member tries again by itself on the same links."""
    return [LinkDown(epoch, peer)] if epoch == self.epoch and peer else []


def _ask_and_forget(self: Member, key: str, message: Any) -> list[Any]:
    """What was asked is not asked again when the connection breaks."""
    return [message]


def _again_never(self: Member, decision: Decision) -> None:
    if self.admitting and decision.admitted:
        self.admitting = 0


def _verdicts_for_those_inside(self: Member, decision: Decision) -> bool:
    """Who has not come to the operation yet is not told."""
    done = _on_decision(self, decision)
    self.verdicts = {(n, s): e for (n, s), e in self.verdicts.items() if self.lanes[n].entered >= s}
    return done


def _rows_of_all(reports: frontiers.Reports, name: str, group: Any) -> dict[int, LaneReport]:
    """Whoever is not in a sub-group is asked about its lanes too."""
    return {member: lanes.get(name, LaneReport(0, 0, 0, 0, 0, 0)) for member, lanes in reports.items()}


def _absent_outsiders(rows: Any, op: tuple[str, int]) -> list[int]:
    """Whoever is not in a sub-group is missed in its operations."""
    name, number = op
    return sorted(m for m, lanes in rows.items() if name not in lanes or lanes[name].seq < number)


def _no_dispute(reports: Any, lanes: Any) -> list[Verdict]:
    return []


def _told_everything(decision: Decision, member: int) -> Decision:
    return decision


def _any_group_sees_any_loss(self: Member, name: str, epoch: int) -> tuple[int, ...]:
    """A sub-group's operation runs among all members."""
    return self.past[epoch]


def _carry_over_nothing(self: Member, decision: Decision) -> None:
    """What all staged is run again by those who had not heard so."""
    for lane in self.lanes.values():
        lane.staged = lane.staged_epoch = lane.interrupted = 0


def _links_are_mended_for_ever(link: frozenset[int], bad: Any) -> int:
    return 0


def _nobody_is_absent(rows: Any, lane: str, seq: int, patience: float) -> Any:
    return Judgement(stuck=(lane, seq))


def _no_verdict_kept(reports: Any, lanes: Any) -> list[Verdict]:
    return []


def _judged_at_once(self: Complaints, rows: Any, beaten: float, now: float) -> Any:
    """A stall is judged on whatever heartbeats there are."""
    return _judge(self, rows, math.inf, now + self.options.heartbeat_timeout)


def _views_move(self: Member, name: str) -> Lane:
    lane = self.lanes.setdefault(name, Lane(view=self.epoch))
    lane.view = self.epoch
    return lane


def _enter_every_other(self: Member, name: str, kind: str) -> int:
    """Numbers of operations are skipped."""
    _enter(self, name, kind)
    self.lanes[name].entered += 1
    return self.lanes[name].entered


def _enter_behind_whatever(self: Member, name: str, kind: str) -> int:
    """A lane does not know where it stands: the next operation is the one behind the last complete one."""
    seq = _enter(self, name, kind)
    self.lanes[name].entered = min(seq, self.lanes[name].complete + 1)
    return self.lanes[name].entered


def _staged_is_complete(self: Member, name: str, seq: int) -> Any:
    """What is staged here is taken for staged everywhere when an attempt fails."""
    lane = self.lanes[name]
    return Completed(lane.staged_epoch) if lane.staged >= seq else _verdict(self, name, seq)


def _confirm_nothing(self: Runner, name: str, seq: int, mesh: Any, members: tuple[int, ...]) -> Any:
    """A member takes what it has staged for complete, whatever the others have."""
    return iter(())


def _verdict_in_spite_of_the_end(self: Member, name: str, seq: int) -> Any:
    """Who gave up, or is out of the run, goes on with its operations."""
    error, self.error = self.error, None
    try:
        return _verdict(self, name, seq)
    finally:
        self.error = error


def _differences_without_a_verdict(self: Coordinator, member: int, message: Any) -> list[Action]:
    """Who calls something else is asked to try again."""
    return [] if self.change or message.epoch != self.decision.epoch else self._begin()  # type: ignore[union-attr]


def _resume_with_an_old_journal(self: Coordinator, connection: int, message: Any, now: float) -> list[Action]:
    """A member that has seen a newer epoch than the journal is none of this run, and no reason to stop."""
    actions = _resume(self, connection, message, now)
    return [] if any(isinstance(action, Stop) for action in actions) else actions


def _coordinator(**changes: Any) -> list[Patch]:
    return [(Coordinator, name, function) for name, function in changes.items()]


def _member(**changes: Any) -> list[Patch]:
    return [(Member, name, function) for name, function in changes.items()]


def _frontier(function: Callable[..., Any]) -> list[Patch]:
    return [(decisions, "frontiers", function)]


MUTANTS: dict[str, list[Patch]] = {
    "operations are skipped": _member(enter=_enter_every_other),
    "a lane does not count what ended by an error": _member(enter=_enter_behind_whatever),
    "staged is taken for complete": _member(verdict=_staged_is_complete),
    "complete without confirmations": [(Runner, "_confirm", _confirm_nothing)],
    "who is out goes on": _member(verdict=_verdict_in_spite_of_the_end),
    "differences have no verdict": _coordinator(_differs=_differences_without_a_verdict),
    "an old journal is gone on with": _coordinator(_resume=_resume_with_an_old_journal),
    "complete() ignores the fence": _member(complete=_complete_ignoring_the_fence),
    "stage() ignores the fence": _member(stage=_stage_ignoring_the_fence),
    "staged operations are not reported": [(Lane, "report", _report_without_staged)],
    "what a survivor has left has no verdict": [(decisions, "given_up", _no_verdict_kept)],
    "frontier: what anybody staged": _frontier(_frontiers_of_any),
    "frontier: complete ones only": _frontier(_frontiers_of_complete_only),
    "frontier: the slowest member": _frontier(_frontiers_of_the_slowest),
    "frontier: over all survivors instead of the sub-group's": [(frontiers, "rows_of", _rows_of_all)],
    "stalls: outsiders are absent from a sub-group's operation": [(stalls, "_absent_from", _absent_outsiders)],
    "disputes about a sub-group are not settled": [(decisions, "disputes", _no_dispute)],
    "members are told of others' sub-groups": [(coordinator, "part_of", _told_everything)],
    "a sub-group's operations run among all": _member(members_of=_any_group_sees_any_loss),
    "frontier: joiners count from the beginning": _frontier(_frontiers_without_entered),
    "Prepared is not on disk": _coordinator(_begin=_begin_without_persist),
    "Prepare is sent before it is on disk": _coordinator(_begin=_begin_sending_first),
    "a decision is announced before it is on disk": _coordinator(_decide=_decide_announcing_first),
    "numbers are used again after a restart": _coordinator(_restore=_restore_from_decisions),
    "the last decision is forgotten after a restart": _coordinator(_restore=_restore_without_members),
    "ids are given again after a restart": _coordinator(_restore=_restore_without_ids),
    "a change that died with the coordinator frees nobody": _coordinator(_resume=_resume_without_a_change),
    "Prepare is not sent again": _coordinator(_resume=_resume_without_the_prepare),
    "the last decision is not announced again": _coordinator(_resume=_resume_without_the_decision),
    "old decisions are applied": _member(on_decision=_decision_of_any_age),
    "joiners come in with any change": _coordinator(_begin=_begin_with_everybody),
    "one member at a safe point is enough": _coordinator(_at_safe_point=_one_is_safe),
    "a safe point is for ever": _coordinator(_settle=_settle_keeping_safe),
    "the silent are not evicted": _coordinator(on_tick=_never_silent),
    "evicted after the coordinator's own gap": _coordinator(_notice_gap=_all_silent_are_dead),
    "evicted when all are silent": _coordinator(_wait_for_all=_all_silent_are_dead),
    "a death during a change does not begin it anew": _coordinator(_lose=_deaths_change_nothing),
    "the last one is told before it is on disk": _coordinator(_lose=_farewell_first),
    "who is stuck does not need the coordinator": _member(needs_coordinator=property(_needs_coordinator_by_fence)),
    "no quorum": _coordinator(_too_few=_no_quorum),
    "failed links are not reported": _member(interrupt=_interrupt_in_silence),
    "a failed attempt is repeated on the same links": _member(interrupt=_interrupt_and_go_on),
    "nothing is asked again": _member(_ask=_ask_and_forget),
    "admission is not asked again": _member(_again=_again_never),
    "verdicts only for those inside": _member(on_decision=_verdicts_for_those_inside),
    "what all staged is not completed": _member(_carry_over=_carry_over_nothing),
    "a link may fail for ever": [(stalls, "link_to_evict", _links_are_mended_for_ever)],
    "nobody is ever absent": [(stalls, "judge_stall", _nobody_is_absent)],
    "stalls are judged at once": [(Complaints, "judge", _judged_at_once)],
    "views move under a caller": _member(lane=_views_move),
}


SHOWN_BY: dict[str, tuple[str, ...]] = {
    "stage() ignores the fence": ("loss", "mixed", "views"),
    "what a survivor has left has no verdict": ("mismatch",),
    "failed links are not reported": ("link",),
    "nobody is ever absent": ("stall",),
    "stalls are judged at once": ("stall", "link"),
    "verdicts only for those inside": ("mismatch",),
    "an old journal is gone on with": ("calm",),
    "stalls: outsiders are absent from a sub-group's operation": ("mixed",),
}
"""Themes of the histories in which a mutant shows itself, where these are rare among all."""


@contextmanager
def break_rule(name: str) -> Iterator[None]:
    """Take a rule out for a while."""
    with ExitStack() as stack:
        for target, attribute, function in MUTANTS[name]:
            stack.enter_context(patch.object(target, attribute, function))
        yield
