"""What this machine can do for a job, found out by doing it. Used by `launch.doctor`.

Each check returns a `Finding`: what was tried, how it went, and what follows. A check that fails is a finding, never
an exception; whatever it made (processes, files, a network namespace) is gone when it returns.
"""

import ctypes
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from collectives.errors import RingholdError, Unsupported
from launch.environment import peer_environment
from launch.network import Network

Status = Literal["ok", "limited", "missing"]
_SUPPORTED_PYTHON = (3, 11)
_SUPPORTED_TORCH = (2, 11)
_TESTED_TORCH = (2, 13)
_PATIENCE = 60.0
"""Seconds that a check's processes may take; importing torch on a busy machine takes several."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the doctor's table. `core` is set where nothing works without it."""

    name: str
    status: Status
    found: str
    follows: str
    core: bool = False


def examine() -> list[Finding]:
    """Run every check, in the order of the table."""
    return [check() for check in CHECKS]


def check_python() -> Finding:
    """Look at the interpreter."""
    good = sys.version_info[:2] >= _SUPPORTED_PYTHON
    follows = "supported" if good else f"install Python {'.'.join(map(str, _SUPPORTED_PYTHON))} or newer"
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}"
    return Finding("python", "ok" if good else "missing", found, follows, core=True)


def check_torch() -> Finding:
    """Look at the version of torch, without importing it."""
    try:
        text = version("torch")
    except PackageNotFoundError:
        return Finding("torch", "missing", "not installed", "pip install torch", core=True)
    number = tuple(int(part) for part in text.partition("+")[0].split(".")[:2])
    if number < _SUPPORTED_TORCH:
        return Finding("torch", "missing", text, "too old: install torch 2.11 or newer", core=True)
    if number > _TESTED_TORCH:
        return Finding("torch", "limited", text, "newer than what was tested (2.11 to 2.13)", core=True)
    return Finding("torch", "ok", text, "supported (2.11 to 2.13)", core=True)


def check_loopback() -> Finding:
    """Send a byte over TCP on 127.0.0.1."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0) as a:
            b, _ = server.accept()
            with b:
                a.sendall(b"x")
                b.settimeout(5.0)
                good = b.recv(1) == b"x"
    except OSError as error:
        return Finding("loopback", "missing", str(error), "peers cannot reach each other: allow TCP on lo", core=True)
    return Finding("loopback", "ok" if good else "missing", "TCP on 127.0.0.1", "coordinator and links", core=True)


_GLOO = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
t = torch.full((1000,), 1.0 + dist.get_rank())
dist.all_reduce(t)
print(t.eq(3.0).all().item())
dist.destroy_process_group()
"""


def check_gloo() -> Finding:
    """All-reduce between two processes over torch's own gloo."""
    with tempfile.TemporaryDirectory(prefix="ringhold-doctor-") as folder:
        commands = [[sys.executable, "-c", _GLOO, f"{folder}/store", str(rank)] for rank in range(2)]
        said = _together(commands)
    if all(text.strip() == "True" for text, _ in said):
        return Finding("gloo", "ok", "all_reduce of 2 processes", "gloo transport: yes", core=True)
    reason = next((error for _, error in said if error), "wrong sum")
    return Finding("gloo", "missing", reason, "no transport works: reinstall torch (CPU)", core=True)


_MPI = """
import json, mpi4py
from mpi4py import MPI
print(json.dumps([mpi4py.__version__, *MPI.get_vendor(), MPI.Is_initialized()]))
"""


def check_mpi() -> Finding:
    """Import mpi4py in a process of its own (that starts MPI) and see which library it found."""
    ((text, error),) = _together([[sys.executable, "-c", _MPI]])
    launcher = shutil.which("mpirun") or shutil.which("mpiexec")
    if error or not text:
        missing = "No module named 'mpi4py'" in error
        found = "mpi4py is not installed" if missing else error
        follows = 'mpi transport: no; pip install "ringhold[mpi]"' if missing else "mpi transport: no"
        if launcher:
            follows += f"; launching with {launcher} over gloo: yes"
        return Finding("MPI", "missing", found, follows)
    package, vendor, number, _ = json.loads(text)
    found = f"mpi4py {package}, {vendor} {'.'.join(map(str, number))}, {launcher or 'no mpirun on PATH'}"
    if vendor == "Open MPI" and tuple(number) >= (5,):
        return Finding("MPI", "ok", found, "mpi transport: yes; recovery needs mpirun --with-ft ulfm")
    if vendor == "MPICH" and tuple(number) >= (4, 1):
        return Finding("MPI", "limited", found, "mpi transport: healthy runs only, MPICH does not recover from a death")
    return Finding("MPI", "limited", found, "mpi transport: untested library; Open MPI 5 is what recovers")


