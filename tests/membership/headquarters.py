"""The simulated coordinator process: its machine, its disk, and the connections that lead to it.

The disk keeps every record of a `Persist` that was reached; a crash strikes between any two actions.
"""

from typing import TYPE_CHECKING, cast

from collectives.membership.coordinator import Action, Close, Coordinator, Persist, Send, Stop
from collectives.membership.protocol import (
    VERSION,
    Admit,
    Alive,
    Beat,
    Decision,
    Differs,
    FromCoordinator,
    FromPeer,
    Inspect,
    Join,
    LinkDown,
    Opened,
    Prepare,
    Record,
    Refused,
    Report,
    Stalled,
    Status,
    Waiting,
    decode_from_coordinator,
    decode_from_peer,
    encode,
)
from tests.membership.process import Process

if TYPE_CHECKING:
    from tests.membership.host import Host
    from tests.membership.world import World

TICK = 0.5
LATE = 1.0
REPEATED = (Report, Admit, LinkDown, Differs, Stalled, Prepare, Decision, Waiting)
"""What may come again and late. What opens or ends a connection cannot, nor a heartbeat: the channel keeps order."""
END = None
"""What arrives where a connection was closed."""


class Link:
    """One connection of a host to the coordinator. FIFO in each direction."""

    __slots__ = ("down_at", "host", "lost", "number", "open", "up_at")

    def __init__(self, number: int, host: "Host", now: float) -> None:
        self.number, self.host = number, host
        self.lost = False
        self.open = True
        """As the coordinator sees it."""
        self.up_at = self.down_at = now


