"""Hosts of a network on this machine: network namespaces with real cables between them that are slow or cut.

Used by `ringhold lab`, by the churn lab, by `benchmarks.links` and by tests that need TCP between hosts. Needs Linux,
root, and the commands `ip` and `tc` (Debian's iproute2). Each host is a namespace with an address and a loopback of its
own; switches are bridges in namespaces of theirs, hubs: nothing in the namespace of this machine is touched, and no
packet leaves.

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
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from collectives.errors import RingholdError, Unsupported, UsageError
from launch.network_shape import HUB, Cable, shape_of
from launch.rendezvous import start_time

BURST = 2**16
"""Bytes that may pass at once at the speed of memory. More flatters short messages: of 1 MiB at 50 MB/s, four times as
many arrive before their time by a tenth of all. Fewer than the largest packet of the kernel cost rate."""
_QUEUE = 0.05
"""Seconds of traffic that wait in front of a slow link; more are dropped, as a switch does."""
_LEAST, _MOST = 10_000, 5_000_000_000
"""Bytes a second that can be asked for: a burst takes seconds below, and the kernel's own work decides above."""
_MOST_HOSTS = 64
_CUT, _LOCAL = 10, 100
"""Preferences of the rules that drop what comes by a cut cable, and of the kernel's own one for local packets."""
_FOLDER = Path("/run/netns")
_NAME = re.compile(r"ringhold-(\d+)-(\d+)-\d+-(?:hub2?|\d+)")
_CLONE_NEWNET = 0x40000000
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a host has sent and received over its link, with their headers."""

    sent: int
    received: int


class Network:
    """Hosts 0, 1, ... and cables. A context manager: the network is there inside, and gone after.

    Its namespaces carry the pid and the start time of the process that makes it. Whoever makes the next one removes
    what is left of processes that were killed. What still runs inside when it is removed is killed: end it before.

    Args:
        hosts: how many.
        rate: bytes a second of each cable, in each direction by itself; None: without limit.
        mtu: bytes of the largest packet.
        burst: bytes of the token bucket.
        shape: "star", "ring", "mesh" or "two-sites", see `network_shape`.

    Raises:
        UsageError: an argument is out of range.

    """

    _made = 0

    def __init__(
        self, hosts: int, rate: float | None = None, mtu: int = 9000, burst: int = BURST, shape: str = "star"
    ) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise UsageError(f"a network has 1 to {_MOST_HOSTS} hosts, not {hosts}")
        if not 1280 <= mtu <= 65535 or burst < mtu:
            raise UsageError(f"mtu must be 1280 to 65535 bytes and burst no less than it, not {mtu} and {burst}")
        _check_rate(rate)
        self.size = hosts
        self.shape = shape_of(shape, hosts)
        self._rate, self._mtu, self._burst = rate, mtu, burst
        self._limited: set[Cable] = set()
        self._maker = os.getpid()
        Network._made += 1
        self._prefix = f"ringhold-{self._maker}-{start_time(self._maker)}-{Network._made}-"

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
                    _remove(name)

    # --- who is where ---

    def address(self, host: int) -> str:
        """IPv4 address of a host, for its processes to listen on."""
        self._check(host)
        return f"10.77.0.{host + 1}"

    @property
    def hub_address(self) -> str:
        """Address of the hub; processes started there reach all hosts, and their links are not limited.

        Raises:
            UsageError: this shape has no hub.

        """
        if not self.shape.hubs:
            raise UsageError(f"a {self.shape.name} has no hub; start it on a host")
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

    # --- what happens to cables ---

    def cut(self, host: int) -> None:
        """Cut a host off, as by pulling its cables: nothing reaches it and nothing it sends arrives, without a word."""
        self._check(host)
        for cable in self.shape.of(str(host)):
            self._switch(cable, on=False)

    def heal(self, host: int) -> None:
        """Undo `cut`. TCP goes on when it next tries again, which may be seconds later."""
        self._check(host)
        for cable in self.shape.of(str(host)):
            self._switch(cable, on=True)

    def cut_cable(self, one: str, other: str) -> None:
        """Cut the cable between two nodes, silently. Nobody looks for another way.

        Raises:
            UsageError: there is none.

        """
        self._switch(self.shape.between(one, other), on=False)

    def heal_cable(self, one: str, other: str) -> None:
        """Undo `cut_cable`."""
        self._switch(self.shape.between(one, other), on=True)

    def limit(self, host: int, rate: float | None) -> None:
        """Set the rate of a host's cables, bytes a second in each direction; None: without limit.

        Raises:
            Unsupported: this kernel has no token bucket.

        """
        self._check(host)
        for cable in self.shape.of(str(host)):
            self.limit_cable(cable, rate)

    def limit_cable(self, cable: Cable, rate: float | None) -> None:
        """Set the rate of one cable, as `limit`."""
        _check_rate(rate)
        for node, other in (cable, cable[::-1]):
            space, device = self._space(node), _device(other)
            if rate is not None:
                bucket = f"rate {round(8 * rate)}bit burst {self._burst} limit {self._burst + round(_QUEUE * rate)}"
                _tc("-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *bucket.split())
            elif cable in self._limited:
                _tc("-n", space, "qdisc", "delete", "dev", device, "root")
        (self._limited.discard if rate is None else self._limited.add)(cable)

    def traffic(self, host: int) -> Traffic:
        """Count what has passed a host's cables."""
        self._check(host)
        sent = received = 0
        for cable in self.shape.of(str(host)):
            device = _device(_other(cable, str(host)))
            said = _ip("-n", self._space(str(host)), "-json", "-stats", "link", "show", "dev", device)
            counters = msgspec.json.decode(said)[0]["stats64"]
            sent, received = sent + counters["tx"]["bytes"], received + counters["rx"]["bytes"]
        return Traffic(sent, received)

    # --- inside ---

    def _build(self) -> None:
        for node in self.shape.nodes:
            self._add(node)
        for cable in self.shape.cables:
            self._lay(cable)
        for host in range(self.size):
            self._route(host)

    def _add(self, node: str) -> None:
        space = self._space(node)
        _ip("netns", "add", space, what="network namespaces")
        _ip("-n", space, "link", "set", "lo", "up")
        if node in self.shape.hubs:
            _ip("-n", space, "link", "add", "bridge", "mtu", str(self._mtu), "up", "type", "bridge", what="bridges")
            if node == HUB:
                _ip("-n", space, "address", "add", f"{self.hub_address}/24", "dev", "bridge")
        else:
            _ip("-n", space, "address", "add", f"{self.address(int(node))}/32", "dev", "lo")
            # What a cut cable brings is dropped before anybody looks whether it is for this host.
            _ip("-n", space, "rule", "add", "pref", str(_LOCAL), "lookup", "local", what="routing rules")
            _ip("-n", space, "rule", "delete", "pref", "0")

    def _lay(self, cable: Cable) -> None:
        one, other = cable
        ends = f"{_device(other)} mtu {self._mtu} type veth peer name {_device(one)} mtu {self._mtu}"
        _ip(
            "-n", self._space(one), "link", "add", "name", *ends.split(), "netns", self._space(other), what="veth pairs"
        )
        for node, far in (cable, cable[::-1]):
            bridged = ("master", "bridge") if node in self.shape.hubs else ()
            _ip("-n", self._space(node), "link", "set", _device(far), *bridged, "up")
        self.limit_cable(cable, self._rate)

    def _route(self, host: int) -> None:
        space, mine = self._space(str(host)), self.address(host)
        if self.shape.hubs:
            device = _device(self.shape.next(host, host))
            _ip("-n", space, "route", "add", "10.77.0.0/24", "dev", device, "src", mine)
            return
        if self.shape.name == "ring":
            _run(["ip", "netns", "exec", space, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"], "")
        for target in range(self.size):
            if target != host:
                step = self.shape.next(host, target)
                via = () if step == str(target) else ("via", self.address(int(step)), "onlink")
                route = (f"{self.address(target)}/32", *via, "dev", _device(step), "src", mine)
                _ip("-n", space, "route", "add", *route)

    def _switch(self, cable: Cable, on: bool) -> None:
        hub = next((node for node in cable if node in self.shape.hubs), None)
        if hub is not None:
            device = _device(_other(cable, hub))
            _ip("-n", self._space(hub), "link", "set", device, "up" if on else "down")
            return
        for node, other in (cable, cable[::-1]):
            rule = ("pref", str(_CUT), "iif", _device(other), "blackhole")
            there = "blackhole" in _ip(
                "-n", self._space(node), "rule", "show", "pref", str(_CUT), "iif", _device(other)
            )
            if there == on:
                _ip("-n", self._space(node), "rule", "delete" if on else "add", *rule)

    def _name(self, host: int | None) -> str:
        if host is None:
            return self._space(HUB)
        self._check(host)
        return self._space(str(host))

    def _space(self, node: str) -> str:
        return f"{self._prefix}{node}"

    def _check(self, host: int) -> None:
        if not 0 <= host < self.size:
            raise UsageError(f"this network has the hosts 0 to {self.size - 1}, and no host {host}")


def _device(node: str) -> str:
    """The end of a cable that leads to a node."""
    return f"to-{node}"


def _other(cable: Cable, node: str) -> str:
    return cable[1] if cable[0] == node else cable[0]


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
    """Remove the namespaces of makers that were killed, and what still runs in them; return their names."""
    stale = [name for name in _namespaces() if _is_stale(name)]
    for name in stale:
        with contextlib.suppress(Unsupported):  # another process is at it, too
            _remove(name)
    return stale


def _remove(name: str) -> None:
    """Remove a namespace, and what still runs in it, which would keep it alive unseen."""
    for pid in map(int, _ip("netns", "pids", name).split()):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _ip("netns", "delete", name)


def _namespaces() -> list[str]:
    return sorted(entry.name for entry in _FOLDER.iterdir()) if _FOLDER.is_dir() else []


def _is_stale(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and start_time(int(found[1])) != int(found[2])


def _check_rate(rate: float | None) -> None:
    if rate is not None and not _LEAST <= rate <= _MOST:
        least, most = 8 * _LEAST // 1000, 8 * _MOST // 10**9
        raise UsageError(f"a rate must be {least}kbit to {most}gbit a second, not {8 * rate:g} bit")


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
