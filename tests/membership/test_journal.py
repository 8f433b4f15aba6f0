"""The coordinator's journal: what is durable, what is refused, and what a crash may leave behind (rule R12)."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from collectives.errors import JournalError
from collectives.membership.journal import Journal
from collectives.membership.protocol import (
    VERSION,
    Decision,
    LaneFrontier,
    MemberInfo,
    Opened,
    Prepared,
    Record,
    Verdict,
)

OPENED = Opened("run", VERSION)


def decision(epoch: int) -> Decision:
    """A decision with something in every field, line ends in its texts too."""
    return Decision(
        epoch=epoch,
        nonce=bytes(range(16)),
        members=[MemberInfo(1, b"\n" * 16, "127.0.0.1", 29400, True), MemberInfo(2, b"\r" * 16, "::1", 1, False)],
        lost=[3],
        joined=[2],
        lanes={"main": LaneFrontier(7, 2, 9), "a\nlane\x85\u2028": LaneFrontier(0, 0, 0)},
        verdicts=[Verdict("main", 8, "mismatch", 'member 1 called "x"\r\n')],
        admitted=True,
        next_member=4,
        transport="gloo",
    )


RECORDS: list[Record] = [Prepared(1), decision(1), Prepared(2), Prepared(3), decision(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with all kinds of records."""
    made = tmp_path / "journal"
    with Journal(made, "run", new=True) as journal:
        for record in RECORDS:
            journal.append(record)
    return made


def records(path: Path) -> list[Record]:
    """What the next coordinator finds."""
    with Journal(path, "run") as journal:
        return journal.records


def test_what_was_written_is_read(path: Path) -> None:
    assert records(path) == [OPENED, *RECORDS]


def test_a_new_journal_begins_with_whose_it_is(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "run", new=True) as journal:
        assert journal.records == []
    assert records(tmp_path / "journal") == [OPENED]


def test_new_is_for_new_runs_only(path: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="holds a run; go on with it without --new"):
        Journal(path, "run", new=True)
    with pytest.raises(JournalError, match=r"there is no journal at .*--new"):
        Journal(tmp_path / "missing", "run")
    assert not (tmp_path / "missing").exists()
    (tmp_path / "empty").touch()
    with pytest.raises(JournalError, match="is empty"):
        Journal(tmp_path / "empty", "run")
    Journal(tmp_path / "empty", "run", new=True).close()
    assert records(tmp_path / "empty") == [OPENED]


def test_a_coordinator_that_died_before_its_first_record_may_begin_anew(tmp_path: Path) -> None:
    for torn in (b"", b"0123456789abcd", b"0123456789abcdef {"):
        path = tmp_path / f"torn{len(torn)}"
        path.write_bytes(torn)
        with pytest.raises(JournalError, match="is empty"):
            Journal(path, "run")
        Journal(path, "run", new=True).close()
        assert records(path) == [OPENED]


def test_the_journal_of_another_run_or_version_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="name the right file"):
        Journal(path, "another")
    other = tmp_path / "other"
    with Journal(other, "run", new=True) as journal:
        journal.append(Opened("run", VERSION + 1))
    lines = other.read_bytes().splitlines(keepends=True)
    other.write_bytes(lines[1])
    with pytest.raises(JournalError, match=f"version={VERSION + 1}"):
        Journal(other, "run")


def test_two_coordinators_do_not_share_a_journal(path: Path) -> None:
    with Journal(path, "run"), pytest.raises(JournalError, match="in use: another coordinator of this run is alive"):
        Journal(path, "run")
    assert records(path) == [OPENED, *RECORDS]


def test_a_torn_last_record_was_never_acknowledged(path: Path) -> None:
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        with Journal(path, "run") as journal:
            assert journal.records == [OPENED, *RECORDS[:-1]]
            journal.append(Prepared(4))
        assert records(path) == [OPENED, *RECORDS[:-1], Prepared(4)]


def test_any_other_damage_is_an_error(path: Path) -> None:
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for position in range(last):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(JournalError, match=r"line \d+"):
            Journal(path, "run")


def test_a_record_of_another_kind_is_an_error(path: Path) -> None:
    body = b'{"type":"Granted","mac":""}'
    line = hashlib.blake2b(body, digest_size=8).hexdigest().encode() + b" " + body + b"\n"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(JournalError, match="not a record of this version"):
        Journal(path, "run")


def test_a_failing_disk_is_fatal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal(path, "run") as journal:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(JournalError, match=r"cannot write .* Input/output error; stopping"):
            journal.append(Prepared(4))


def test_a_folder_is_no_journal(tmp_path: Path) -> None:
    for new in (False, True):
        with pytest.raises(JournalError, match="cannot open"):
            Journal(tmp_path, "run", new=new)
    with pytest.raises(JournalError, match="cannot open"):
        Journal(tmp_path / "missing" / "journal", "run", new=True)


WRITER = """
import sys
from pathlib import Path
from collectives.membership.journal import Journal
from collectives.membership.protocol import Prepared

with Journal(Path(sys.argv[1]), "run", new=True) as journal:
    for number in range(1, 1_000_000):
        journal.append(Prepared(number))
        print(number, flush=True)
"""


def test_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    for lines in (1, 7, 40):
        path = tmp_path / f"journal{lines}"
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
            acknowledged = lines + len(writer.stdout.read().split())
        found = records(path)
        assert found[: acknowledged + 1] == [OPENED, *map(Prepared, range(1, acknowledged + 1))]
        assert len(found) <= acknowledged + 2
