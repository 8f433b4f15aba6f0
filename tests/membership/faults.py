"""What can go wrong in a simulated run. Each method of `Faults` is one kind of fault, named by `history.Fault.what`."""

from typing import TYPE_CHECKING

from tests.membership.history import Fault

if TYPE_CHECKING:
    from tests.membership.host import Host
    from tests.membership.world import World


class Faults:
    """Strikes, and remembers what is broken."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self._cut: set[frozenset[int]] = set()
        self.silent_pairs: set[frozenset[int]] = set()
        self.all_off_until = 0.0

    # --- hosts ---

    def crash(self, fault: Fault, host: "Host") -> None:
        """A process ends; its kernel closes its connections."""
        host.die(silently=False)

    def vanish(self, fault: Fault, host: "Host") -> None:
        """A machine is gone; nobody is told."""
        host.die(silently=True)

    def stop(self, fault: Fault, host: "Host") -> None:
        """A process gets no time for a while (SIGSTOP)."""
        host.suspect = True
        host.stop(fault.seconds)

    def quit(self, fault: Fault, host: "Host") -> None:
        """Somebody interrupts a process inside an operation (rule R4)."""
        host.suspect = True
        host.quits = True
        host.poke()

    # --- the control network ---

    def break_link(self, fault: Fault, host: "Host") -> None:
        """The connection to the coordinator breaks; what is in flight is lost."""
        host.suspect = True
        if host.link is not None:
            self.world.headquarters.break_link(host.link)

    def cut_off(self, fault: Fault, host: "Host") -> None:
        """No packet passes between a host and the coordinator for a while; its peers still reach it."""
        host.suspect = True
        host.off_until = self.world.now + fault.seconds

    def cut_all_off(self, fault: Fault, host: "Host") -> None:
        """No packet passes between the coordinator and anybody for a while."""
        self.all_off_until = self.world.now + fault.seconds

    def isolate(self, fault: Fault, host: "Host") -> None:
        """A machine's cable is pulled, for good: no packet reaches anybody, and nobody is told."""
        host.suspect = True
        host.off_until = 1e9
        for other in self.world.hosts:
            if other is not host:
                pair = frozenset((host.index, other.index))
                self._cut.add(pair)
                self.silent_pairs.add(pair)

    def partition(self, fault: Fault, host: "Host") -> None:
        """The first hosts, up to number `other`, reach nobody but each other for a while."""
        world = self.world
        inside = [host for host in world.hosts if host.index <= fault.other]
        outside = [host for host in world.hosts if host.index > fault.other]
        pairs = {frozenset((one.index, other.index)) for one in inside for other in outside}
        for member in world.hosts:
            member.suspect = True
        for member in inside:
            member.off_until = world.now + fault.seconds
        self._cut |= pairs
        self.silent_pairs |= pairs
        world.after(fault.seconds, world.network, self._heal, pairs)

    def _heal(self, pairs: set[frozenset[int]]) -> None:
        self._cut -= pairs
        self.silent_pairs -= pairs

    def stranger(self, fault: Fault, host: "Host") -> None:
        """Somebody who does not belong here talks to the coordinator, or a host says what makes no sense."""
        self.world.headquarters.stranger(fault.other, host)

    # --- the coordinator ---

    def old_journal(self, fault: Fault, host: "Host") -> None:
        """The coordinator is started on a copy of its journal that lacks the end; somebody sees to it when it stops."""
        self.world.headquarters.lose_the_end()

    def crash_coordinator(self, fault: Fault, host: "Host") -> None:
        """The coordinator's process ends here and is started again later."""
        self.world.headquarters.crash(fault.seconds)

    def stop_coordinator(self, fault: Fault, host: "Host") -> None:
        """The coordinator gets no time for a while."""
        self.world.headquarters.stop(fault.seconds)

    # --- the data network ---

    def _pair(self, fault: Fault) -> tuple["Host", "Host"]:
        hosts = self.world.hosts
        return hosts[fault.where], hosts[fault.other]

    def cut_once(self, fault: Fault, host: "Host") -> None:
        """The link between two hosts fails, once."""
        one, other = self._pair(fault)
        one.suspect = other.suspect = True
        mesh = one.mesh
        if mesh is not None and mesh is other.mesh:
            mesh.fail(one.core.member, other.core.member)
            world = self.world
            world.after(world.lag(world.history.delay), world.network, mesh.fail, other.core.member, one.core.member)

    def cut_cable(self, fault: Fault, host: "Host") -> None:
        """The link between two hosts fails and cannot be made again."""
        if fault.where != fault.other:
            self._cut.add(frozenset((fault.where, fault.other)))
            self.cut_once(fault, host)

    def cut_silently(self, fault: Fault, host: "Host") -> None:
        """What two hosts send to each other is lost from now on, without a sound."""
        if fault.where != fault.other:
            one, other = self._pair(fault)
            one.suspect = other.suspect = True
            pair = frozenset((fault.where, fault.other))
            self._cut.add(pair)
            self.silent_pairs.add(pair)

    def cables_of(self, hosts: dict[int, "Host"]) -> dict[int, list[int]]:
        """Which of these members, given by id, cannot link with which."""
        bad: dict[int, list[int]] = {}
        if self._cut:
            for me, host in hosts.items():
                others = [m for m, other in hosts.items() if frozenset((host.index, other.index)) in self._cut]
                if others:
                    bad[me] = others
        return bad

    def silent(self, one: "Host", other: "Host") -> bool:
        """Whether what one sends to the other is lost."""
        return frozenset((one.index, other.index)) in self.silent_pairs
