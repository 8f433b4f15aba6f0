#!/usr/bin/env python3
"""Set up and run, with nothing installed but Python 3.11 or newer: `python3 dev.py demo`, `python3 dev.py test`.

Makes the virtual environment .venv beside this file if there is none, installs the project into it as pinned by
constraints.txt (again only when pyproject.toml or constraints.txt changed), and runs:

    demo [ARGS]   ringhold demo: the training run that lives through churn
    test [ARGS]   the whole test suite (pytest ARGS); MPICH, and the libraries whose checkpoints are converted, get
                  environments of their own: .venv-mpich, .venv-foreign
    lint          ruff and mypy --strict
    run ARGS      any command of the environment, such as `run ringhold --help`
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = Path(os.environ.get("RINGHOLD_VENV", ROOT / ".venv"))
PYTHON = HOME / "bin" / "python"
MPICH = Path(os.environ.get("RINGHOLD_MPICH", ROOT / ".venv-mpich"))
FOREIGN = Path(os.environ.get("RINGHOLD_FOREIGN", ROOT / ".venv-foreign"))
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
WHOLE = ("-n", "2", "--dist", "loadfile")
"""The whole suite by two workers, each of which takes a file at a time: tests of one file may share processes."""
EXTRAS = {"demo": "", "run": "", "test": "[test,mpi]", "lint": "[dev,mpi]"}


def install(home: Path, name: str, *runs: list[str], linked: bool = False, **environ: str) -> None:
    """Bring an environment up to date with pyproject.toml and constraints.txt: what pip is to install, run by run.

    `linked`: it finds what it has not got in the first environment, already while pip looks for what is missing.
    """
    files = hashlib.sha256(b"".join((ROOT / n).read_bytes() for n in ("pyproject.toml", "constraints.txt")))
    stamp = home / f"ringhold-{name}.stamp"
    if stamp.exists() and stamp.read_text() == files.hexdigest():
        return
    python = home / "bin" / "python"
    if not python.exists():
        print(f"making the virtual environment {home}", file=sys.stderr)
        venv.create(home, with_pip=True)
    if linked:
        link(home)
    print(f"installing {' '.join(map(' '.join, runs))} (the first time this takes a minute or two)", file=sys.stderr)
    for run in runs:
        subprocess.run([python, *PIP, *run], cwd=ROOT, env=os.environ | environ, check=True)
    stamp.write_text(files.hexdigest())


def link(home: Path) -> None:
    """Let an environment find what it has not got in the first."""
    (packages,) = (home / "lib").glob("python*/site-packages")
    (first,) = (HOME / "lib").glob("python*/site-packages")
    (packages / "ringhold.pth").write_text(f"import site; site.addsitedir({str(first)!r})\n")


def install_mpich() -> None:
    """Make the second environment: MPICH's commands have the names of Open MPI's. All else it finds in the first."""
    install(MPICH, "mpich", ["mpi4py", "mpich"])
    link(MPICH)


def install_foreign() -> None:
    """Make the third environment: DeepSpeed and Megatron-Core, to load what was converted for them.

    DeepSpeed is built against the torch that is installed, without its extensions; Megatron-Core's own list of
    requirements would bring what only GPUs need.
    """
    build = ["setuptools", "wheel", "ninja", "packaging", "py-cpuinfo", "psutil"]
    deepspeed = ["--no-build-isolation", "deepspeed"]
    megatron = ["--no-deps", "megatron-core"]
    install(FOREIGN, "foreign", build, deepspeed, megatron, linked=True, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu")


def commands(name: str, args: list[str]) -> list[list[str | Path]]:
    """Return what to run for one subcommand."""
    bin_ = HOME / "bin"
    return {
        "demo": [[bin_ / "ringhold", "demo", *args]],
        "test": [[PYTHON, "-m", "pytest", *(args or WHOLE)]],
        "lint": [[bin_ / "ruff", "check"], [bin_ / "ruff", "format", "--check"], [PYTHON, "-m", "mypy"]],
        "run": [[bin_ / args[0] if args and (bin_ / args[0]).exists() else (args or ["true"])[0], *args[1:]]],
    }[name]


def main() -> int:
    """Run one subcommand and return its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python can run this script, and is told why it must not
        print("ringhold needs Python 3.11 or newer", file=sys.stderr)
        return 2
    name, *args = sys.argv[1:] or ["--help"]
    if name not in EXTRAS:
        print(__doc__.strip(), file=sys.stderr)
        return 0 if name in ("-h", "--help") else 2
    try:
        extras = EXTRAS[name]
        install(HOME, extras.strip("[]") or "base", ["-e", f".{extras}"])
        if name == "test":
            install_mpich()
            install_foreign()
    except subprocess.CalledProcessError as error:
        print(f"dev.py: installing failed ({error.returncode}); the lines above say why", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    for command in commands(name, args):
        try:
            code = subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            return 130
        if code:
            return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main())
