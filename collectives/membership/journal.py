"""The coordinator's journal: one file, one writer, a checksum per record, durable before anybody acts on it.

A record is a line: 16 hex digits of a BLAKE2b checksum, a space, the record as JSON. A torn last line was never
acknowledged by fsync and is cut off; damage anywhere else is an error, because a decision might be missing (rule R12).
"""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO, Self

import msgspec

from collectives.errors import JournalError
from collectives.membership.protocol import VERSION, Opened, Record

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class Journal:
    """An open, locked journal of one run. `records` are those that were there when it was opened.

    Raises:
        JournalError: the file is missing or empty and `new` is not set, holds records and `new` is set, belongs to
            another run or version, is locked by another coordinator, is damaged, or cannot be written.

    """

    def __init__(self, path: Path, run: str, new: bool = False) -> None:
        self.path = path
        opened = Opened(run, VERSION)
        if not new and not path.exists():
            raise JournalError(f"there is no journal at {path}; give the right path, or --new to start a new run")
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise JournalError(f"cannot open the journal {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise JournalError(f"the journal {path} is in use: another coordinator of this run is alive") from None
        try:
            self.records = self._read()
            if new and self.records:
                raise JournalError(f"the journal {path} holds a run; go on with it without --new, or name another file")
            if not new and not self.records:
                raise JournalError(f"the journal {path} is empty; give the right path, or --new to start a new run")
            if self.records and self.records[0] != opened:
                raise JournalError(f"the journal {path} is of {self.records[0]}, not of {opened}; name the right file")
        except JournalError:
            self._file.close()
            raise
        if new:
            self.append(opened)
            _sync_folder(path.parent)

    def append(self, record: Record) -> None:
        """Write a record and wait until it is on disk. A failure is fatal: whether it is there cannot be known."""
        body = msgspec.json.encode(record)
        try:
            self._file.write(_checksum(body) + b" " + body + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(f"cannot write the journal {self.path}: {error.strerror}; stopping") from None

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> list[Record]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        records = [self._parse(line, number) for number, line in enumerate(data[:whole].splitlines(), start=1)]
        if whole < len(data):
            self._file.truncate(whole)
        return records

    def _parse(self, line: bytes, number: int) -> Record:
        checksum, _, body = line.partition(b" ")
        if checksum != _checksum(body):
            raise JournalError(f"{self.path}, line {number}: the checksum is wrong; restore the journal from a copy")
        try:
            return _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise JournalError(f"{self.path}, line {number}: not a record of this version: {error}") from None


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
