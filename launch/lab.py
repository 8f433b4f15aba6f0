"""`ringhold lab`: run a command on each host of a network that exists on this machine only, and cut its cables."""

import json
import os
import re
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import click

from collectives.errors import OperationTimeout, RingholdError, UsageError
from launch import console
from launch.child import die_with_parent
from launch.lab_cuts import Cut, Switches, draw_cuts, parse_cut
from launch.network import Network
from launch.network_shape import SHAPES
from launch.rendezvous import own_folder

PORT = 29400
"""Where the lab's coordinator listens; the network is its own, so it is always free."""
_GRACE = 3.0
_UNITS = {"kbit": 125.0, "mbit": 125e3, "gbit": 125e6}
_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", re.IGNORECASE)


@click.command("lab", context_settings={"max_content_width": 100, "ignore_unknown_options": True})
@click.option("--hosts", type=click.IntRange(1), default=4, show_default=True, help="How many, one command on each.")
@click.option("--rate", metavar="RATE", help="Of each cable and direction: 400mbit, 1gbit.  [default: no limit]")
@click.option("--between", metavar="RATE", help="Of the cable between two sites.  [default: as the others]")
@click.option("--topology", type=click.Choice(SHAPES), default="star", show_default=True, help="Where cables are.")
@click.option(
    "--cut", "cuts", multiple=True, metavar="WHAT@FROM..TO", help="A cable or a host, and seconds; repeatable."
)
@click.option("--random-cuts", type=console.Finite(0, min_open=True), metavar="SECONDS", help="Cut cables for so long.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the random cuts.")
@click.option("--coordinator", default="0", show_default=True, help='The host that has one, "hub", or "none".')
@click.option("--timeout", type=console.Finite(0, min_open=True), help="Seconds for it all.")
@click.option("--json", "as_json", is_flag=True, help="Print what became of each host as one JSON object.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def command(
    hosts: int,
    rate: str | None,
    between: str | None,
    topology: str,
    cuts: Sequence[str],
    random_cuts: float | None,
    seed: int,
    coordinator: str,
    timeout: float | None,
    as_json: bool,
    command: Sequence[str],
) -> int:
    """Run COMMAND on each host of an emulated network (namespaces; needs root on Linux), and cut cables on schedule.

    \b
    ringhold lab --hosts 4 --rate 400mbit -- python examples/partition.py
    ringhold lab --topology two-sites --cut hub-hub2@5s..12s -- python examples/partition.py
    ringhold lab --topology mesh --cut 2-3@10s..20s --cut 1@30s -- python examples/partition.py
    ringhold lab --topology mesh --random-cuts 600 --seed 1 -- python examples/partition.py 600

    Topologies: star (one switch, "hub"), ring and mesh (cables between hosts), two-sites (the halves behind a switch
    each, "hub" and "hub2"). A cut is silent: packets are lost, and nobody looks for another way. Its seconds count from
    the first epoch, without a coordinator from the start of the commands. --random-cuts draws cables, instants and
    lengths (0.2 to 10 s) by the seed.

    Each command finds RINGHOLD_COORDINATOR, RINGHOLD_TOKEN and RINGHOLD_LISTEN as `Communicator.join` needs them, and
    RINGHOLD_LAB_HOST (its number) and RINGHOLD_LAB_HOSTS. The coordinator waits for one member of each host. Ends with
    the first code other than 0 of a host, 124 after --timeout.
    """
    if command[0].startswith("-"):
        raise UsageError(f"there is no option {command[0]!r}; put -- before the command (see: ringhold lab --help)")
    network = Network(hosts, None if rate is None else parse_rate(rate), shape=topology)
    planned = [parse_cut(text, network) for text in cuts]
    if random_cuts is not None:
        planned += draw_cuts(network.shape, random_cuts, seed)
    if between is not None and topology != "two-sites":
        raise UsageError("--between is the rate of the cable between two sites; it needs --topology two-sites")
    far = None if between is None else parse_rate(between)
    place = _place(coordinator, network)
    with console.terminated(), network, own_folder("lab") as folder:
        if far is not None:
            network.limit_cable(network.shape.between("hub", "hub2"), far)
        lab = _Lab(network, planned, sys.stderr if as_json else sys.stdout)
        try:
            environ = _environment(network, place)
            if place != "none":
                lab.start_coordinator(place, environ, folder, hosts)
            for host in range(hosts):
                lab.start(host, command, environ)
            codes = lab.run(timeout)
        finally:
            lab.end()
        traffic = [network.traffic(host) for host in range(hosts)]
    if as_json:
        rows = [
            {"host": host, "code": code, "sent": traffic[host].sent, "received": traffic[host].received}
            for host, code in enumerate(codes)
        ]
        print(json.dumps({"hosts": rows, "cuts": lab.done, "seconds": round(lab.seconds, 2)}))
    return next((code for code in codes if code), 0)


