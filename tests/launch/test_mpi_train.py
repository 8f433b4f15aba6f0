"""`launch.train --transport mpi` under real launchers: a peer dies over Open MPI; a healthy run over MPICH."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from collectives.errors import UsageError
from launch.environment import Launcher, launcher_descriptors
from launch.train import make_request, options
from tests.harness.cluster import ROOT
from tests.harness.mpi import LIBRARIES


@pytest.mark.parametrize(("library", "churn"), [("openmpi", "kill@3:1"), ("mpich", "")])
def test_ranks_train_over_mpi(library: str, churn: str, tmp_path: Path) -> None:
    mpi = LIBRARIES[library]
    # MPICH's launcher with the harness's option takes a supervisor's end, which is no rank itself, for a failure.
    launcher = mpi.launcher[:1] if mpi.ends_survivors else mpi.launcher
    train = [mpi.python, "-m", "launch.train", "--transport", "mpi", "--steps", "6", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*launcher, "-n", "3", *train, "--churn", churn, "--quiet", "--json"],
        cwd=ROOT,
        env={**os.environ, **mpi.environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert json.loads(done.stdout)["ok"], done.stderr


def test_the_pmi_descriptor_is_passed_on() -> None:
    assert launcher_descriptors({"PMI_FD": "9"}) == (9,)
    assert launcher_descriptors({"OMPI_COMM_WORLD_RANK": "0"}) == ()


@pytest.mark.parametrize("arguments", [["--restart"], ["--churn", "kill@9,join@12"], ["--churn-rate", "3"]])
def test_over_mpi_nobody_joins_later(arguments: list[str]) -> None:
    given = options(["--transport", "mpi", *arguments])
    with pytest.raises(UsageError, match="no peer can join"):
        make_request(Launcher("openmpi", 0, 4, 0, 4), **given)


def test_mpi_needs_its_launcher() -> None:
    with pytest.raises(UsageError, match="mpirun --with-ft ulfm"):
        make_request(None, **options(["--transport", "mpi"]))
