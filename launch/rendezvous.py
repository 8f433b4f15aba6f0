"""Where supervisors that one launcher started on one host find each other, without MPI or a port known beforehand.

A folder that only this user can enter, named after the launcher's process (its pid and start time, so that a reused
pid names another folder). Rank 0 writes the coordinator's address, the run's token file and the output folder; the
others wait for it. Each supervisor also leaves its progress and, at the end, its record there. Called by
`launch.train` under torchrun, mpirun or mpiexec.
"""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collectives.errors import CoordinatorUnreachable, UsageError
from launch.environment import Launcher


def runtime_folder(environ: Mapping[str, str]) -> Path:
    """Return this user's private runtime folder, made (0700) if it is not there.

    Raises:
        UsageError: it belongs to another user, is a link, or others may enter it.

    """
    base = environ.get("XDG_RUNTIME_DIR", "")
    # The variable is often inherited into containers where the folder does not exist.
    own = Path(base) / "ringhold" if base and Path(base).is_dir() else None
    folder = own or Path(tempfile.gettempdir()) / f"ringhold-{os.getuid()}"
    return private_folder(folder)


def private_folder(folder: Path) -> Path:
    """Make `folder` (0700) or check that an existing one is ours alone.

    Raises:
        UsageError: it belongs to another user, is a link, or others may enter it, or it cannot be made.

    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UsageError(f"cannot use the runtime folder {folder}: {error.strerror}; set XDG_RUNTIME_DIR") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UsageError(f"the runtime folder {folder} is not a folder owned by this user; set XDG_RUNTIME_DIR")
    if status.st_mode & 0o077:
        raise UsageError(f"others may enter the runtime folder {folder}; run: chmod 700 {folder}")
    return folder


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` (0600) so that a reader sees all of it or the former content, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(temporary).replace(path)


def start_time(pid: int) -> int:
    """Return when process `pid` started, in clock ticks since boot; 0 where /proc does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # Field 22; the command (field 2) is in parentheses and may hold spaces.
    return int(text.rpartition(")")[2].split()[19])


def _sweep(folder: Path) -> None:
    """Remove what launches left that were killed: no token shall lie about for ever."""
    for path in folder.glob("launch-*-*-*"):
        pid, started = path.name.split("-")[1:3]
        if start_time(int(pid)) != int(started):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def own_folder(what: str) -> Iterator[Path]:
    """A private folder while it lasts. Those that killed processes left are removed.

    Raises:
        UsageError: the runtime folder is not safe to use.

    """
    base = runtime_folder(os.environ)
    _sweep(base)
    folder = private_folder(base / f"launch-{os.getpid()}-{start_time(os.getpid())}-{what}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Rendezvous:
    """The folder in which the supervisors of one launch meet. Every method may be called by any of them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    @classmethod
    def of_launcher(cls, launcher: Launcher, environ: Mapping[str, str], parent: int | None = None) -> "Rendezvous":
        """Open the folder that belongs to the launcher of this process (`parent`: its pid, by default ours).

        Raises:
            UsageError: the runtime folder is not safe to use.

        """
        parent = os.getppid() if parent is None else parent
        if launcher.rank == 0:
            _sweep(runtime_folder(environ))
        name = f"launch-{parent}-{start_time(parent)}-{launcher.attempt}"
        return cls(private_folder(runtime_folder(environ) / name), launcher.rank)

    @property
    def token_file(self) -> Path:
        """Where rank 0 puts the run's token."""
        return self.folder / "token"

    def publish(self, facts: Mapping[str, Any], token: str) -> None:
        """Rank 0: leave the token, then what the others need to start (`facts`, JSON values)."""
        write_private(self.token_file, token)
        write_private(self.folder / "facts.json", json.dumps(facts))

    def wait(self, timeout: float) -> dict[str, Any]:
        """Wait for rank 0's facts.

        Raises:
            CoordinatorUnreachable: they did not come within `timeout` seconds.

        """
        return self._wait_for(
            self.folder / "facts.json", timeout, "the supervisor of rank 0 did not announce a coordinator"
        )

    def progress(self, step: int) -> None:
        """Tell the others that this supervisor's peer has reached `step`."""
        write_private(self.folder / f"progress.{self.rank}", str(step))

    def furthest(self) -> int:
        """Return the highest step that any supervisor told, 0 if none did."""
        return max((int(path.read_text() or 0) for path in self.folder.glob("progress.*")), default=0)

    def leave_record(self, record: Mapping[str, Any]) -> None:
        """Leave this supervisor's record of its part of the run, for rank 0 to judge."""
        write_private(self.folder / f"record.{self.rank}.json", json.dumps(record))

    def record_of(self, rank: int, timeout: float) -> dict[str, Any]:
        """Wait for the record of the supervisor of `rank`.

        Raises:
            CoordinatorUnreachable: it did not come within `timeout` seconds.

        """
        path = self.folder / f"record.{rank}.json"
        return self._wait_for(path, timeout, f"the supervisor of rank {rank} left no record of its peer")

    def has_record_of(self, rank: int) -> bool:
        """Whether the supervisor of `rank` has left its record."""
        return (self.folder / f"record.{rank}.json").exists()

    def announce(self, code: int) -> None:
        """Rank 0, last: tell the others the exit code of the whole, wait a moment for them, and remove the folder."""
        write_private(self.folder / "verdict.json", json.dumps({"exit_code": code}))
        others = len(list(self.folder.glob("record.*.json")))
        end = time.monotonic() + 2.0
        while len(list(self.folder.glob("bye.*"))) < others and time.monotonic() < end:
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def verdict(self, timeout: float) -> int:
        """Other ranks, last: wait for rank 0's exit code, so that no launcher ends rank 0 before it has judged.

        Raises:
            CoordinatorUnreachable: it did not come within `timeout` seconds.

        """
        path = self.folder / "verdict.json"
        code = int(self._wait_for(path, timeout, "the supervisor of rank 0 gave no verdict")["exit_code"])
        write_private(self.folder / f"bye.{self.rank}", "")
        return code

    def _wait_for(self, path: Path, timeout: float, what: str) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > end:
                raise CoordinatorUnreachable(
                    f"{what} in {self.folder} within {timeout:g} s; either it failed (see its messages), or the "
                    "processes were not started by one launcher process: then set RINGHOLD_COORDINATOR=HOST:PORT and "
                    "RINGHOLD_TOKEN for all of them"
                )
            time.sleep(0.02)
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts
