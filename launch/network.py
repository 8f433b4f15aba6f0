"""Hosts of a network on this machine: network namespaces behind a bridge, with real links that are slow or cut.

Used by `benchmarks.links` and by tests that need TCP between hosts. Needs Linux, root, and the commands `ip` and `tc`
(Debian's iproute2). Each host is a namespace with an address and a loopback of its own, the bridge is in one more, the
hub: nothing in the namespace of this machine is touched, and no packet leaves.

    with Network(hosts=4, rate=50e6) as network:
        worker = network.start(1, ["ringhold", "peer", ...])
        network.cut(1)

The kernel's token bucket (tc-tbf(8)) limits the rate in each direction; it adds no delay. Links with a latency are
emulated instead (`collectives.transports.emulated`).
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from collectives.errors import RingholdError, Unsupported, UsageError

BURST = 2**16
"""Bytes that may pass at once at the speed of memory. More flatters short messages: of 1 MiB at 50 MB/s, four times as
many arrive before their time by a tenth of all. Fewer than the largest packet of the kernel cost rate."""
_QUEUE = 0.05
"""Seconds of traffic that wait in front of a slow link; more are dropped, as a switch does."""
_LEAST, _MOST = 10_000, 5_000_000_000
"""Bytes a second that can be asked for: a burst takes seconds below, and the kernel's own work decides above."""
_MOST_HOSTS = 64
_FOLDER = Path("/run/netns")
_NAME = re.compile(r"ringhold-(\d+)-\d+-(?:hub|\d+)")
_CLONE_NEWNET = 0x40000000
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a host has sent and received over its link, with their headers."""

    sent: int
    received: int


class Network:
    """Hosts 0, 1, ... behind a bridge. A context manager: the network is there inside, and gone after.

    Its namespaces carry the pid of the process that makes it. Whoever makes the next one removes what is left of
    processes that were killed. Processes that run inside keep their namespace alive: end them before.

    Args:
        hosts: how many.
        rate: bytes a second of each host's link, in each direction by itself; None: without limit.
        mtu: bytes of the largest packet.
        burst: bytes of the token bucket.

    Raises:
        UsageError: an argument is out of range.

    """

    _made = 0

    def __init__(self, hosts: int, rate: float | None = None, mtu: int = 9000, burst: int = BURST) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise UsageError(f"a network has 1 to {_MOST_HOSTS} hosts, not {hosts}")
        if not 1280 <= mtu <= 65535 or burst < mtu:
            raise UsageError(f"mtu must be 1280 to 65535 bytes and burst no less than it, not {mtu} and {burst}")
        _check_rate(rate)
        self.size = hosts
        self._rate, self._mtu, self._burst = rate, mtu, burst
        self._limited: set[int] = set()
        self._maker = os.getpid()
        Network._made += 1
        self._prefix = f"ringhold-{self._maker}-{Network._made}-"

    def __enter__(self) -> Self:
        """Make it.

        Raises:
            Unsupported: not root, no `ip` or `tc`, or a kernel without namespaces, bridges or token buckets.

        """
        require()
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove all of it. Does nothing in a process forked from the maker, and when it is gone."""
        if os.getpid() == self._maker:
            for name in _namespaces():
                if name.startswith(self._prefix):
                    _ip("netns", "delete", name)

    # --- who is where ---

    def address(self, host: int) -> str:
        """IPv4 address of a host, for its processes to listen on."""
        self._check(host)
        return f"10.77.0.{host + 1}"

    @property
    def hub_address(self) -> str:
        """Address of the hub; processes started there reach all hosts, and their links are not limited."""
        return "10.77.0.254"

    def start(self, host: int | None, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on a host, or on the hub (None); `options` are those of `subprocess.Popen`."""
        return subprocess.Popen(["ip", "netns", "exec", self._name(host), *command], **options)

    def enter(self, host: int | None) -> None:
        """Move the calling thread, and what it starts from now on, to a host or the hub. For a process just forked.

        Raises:
            Unsupported: the namespace is gone or may not be entered.

        """
        with (_FOLDER / self._name(host)).open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                reason = os.strerror(ctypes.get_errno())
                raise Unsupported(f"cannot enter the network namespace {self._name(host)}: {reason}; be root")

    # --- what happens to links ---

    def cut(self, host: int) -> None:
        """Cut a host off, as by pulling its cable: nothing reaches it and nothing it sends arrives, without a word."""
        self._port(host, "down")

    def heal(self, host: int) -> None:
        """Undo `cut`. TCP goes on when it next tries again, which may be seconds later."""
        self._port(host, "up")

    def limit(self, host: int, rate: float | None) -> None:
        """Set the rate of a host's link, bytes a second in each direction; None: without limit.

        Raises:
            Unsupported: this kernel has no token bucket.

        """
        self._check(host)
        _check_rate(rate)
        for space, device in ((self._name(host), "eth0"), (self._name(None), f"host{host}")):
            if rate is not None:
                bucket = f"rate {round(8 * rate)}bit burst {self._burst} limit {self._burst + round(_QUEUE * rate)}"
                _tc("-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *bucket.split())
            elif host in self._limited:
                _tc("-n", space, "qdisc", "delete", "dev", device, "root")
        (self._limited.discard if rate is None else self._limited.add)(host)

    def traffic(self, host: int) -> Traffic:
        """Count what has passed a host's link."""
        self._check(host)
        said = _ip("-n", self._name(host), "-json", "-stats", "link", "show", "dev", "eth0")
        counters = msgspec.json.decode(said)[0]["stats64"]
        return Traffic(counters["tx"]["bytes"], counters["rx"]["bytes"])

    # --- inside ---

    def _build(self) -> None:
        hub = self._name(None)
        self._add(hub)
        _ip("-n", hub, "link", "add", "bridge", "mtu", str(self._mtu), "up", "type", "bridge", what="bridges")
        _ip("-n", hub, "address", "add", f"{self.hub_address}/24", "dev", "bridge")
        for host in range(self.size):
            name, port = self._name(host), f"host{host}"
            self._add(name)
            ends = f"{port} mtu {self._mtu} type veth peer name eth0 mtu {self._mtu} netns {name}"
            _ip("-n", hub, "link", "add", *ends.split(), what="veth pairs")
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            self.limit(host, self._rate)

    def _add(self, name: str) -> None:
        _ip("netns", "add", name, what="network namespaces")
        _ip("-n", name, "link", "set", "lo", "up")

    def _port(self, host: int, state: str) -> None:
        self._check(host)
        _ip("-n", self._name(None), "link", "set", f"host{host}", state)

    def _name(self, host: int | None) -> str:
        if host is None:
            return f"{self._prefix}hub"
        self._check(host)
        return f"{self._prefix}{host}"

    def _check(self, host: int) -> None:
        if not 0 <= host < self.size:
            raise UsageError(f"this network has the hosts 0 to {self.size - 1}, and no host {host}")


def require() -> None:
    """Raise `Unsupported`, saying what to do, unless this process can make networks."""
    missing = [command for command in ("ip", "tc") if not shutil.which(command)]
    if missing:
        raise Unsupported(
            f"network namespaces need the command {missing[0]}; install iproute2 (apt-get install iproute2)"
        )
    if os.geteuid():
        raise Unsupported("network namespaces need root; run as root, or emulate links (transport emulated)")


def remove_stale() -> list[str]:
    """Remove the namespaces of makers that were killed; return their names."""
    stale = [name for name in _namespaces() if _is_stale(name)]
    for name in stale:
        with contextlib.suppress(Unsupported):  # another process is at it, too
            _ip("netns", "delete", name)
    return stale


def _namespaces() -> list[str]:
    return sorted(entry.name for entry in _FOLDER.iterdir()) if _FOLDER.is_dir() else []


def _is_stale(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and not Path(f"/proc/{found[1]}").exists()


def _check_rate(rate: float | None) -> None:
    if rate is not None and not _LEAST <= rate <= _MOST:
        raise UsageError(f"a rate must be {_LEAST:.0e} to {_MOST:.0e} bytes a second, not {rate!r}")


def _ip(*arguments: str, what: str = "") -> str:
    return _run(["ip", *arguments], what)


def _tc(*arguments: str) -> str:
    return _run(["tc", *arguments], "token buckets (CONFIG_NET_SCH_TBF)")


def _run(command: list[str], what: str) -> str:
    """Run a command that takes no time, out of reach of Ctrl-C, and return what it prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise RingholdError(
            f"no end of {' '.join(command)!r} within {_PATIENCE:g} s; is the machine overloaded?"
        ) from None
    if done.returncode:
        reason = done.stderr.strip() or f"code {done.returncode}"
        hint = f"; this kernel may have no {what}" if what else ""
        raise Unsupported(f"{' '.join(command)!r} failed: {reason}{hint}")
    return done.stdout
