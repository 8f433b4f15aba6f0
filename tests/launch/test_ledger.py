"""The ledger's proof: accepted for honest runs with losses and joiners, refused for every way of lying."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from collectives.errors import UsageError
from launch.data import Plan
from launch.ledger import PEERS, Back, Commit, Done, Ledger, LedgerReport, Line, Samples, Start, verify

PLAN = Plan(windows=7, batch=4, seed=5)


def write_run(out: Path, script: list[tuple[tuple[int, ...], tuple[int, ...]]], first: int = 0) -> None:
    """Write the ledgers of a run: for each step the members that tried and those that were left to commit it.

    Members that tried but did not commit died in the attempt; the step was then repeated. New ids are joiners.
    """
    ledgers: dict[int, Ledger] = {}
    last = script[-1][1]
    for step, (tried, left) in enumerate(script, first):
        epoch = 10 + step
        for member in tried:
            if member not in ledgers:
                ledgers[member] = Ledger(out, member)
                ledgers[member].write(Start(member, step, PLAN.windows, PLAN.batch, PLAN.seed))
        attempts = [tried, left] if tried != left else [left]
        for attempt, members in enumerate(attempts):
            for rank, member in enumerate(members):
                share = tuple(PLAN.share(step, rank, len(members)))
                ledgers[member].write(Samples(step, attempt, epoch, share))
        for member in left:
            digest = "abc" if step % 3 == 2 else ""
            ledgers[member].write(Commit(step, len(attempts) - 1, epoch, left, 5.0 - step / 100, digest))
    for member in last:
        ledgers[member].write(Done(first + len(script), "f00d"))
    for ledger in ledgers.values():
        ledger.close()


CHURN = [
    ((1, 2, 3), (1, 2, 3)),
    ((1, 2, 3), (1, 3)),
    ((1, 3), (1, 3)),
    ((1, 3, 4), (1, 3, 4)),
    ((1, 3, 4), (3, 4)),
    ((3, 4), (3, 4)),
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_run(tmp_path, CHURN)
    return tmp_path


def test_an_honest_run_with_losses_and_a_joiner_is_proven(out: Path) -> None:
    report = verify(out)
    assert report == LedgerReport(
        members=4,
        first_step=0,
        losses=(5.0, 4.99, 4.98, 4.97, 4.96, 4.95),
        epochs=6,
        repeated=2,
        withdrawn=0,
        samples=24,
        complete=True,
        hash="f00d",
        problems=(),
    )
    assert report.ok
    assert report.steps == 6


def test_a_resumed_run_starts_where_it_was_resumed(tmp_path: Path) -> None:
    write_run(tmp_path, CHURN, first=30)
    report = verify(tmp_path)
    assert report.ok
    assert (report.first_step, report.steps) == (30, 6)


def test_members_outnumbering_samples_contribute_nothing_and_count(tmp_path: Path) -> None:
    everybody = tuple(range(1, 7))
    write_run(tmp_path, [(everybody, everybody)] * 2)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("member", [1, 2])
def test_a_line_that_a_killed_member_did_not_finish_is_no_lie(out: Path, member: int) -> None:
    path = out / PEERS / f"{member}.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # 1 died in step 4, 2 in step 1; neither had committed it
    assert verify(out).ok


def test_a_member_may_die_between_a_steps_end_and_its_line(out: Path) -> None:
    drop_lines(out, 3, lambda line: isinstance(line, Done) or (isinstance(line, Commit) and line.step == 5))
    report = verify(out)
    assert report.ok
    assert report.complete


def test_a_run_that_nobody_finished_is_not_complete(out: Path) -> None:
    for member in (3, 4):
        drop_lines(out, member, lambda line: isinstance(line, Done))
    report = verify(out)
    assert report.ok
    assert not report.complete


def read_lines(out: Path, member: int) -> list[Line]:
    data = (out / PEERS / f"{member}.jsonl").read_bytes()
    return [msgspec.json.decode(line, type=Line) for line in data.splitlines()]


def write_lines(out: Path, member: int, lines: list[Line]) -> None:
    (out / PEERS / f"{member}.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def drop_lines(out: Path, member: int, which: Callable[[Line], bool]) -> None:
    write_lines(out, member, [line for line in read_lines(out, member) if not which(line)])


def change(out: Path, member: int, kind: type, step: int, **values: object) -> None:
    """Change fields of the last line of this kind and step in a member's file."""
    lines = read_lines(out, member)
    place = max(i for i, line in enumerate(lines) if type(line) is kind and getattr(line, "step", None) == step)
    lines[place] = msgspec.structs.replace(lines[place], **values)
    write_lines(out, member, lines)


