"""Which launcher started us, what a peer inherits, and how supervisors of one launch find each other."""

import os
import threading
from pathlib import Path

import pytest

from collectives.errors import CoordinatorUnreachable, UsageError
from launch.environment import Launcher, detect, peer_environment
from launch.rendezvous import Rendezvous, private_folder, runtime_folder, start_time, write_private

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "2",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}


def test_each_launcher_is_recognised() -> None:
    assert detect(TORCHRUN) == Launcher("torchrun", 3, 4, 1, 2, 1)
    assert detect(OPENMPI) == Launcher("openmpi", 2, 4, 2, 4)
    assert detect(MPICH) == Launcher("mpich", 0, 2, 0, 2)
    assert detect({}) is None
    assert detect({"RANK": "0", "WORLD_SIZE": "2"}) is None  # a stray variable is no launcher


def test_the_innermost_launcher_counts() -> None:
    launcher = detect({**OPENMPI, **TORCHRUN})
    assert launcher is not None
    assert launcher.kind == "torchrun"


def test_one_host_is_claimed_only_when_known() -> None:
    assert Launcher("openmpi", 0, 4, 0, 4).one_host
    assert not Launcher("torchrun", 0, 4, 0, 2).one_host
    launcher = detect({"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert launcher is not None
    assert not launcher.one_host


@pytest.mark.parametrize(
    "broken", [{"OMPI_COMM_WORLD_RANK": "x"}, {"OMPI_COMM_WORLD_RANK": "9"}, {"OMPI_COMM_WORLD_SIZE": ""}]
)
def test_contradictory_variables_are_a_usage_error(broken: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="OMPI_COMM_WORLD"):
        detect({**OPENMPI, **broken})


def test_a_peer_does_not_inherit_its_supervisors_place() -> None:
    environ = {**TORCHRUN, **OPENMPI, **MPICH, "PATH": "/bin", "OMP_NUM_THREADS": "2", "RINGHOLD_HEARTBEAT": "0.1"}
    kept = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
        "RINGHOLD_HEARTBEAT": "0.1",
        "GLIBC_TUNABLES": "glibc.malloc.check=1",
    }
    assert peer_environment(environ | kept) == kept
    assert peer_environment(environ).keys() == kept.keys()
    assert peer_environment(environ, keep_mpi=True).keys() >= OPENMPI.keys()


def test_the_runtime_folder_is_private(tmp_path: Path) -> None:
    folder = runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert folder == tmp_path / "ringhold"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_runtime_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, 12345, 12345)
    else:
        theirs = Path("/")
    with pytest.raises(UsageError, match=r"owned by this user|may enter"):
        private_folder(theirs)


def test_a_link_in_place_of_the_runtime_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="not a folder owned"):
        private_folder(tmp_path / "link")


def test_private_files_are_whole_and_private(tmp_path: Path) -> None:
    write_private(tmp_path / "token", "secret")
    assert (tmp_path / "token").read_text() == "secret"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


def test_supervisors_of_one_launcher_meet(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    first = Rendezvous.of_launcher(Launcher("openmpi", 0, 2, 0, 2), environ)
    second = Rendezvous.of_launcher(Launcher("openmpi", 1, 2, 1, 2), environ)
    timer = threading.Timer(0.1, first.publish, ({"coordinator": "127.0.0.1:1"}, "secret"))
    timer.start()
    assert second.wait(5.0) == {"coordinator": "127.0.0.1:1"}
    assert second.token_file.read_text() == "secret"
    timer.join()
    second.progress(7)
    first.progress(5)
    assert first.furthest() == second.furthest() == 7
    second.leave_record({"peer": "done"})
    assert first.has_record_of(1)
    assert not first.has_record_of(2)
    assert first.record_of(1, 1.0) == {"peer": "done"}
    timer = threading.Timer(0.1, first.announce, (3,))
    timer.start()
    assert second.verdict(5.0) == 3
    timer.join()
    assert not first.folder.exists()


def test_launches_do_not_meet_each_other(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    launcher = Launcher("torchrun", 0, 2, 0, 2)
    again = Launcher("torchrun", 0, 2, 0, 2, attempt=1)
    folders = {
        Rendezvous.of_launcher(launcher, environ).folder,
        Rendezvous.of_launcher(launcher, environ, parent=os.getpid()).folder,
        Rendezvous.of_launcher(again, environ).folder,
    }
    assert len(folders) == 3


def test_what_killed_launches_left_is_swept(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    other = Rendezvous.of_launcher(Launcher("torchrun", 1, 2, 1, 2), environ, parent=os.getpid())
    left = runtime_folder(environ) / f"launch-{os.getpid()}-1-0"
    left.mkdir()
    (left / "token").write_text("secret")
    first = Rendezvous.of_launcher(Launcher("torchrun", 0, 2, 0, 2), environ)
    assert not left.exists()
    assert first.folder.exists()
    assert other.folder.exists()


def test_a_runtime_folder_that_is_not_there_is_not_used() -> None:
    assert runtime_folder({"XDG_RUNTIME_DIR": "/nowhere/at/all"}) == runtime_folder({})


def test_a_missing_rank_0_is_a_clear_error(tmp_path: Path) -> None:
    rendezvous = Rendezvous.of_launcher(Launcher("openmpi", 1, 2, 1, 2), {"XDG_RUNTIME_DIR": str(tmp_path)})
    with pytest.raises(CoordinatorUnreachable, match="RINGHOLD_COORDINATOR"):
        rendezvous.wait(0.05)


def test_start_time_tells_processes_apart() -> None:
    assert start_time(os.getpid()) >= start_time(os.getppid()) > 0
    assert start_time(2**22 + 1) == 0