class Headquarters:
    """The coordinator and the control network."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self._armed = world.armed
        self._repeats = world.history.repeats
        self.journal: list[Record] = [Opened("run", VERSION)]
        self.coordinator: Coordinator | None = None
        self.incarnation = 0
        self.process = Process()
        """This incarnation of it."""
        self.away = 0.0
        """Seconds that it was dead or stopped, all in all."""
        self._newest: list[Record] = []
        """The whole journal, while the coordinator runs on an old one."""
        self._links: dict[int, Link] = {}
        self._last_link = 0
        self._start()

    # --- life and death ---

    def _start(self) -> None:
        world = self.world
        self.incarnation += 1
        self.process = Process()
        nonces = world.rng
        self.coordinator = Coordinator(
            "run",
            world.history.options,
            tuple(self.journal),
            world.now,
            lambda secret: secret[::-1],
            lambda: nonces.getrandbits(128).to_bytes(16, "big"),
        )
        if self.incarnation > 1:
            world.say(f"coordinator starts again, highest {self.coordinator.highest}")
            world.judge.restarted(self.journal[-1])
        world.after(TICK, self.process, self._tick)

    def crash(self, seconds: float) -> None:
        """Die, and start again after a while from what is on disk."""
        if self.coordinator is None:
            return
        world = self.world
        self.away += seconds
        self.coordinator = None
        self.process.dead, self.process.stopped = True, False
        for link in self._links.values():
            link.open = False
            if world.rng.random() < 0.5:
                link.lost = True
                world.after(world.lag(world.history.control_delay), link.host, link.host.closed, link)
            else:
                self._down(link, END)
        self._links.clear()
        world.after(seconds, world.network, self._start)

    def lose_the_end(self) -> None:
        """Start again on a journal that lacks its last decision, if a member that knows of it will say so.

        Not if there was nobody before: then peers found a run again before it can.
        """
        rows = [(number, record) for number, record in enumerate(self.journal) if isinstance(record, Decision)]
        if self.coordinator is not None and len(rows) > 1 and rows[-2][1].members and rows[-1][1].members:
            self._newest = self.journal
            self.journal = self.journal[: rows[-1][0]][:-1]
            self.crash(0.1)

    @property
    def stopped(self) -> bool:
        """Whether it gets no time."""
        return self.process.stopped

    @property
    def outdated(self) -> bool:
        """Whether it runs on an old journal, and nobody has told it."""
        return bool(self._newest)

    def stranger(self, kind: int, host: "Host") -> None:
        """Say what nobody of this run says at this point: it must change nothing but that the connection ends."""
        if self.coordinator is None or self.stopped:
            return
        self._last_link += 1
        number, core = self._last_link, self.coordinator
        messages: tuple[FromPeer, ...] = (Inspect(), Beat([]), Join(bytes(16), "nowhere", 1, "pigeons"))
        before = (core.members, core.waiting, core.change, core.highest)
        if kind < len(messages):
            message = messages[kind]
            if isinstance(message, Join) and not before[0]:
                return  # whoever comes first may choose the transport
        elif host.link is None or all(peer.connection != host.link.number for peer in core.peers.values()):
            return  # nobody has said yet who is at that end
        else:
            number, host.suspect = host.link.number, True
            message = Join(bytes(16), "again", 1, "gloo") if kind == len(messages) else cast(FromPeer, Alive())
        actions = core.on_message(number, message, self.world.now)
        told = [type(action.message) for action in actions if isinstance(action, Send)]
        if told != ([Status] if kind == 0 else [Refused]) or before != (
            core.members,
            core.waiting,
            core.change,
            core.highest,
        ):
            self.world.judge.fail(f"a stranger who said {message} was told {told}")
        self.world.judge.count(f"stranger {type(message).__name__}")
        self.perform([action for action in actions if isinstance(action, Close)])

    def stop(self, seconds: float) -> None:
        """Get no time for a while."""
        if self.coordinator is not None and not self.stopped:
            self.process.stopped = True
            self.away += seconds
            self.world.after(seconds, self.world.network, self._wake, self.process)

    def _wake(self, process: Process) -> None:
        if not process.dead:
            self.world.say("coordinator wakes")
            # Which descriptor its loop looks at first is not told; each connection stays in order.
            process.wake(self._tick if self.world.rng.random() < 0.5 else None)

    # --- connections ---

    def reachable(self, host: "Host") -> bool:
        """Whether a connection can be made now."""
        now = self.world.now
        return (
            self.coordinator is not None
            and not self.stopped
            and now >= host.off_until
            and now >= self.world.faults.all_off_until
        )

    def connect(self, host: "Host") -> Link:
        """Open a connection, after the handshake."""
        self._last_link += 1
        link = Link(self._last_link, host, self.world.now)
        self._links[link.number] = link
        return link

    def up(self, link: Link, message: FromPeer | None) -> None:
        """Send from the host; END closes."""
        world = self.world
        time = world.now + world.lag(world.history.control_delay)
        time = link.up_at = max(link.up_at, time, link.host.off_until, world.faults.all_off_until)
        world.at(time, self.process, self._receive, link, message)
        if self._repeats and isinstance(message, REPEATED) and world.rng.random() < self._repeats:
            world.judge.count("came again")
            world.at(time + world.lag(LATE), self.process, self._receive, link, message)

    def _down(self, link: Link, message: FromCoordinator | None) -> None:
        world, host = self.world, link.host
        time = world.now + world.lag(world.history.control_delay)
        time = link.down_at = max(link.down_at, time, host.off_until, world.faults.all_off_until)
        world.at(time, host, host.receive, link, message)
        if self._repeats and isinstance(message, REPEATED) and world.rng.random() < self._repeats:
            world.judge.count("came again")
            world.at(time + world.lag(LATE), host, host.receive, link, message)

    def break_link(self, link: Link) -> None:
        """Lose what is in flight; both ends see the end, each in its time."""
        world = self.world
        if link.lost:
            return
        link.lost = True
        world.after(world.lag(world.history.control_delay), link.host, link.host.closed, link)
        world.after(4 * world.lag(world.history.control_delay), self.process, self._closed, link)

    def _receive(self, link: Link, message: FromPeer | None) -> None:
        if link.lost or not link.open:
            return
        assert self.coordinator is not None
        if message is END:
            self._closed(link)
            return
        assert message is not None
        if self.world.history.codec:
            message = decode_from_peer(encode(message))
        self.world.judge.saw(message)
        if "message" in self._armed:
            self.world.probe("message")
        if self.coordinator is not None:
            self.perform(self.coordinator.on_message(link.number, message, self.world.now))

    def _closed(self, link: Link) -> None:
        if link.open:
            assert self.coordinator is not None
            link.open = False
            del self._links[link.number]
            self.perform(self.coordinator.on_closed(link.number, self.world.now))

    def _tick(self) -> None:
        assert self.coordinator is not None
        self.world.after(TICK, self.process, self._tick)
        self.perform(self.coordinator.on_tick(self.world.now))

    # --- actions ---

    def perform(self, actions: list[Action]) -> None:
        """Do the actions in order; a crash or a stop may come before any of them."""
        if not actions:
            return
        process = self.process
        for number, action in enumerate(actions):
            if "action" in self._armed:
                self.world.probe("action")
            if process.dead:
                return
            if process.stopped:
                process.backlog.append((self.perform, (actions[number:],)))
                return
            self._do(action)

    def _do(self, action: Action) -> None:
        world = self.world
        match action:
            case Send(number, message):
                link = self._links.get(number)
                world.judge.sends(message, link.host if link is not None else None)
                if isinstance(message, (Prepare, Decision)):
                    world.probe("prepare" if isinstance(message, Prepare) else "announce")
                if link is not None and self.coordinator is not None:
                    self._down(link, self._coded(message) if world.history.codec else message)
            case Persist(record):
                world.probe("persist")
                if self.coordinator is None:
                    return
                self.journal.append(record)
                world.judge.persisted(record)
                world.probe("persisted")
            case Close(number):
                link = self._links.pop(number, None)
                if link is not None:
                    link.open = False
                    self._down(link, END)
            case Stop(reason) if self._newest:
                world.judge.count("stopped on an old journal")
                self.journal, self._newest = self._newest, []
                self.crash(0.5)
            case Stop(reason):
                world.judge.stopped(reason)

    def _coded(self, message: FromCoordinator) -> FromCoordinator:
        return decode_from_coordinator(encode(message))

    def replay(self, link: Link) -> None:
        """Announce an old decision once more, as a coordinator may that does not know what a member has seen."""
        old = [record for record in self.journal if isinstance(record, Decision)]
        if old:
            self._down(link, self.world.rng.choice(old))