def samples_of(out: Path, member: int, step: int) -> tuple[int, ...]:
    found = [line for line in read_lines(out, member) if isinstance(line, Samples) and line.step == step]
    return found[-1].samples


def drop_a_sample(out: Path) -> None:
    change(out, 3, Samples, 2, samples=samples_of(out, 3, 2)[1:])


def duplicate_a_sample(out: Path) -> None:
    own = samples_of(out, 3, 2)
    change(out, 3, Samples, 2, samples=(own[0], *own))


def take_a_neighbours_sample(out: Path) -> None:
    change(out, 3, Samples, 2, samples=samples_of(out, 1, 2))


def use_another_steps_sample(out: Path) -> None:
    change(out, 3, Samples, 2, samples=samples_of(out, 3, 0)[:1] + samples_of(out, 3, 2)[1:])


def state_another_loss(out: Path) -> None:
    change(out, 3, Commit, 2, loss=4.5)


def state_another_hash(out: Path) -> None:
    change(out, 1, Commit, 2, hash="def")


def claim_another_attempt(out: Path) -> None:
    for member in (1, 3):
        change(out, member, Commit, 1, attempt=0)


def hide_a_contributor(out: Path) -> None:
    for member in (1, 3, 4):
        change(out, member, Commit, 3, contributors=(1, 3))


def invent_a_contributor(out: Path) -> None:
    for member in (3, 4):
        change(out, member, Commit, 5, contributors=(3, 4, 9))


def lose_a_step_everywhere(out: Path) -> None:
    for member in (1, 3):
        drop_lines(out, member, lambda line: getattr(line, "step", None) == 2 and not isinstance(line, Start))


def lose_a_commit_everywhere(out: Path) -> None:
    for member in (1, 3):
        drop_lines(out, member, lambda line: isinstance(line, Commit) and line.step == 2)


def lose_a_commit_of_one(out: Path) -> None:
    drop_lines(out, 1, lambda line: isinstance(line, Commit) and line.step == 2)


def lose_the_last_step(out: Path) -> None:
    for member in (3, 4):
        drop_lines(out, member, lambda line: isinstance(line, Commit) and line.step == 5)


def lose_a_file(out: Path) -> None:
    (out / PEERS / "2.jsonl").unlink()


def lose_a_joiners_start(out: Path) -> None:
    drop_lines(out, 4, lambda line: isinstance(line, Start))


def repeat_a_step(out: Path) -> None:
    lines = read_lines(out, 3)
    again = [line for line in lines if getattr(line, "step", None) == 2]
    write_lines(out, 3, [*lines[:-1], *again, lines[-1]])


def pass_for_another_member(out: Path) -> None:
    change_start(out, 3, member=8)


def use_another_order(out: Path) -> None:
    for member in (1, 2, 3, 4):
        change_start(out, member, seed=6)


def disagree_about_the_order(out: Path) -> None:
    change_start(out, 3, seed=6)


def change_start(out: Path, which: int, /, **values: object) -> None:
    lines = read_lines(out, which)
    lines[0] = msgspec.structs.replace(lines[0], **values)
    write_lines(out, which, lines)


def end_with_another_state(out: Path) -> None:
    change(out, 3, Done, 6, hash="beef")


def tear_a_line_in_the_middle(out: Path) -> None:
    path = out / PEERS / "3.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:20] + b"\n", *lines[5:]]))