class _Lab:
    """The commands that run, and what they print: line by line, with the host's number before it."""

    def __init__(self, network: Network, cuts: Sequence[Cut], output: IO[str]) -> None:
        self.done: list[dict[str, Any]] = []
        """What was cut and healed, with the seconds."""
        self._network, self._output = network, output
        self._switches = Switches(network)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._selector = selectors.DefaultSelector()
        self._rests: dict[int, bytes] = {}
        self._began = self._zero = time.monotonic()
        self._log: Path | None = None
        schedule = [(cut.begin, cut, False) for cut in cuts]
        schedule += [(cut.end, cut, True) for cut in cuts if cut.end is not None]
        self._schedule = sorted(schedule, key=lambda item: item[0])

    @property
    def seconds(self) -> float:
        """Since the first epoch, or since the commands were started where there is no coordinator."""
        return time.monotonic() - self._zero

    def start_coordinator(self, place: str, environ: Mapping[str, str], folder: Path, founders: int) -> None:
        """Start the coordinator on a host or on the hub, and wait until it listens."""
        words = ["--listen", environ["RINGHOLD_COORDINATOR"], "--journal", str(folder / "journal"), "--new"]
        command = [sys.executable, "-m", "launch.coordinator", *words, "--founders", str(founders)]
        host = None if place == "hub" else int(place)
        self._log = folder / "coordinator.log"
        with self._log.open("wb") as log:
            self._coordinator = self._popen(host, command, environ, stdout=subprocess.PIPE, stderr=log)
        assert self._coordinator.stdout is not None
        if not self._coordinator.stdout.readline():
            said = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise RingholdError(f"the coordinator on {place} did not start: {said}")

    def start(self, host: int, command: Sequence[str], environ: Mapping[str, str]) -> None:
        """Start the command of a host."""
        address = self._network.address(host)
        mine = {**environ, "RINGHOLD_LISTEN": address, "RINGHOLD_LAB_HOST": str(host)}
        try:
            process = self._popen(host, command, mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise UsageError(f"cannot run {command[0]!r}: {error.strerror}") from None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, host)
        self._processes[host], self._rests[host] = process, b""

    def run(self, timeout: float | None) -> list[int]:
        """Pass on what is printed and cut cables until all commands have ended; return their codes.

        Raises:
            OperationTimeout: they have not within `timeout` seconds.

        """
        self._began = self._zero = time.monotonic()
        founded = False
        while self._selector.get_map():
            if not founded and self._founded():
                founded, self._zero = True, time.monotonic()
            while founded and self._schedule and self._schedule[0][0] <= self.seconds:
                self._switch(*self._schedule.pop(0))
            if timeout is not None and time.monotonic() - self._began > timeout:
                raise OperationTimeout(f"the commands did not end within {timeout:g} s (--timeout)")
            for key, _ in self._selector.select(0.05):
                self._read(key.data, key.fileobj)
        return [_code(self._processes[host].wait()) for host in sorted(self._processes)]

    def _founded(self) -> bool:
        """Whether the coordinator, if there is one, has formed an epoch."""
        return self._log is None or b": epoch 1: " in self._log.read_bytes()

    def end(self) -> None:
        """End what still runs."""
        there = [*self._processes.values(), *([self._coordinator] if self._coordinator is not None else [])]
        for process in there:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in there:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._selector.close()

    def _switch(self, _due: float, cut: Cut, on: bool) -> None:
        (self._switches.heal if on else self._switches.cut)(cut)
        what = "healed" if on else "cut"
        self.done.append({"what": what, "cable": str(cut), "at": round(self.seconds, 2)})
        self._print(f"{self.seconds:.1f} s: {what} {cut}")

    def _read(self, host: int, pipe: Any) -> None:
        data = pipe.read()
        if data is None:
            return
        *lines, rest = (self._rests[host] + data).split(b"\n")
        self._rests[host] = rest
        if not data:
            self._selector.unregister(pipe)
            lines += [rest] if rest else []
        for line in lines:
            self._print(f"host {host} | {line.decode(errors='replace')}")

    def _print(self, line: str) -> None:
        print(line, file=self._output, flush=True)

    def _popen(
        self, host: int | None, command: Sequence[str], environ: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program in a namespace; it dies with this process."""
        enter = partial(_enter, self._network, host, os.getpid())
        return subprocess.Popen(
            command,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process, which ends the rest
            preexec_fn=enter,  # noqa: PLW1509 - this process has one thread
            **options,
        )


def parse_rate(text: str) -> float:
    """Read a rate as tc writes it, such as 400mbit; returns bytes a second.

    Raises:
        UsageError: it is none.

    """
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no rate; write 400mbit, 1gbit or 64kbit (bits a second)")
    return float(found[1]) * _UNITS[found[2].lower()]


def _place(text: str, network: Network) -> str:
    if text == "hub":
        network.hub_address  # noqa: B018 - which raises where there is no hub
    elif text != "none" and not (text.isdecimal() and int(text) < network.size):
        raise UsageError(f'--coordinator {text!r}: a host from 0 to {network.size - 1}, "hub" or "none"')
    return text


def _environment(network: Network, place: str) -> dict[str, str]:
    environ = {
        "RINGHOLD_LAB_HOSTS": str(network.size),
        "RINGHOLD_TOKEN": os.environ.get("RINGHOLD_TOKEN") or secrets.token_urlsafe(32),
        "PYTHONUNBUFFERED": "1",
    }
    if place != "none":
        address = network.hub_address if place == "hub" else network.address(int(place))
        environ["RINGHOLD_COORDINATOR"] = f"{address}:{PORT}"
    return environ


def _enter(network: Network, host: int | None, parent: int) -> None:
    die_with_parent(parent)
    network.enter(host)


def _code(status: int) -> int:
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(console.run(command))