def check_shared_memory() -> Finding:
    """Write to /dev/shm."""
    folder = Path("/dev/shm")
    try:
        space = os.statvfs(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 65536)
            file.flush()
    except OSError as error:
        return Finding("shared memory", "missing", f"{folder}: {error.strerror}", "shm transport: no")
    free = space.f_bavail * space.f_frsize
    if free < 256 << 20:
        return Finding("shared memory", "limited", f"{_size(free)} free", "shm transport: only small tensors fit")
    return Finding("shared memory", "ok", f"{folder}, {_size(free)} free", "shm transport: yes")


_OWNER = """
import ctypes, sys
memory = ctypes.create_string_buffer(b"ringhold doctor")
print(ctypes.addressof(memory), flush=True)
sys.stdin.read()
"""
_READER = """
import sys
from launch.machine import read_memory
sys.stdout.write(read_memory(int(sys.argv[1]), int(sys.argv[2]), 15).decode())
"""


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Read another process's memory by process_vm_readv(2).

    Raises:
        OSError: the kernel does not have it or does not allow it.

    """

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(size)
    local, remote = Vector(ctypes.addressof(buffer), size), Vector(address, size)
    call = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if call is None:
        raise OSError(38, os.strerror(38))
    call.restype = ctypes.c_ssize_t
    read = call(pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0))
    if read != size:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return buffer.raw


def check_process_vm_readv() -> Finding:
    """Let one child read the memory of another, as peers do, which may be forbidden even where a parent may."""
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        try:
            assert owner.stdout is not None
            address = owner.stdout.readline().strip()
            ((text, error),) = _together([[sys.executable, "-c", _READER, str(owner.pid), address]])
        finally:
            owner.kill()
    if text == "ringhold doctor":
        return Finding("process_vm_readv", "ok", "read a sibling's memory", "shm transport: direct reads")
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    hint = f" (kernel.yama.ptrace_scope={scope.read_text().strip()})" if scope.exists() else ""
    return Finding("process_vm_readv", "limited", error + hint, "shm transport: through /dev/shm, one copy more")


def check_namespaces() -> Finding:
    """Make a network of one host, limit its rate, and remove it."""
    instead = "shaped links: emulated transport only"
    try:
        with Network(1) as network:
            try:
                network.limit(0, 50e6)
            except Unsupported as error:
                return Finding("network namespaces", "limited", str(error), "partitions: yes; limited rates: emulated")
    except RingholdError as error:
        return Finding("network namespaces", "missing", str(error), instead)
    return Finding("network namespaces", "ok", "ip netns and tc tbf", "real links with partitions and limited rates")


def check_size() -> Finding:
    """Count the cores that we may use and the memory that is free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = _available_memory()
    # A peer of the smallest model needs 0.4 GiB, most of it torch itself.
    peers = int(free / (0.4 * 2**30))
    status: Status = "ok" if cores >= 2 and peers >= 4 else "limited"
    follows = f"room for {peers} small peers; more than {cores} share cores"
    return Finding("cores and memory", status, f"{cores} cores, {_size(free)} free", follows)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_loopback,
    check_gloo,
    check_mpi,
    check_shared_memory,
    check_process_vm_readv,
    check_namespaces,
    check_size,
)


def _together(commands: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Run commands at the same time; return for each what it printed and, if it failed, the last line of why."""
    environ = {**peer_environment(os.environ), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) for c in commands
    ]
    results = []
    for process in running:
        try:
            out, err = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            results.append(("", f"no answer within {_PATIENCE:g} s"))
            continue
        last = err.strip().splitlines()[-1] if err.strip() else f"it ended with code {process.returncode}"
        results.append((out, last if process.returncode else ""))
    return results


def _available_memory() -> int:
    """Bytes that programs can still get: free memory and the cache that gives way."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