def add_an_unknown_line(out: Path) -> None:
    path = out / PEERS / "3.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event":"note"}\n')


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (drop_a_sample, "step 2: sample [0-9]+ missing from"),
        (duplicate_a_sample, "step 2: sample [0-9]+ used too often in"),
        (take_a_neighbours_sample, "was used more than once in the run"),
        (use_another_steps_sample, "was used more than once in the run"),
        (state_another_loss, "step 2: members 1 and 3 differ in loss"),
        (state_another_hash, "step 2: members 1 and 3 differ in hash"),
        (claim_another_attempt, "step 1: sample [0-9, ]+ missing from"),
        (hide_a_contributor, "step 3: member 4 committed it but did not contribute"),
        (invent_a_contributor, "step 5: contributor 9 has no samples"),
        (lose_a_step_everywhere, "no member committed step 2, but later ones"),
        (lose_a_commit_everywhere, "step 2 is due: a step is missing"),
        (lose_a_commit_of_one, "step 2: contributor 1 went on without committing it"),
        (lose_the_last_step, "members were done after step 6, but 5 are on record"),
        (lose_a_file, "step 0: contributor 2 has no samples"),
        (lose_a_joiners_start, "line 1 is not the start of member 4"),
        (repeat_a_step, "is about step 2 where step 6 is due"),
        (pass_for_another_member, "line 1 is not the start of member 3"),
        (use_another_order, "missing from the contributors' lines"),
        (disagree_about_the_order, "different ideas"),
        (end_with_another_state, "members ended with different states"),
        (tear_a_line_in_the_middle, r"3.jsonl line 5 cannot be read"),
        (add_an_unknown_line, "cannot be read: Invalid value 'note'"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_lie_is_found_out(out: Path, tamper: Callable[[Path], None], message: str) -> None:
    tamper(out)
    report = verify(out)
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report.problems


def test_a_folder_without_ledgers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no ledgers"):
        verify(tmp_path)


def test_a_folder_with_a_ledger_of_the_same_member_is_another_run(out: Path) -> None:
    with pytest.raises(UsageError, match="holds another run"):
        Ledger(out, 3)


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    write_run(tmp_path, [((1,), (1,))] * 40)
    lines = [
        msgspec.structs.replace(line, samples=()) if isinstance(line, Samples) else line
        for line in read_lines(tmp_path, 1)
    ]
    write_lines(tmp_path, 1, lines)
    problems = verify(tmp_path).problems
    assert len(problems) == 21
    assert problems[-1] == "and 20 more"


def write_return(out: Path, *, told: tuple[int, ...] = (1, 3)) -> None:
    """Steps 0 to 3 of three members; member 2 is lost, and the others take up the state before step 2."""
    ledgers = {member: Ledger(out, member) for member in (1, 2, 3)}
    for member, file in ledgers.items():
        file.write(Start(member, 0, PLAN.windows, PLAN.batch, PLAN.seed))
    for step, epoch, members in [(s, 10, (1, 2, 3)) for s in range(4)] + [(s, 11, (1, 3)) for s in range(2, 5)]:
        for rank, member in enumerate(members):
            if (step, epoch) == (2, 11) and member in told:
                ledgers[member].write(Back(step, epoch))
            ledgers[member].write(Samples(step, 0, epoch, tuple(PLAN.share(step, rank, len(members)))))
            ledgers[member].write(Commit(step, 0, epoch, members, 5.0 - step / 100))
    for member in (1, 3):
        ledgers[member].write(Done(5, "f00d"))
    for file in ledgers.values():
        file.close()


def test_steps_that_are_taken_again_from_a_checkpoint_count_once(tmp_path: Path) -> None:
    write_return(tmp_path)
    report = verify(tmp_path)
    assert report.ok, report.problems
    assert (report.steps, report.withdrawn, report.epochs) == (5, 2, 2)
    assert report.samples == 5 * PLAN.batch


def test_who_takes_steps_again_without_a_word_is_found_out(tmp_path: Path) -> None:
    write_return(tmp_path, told=(1,))
    assert any("step 2 where step 4 is due" in problem for problem in verify(tmp_path).problems)


def test_nobody_goes_back_to_where_it_never_was(out: Path) -> None:
    with (out / PEERS / "3.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(Back(99, 99)) + b"\n")
    drop_lines(out, 3, lambda line: isinstance(line, Done))
    assert any("goes back to step 99" in problem for problem in verify(out).problems)
