"""A simulated process: a real `Member`, a session that does what `session.py` does, and threads that call operations.

Threads are generators: they yield where a real one would wait or may be preempted, and are resumed by `poke`.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

from collectives.errors import CoordinatorUnreachable, Evicted, RingholdError
from collectives.membership.member import Member
from collectives.membership.protocol import (
    Alive,
    Beat,
    Decision,
    Evict,
    FromCoordinator,
    FromPeer,
    Join,
    LaneStatus,
    Prepare,
    Refused,
    Resume,
    Waiting,
    Welcome,
)
from tests.membership.headquarters import END, Link
from tests.membership.history import COORDINATOR, HEARTBEAT, JOIN, PATIENCE, SILENCE
from tests.membership.mesh import Mesh
from tests.membership.process import Killed, Process
from tests.membership.program import Program

if TYPE_CHECKING:
    from tests.membership.world import World

LAST_REJOIN = 20.0
_ENDED = object()

Thread = Generator[None, None, None]


class Host(Process):
    """One process. `index` names it for faults; `core.member` is its id once it has one."""

    def __init__(self, world: "World", index: int) -> None:
        super().__init__()
        self.world, self.index = world, index
        self.name = f"host {index}"
        self.rng = world.rng
        self.core = Member()
        self.link: Link | None = None
        self.mesh: Mesh | None = None
        self.arrived = False
        self.finished = ""
        """How its program ended: "done", "left", "dead" or the name of the error; empty while it goes on."""
        self.suspect = False
        """Something went wrong with it, so that it may be evicted."""
        self.quits = False
        self.waiting = 0
        self.off_until = 0.0
        self.threads: list[Thread] = []
        self.program = Program(self)
        self._secret = world.rng.getrandbits(128).to_bytes(16, "big")
        self._poked = False
        self._since: dict[tuple[int, str, int], float] = {}
        self._silent = 0
        self._began = self._needed = 0.0
        self._pause = 0.05

    # --- the machine ---

    @property
    def idle(self) -> bool:
        """A member that waits for nothing."""
        return self.finished == "done" and not self.stopped

    def arrive(self) -> None:
        """Start the process."""
        self.arrived = True
        self._began = self.world.now
        self._connect()

    def die(self, silently: bool) -> None:
        """End here."""
        if self.dead:
            return
        world = self.world
        self.dead = True
        self.end("dead")
        if self.mesh is not None:
            self.mesh.close(self.core.member, silently)
        if self.link is not None:
            if silently:
                self.link.lost = True
            elif self.rng.random() < 0.5:
                world.headquarters.up(self.link, END)
            else:
                world.headquarters.break_link(self.link)
        if silently:
            self.off_until = 1e9

    def stop(self, seconds: float) -> None:
        """Get no time for a while."""
        if not self.stopped and not self.dead:
            self.stopped = True
            self.world.after(seconds, self.world.network, self._wake)

    def _wake(self) -> None:
        self.world.say(f"{self.name} wakes")
        # Its threads may run before its session reads, or after.
        self.wake(self._step if self.rng.random() < 0.5 else None)

    def probe(self, point: str) -> None:
        """Reach a point where a fault may strike. Raises `Killed`."""
        self.world.probe(point, self)
        if self.dead:
            raise Killed

    def poke(self) -> None:
        """Have the threads look again, soon."""
        if not self._poked:
            self._poked = True
            self.world.after(0.001, self, self._step)

    def sleep(self, seconds: float) -> Thread:
        """Let a thread sleep."""
        world = self.world
        until = world.now + seconds
        world.at(until, self, self.poke)
        while world.now < until:
            yield

    def _step(self) -> None:
        self._poked = False
        threads = self.threads
        for thread in threads[:]:
            if next(thread, _ENDED) is _ENDED:
                threads.remove(thread)
                self.poke()

    def end(self, how: str) -> None:
        """The program has ended."""
        if not self.finished:
            if self.core.epoch:
                self.world.active -= 1
            self.finished = how
            if self.world.history.rejoins and how in ("dead", "Evicted") and self.world.now < LAST_REJOIN:
                self.world.add_host(len(self.world.hosts), self.world.now + 0.5)
            self.world.say(f"{self.name} ends: {how}")
            self.world.judge.ended(self, how)

    def go_on(self) -> None:
        """Take up the program again, which has become longer."""
        self.finished = ""
        self.world.active += 1
        self.threads.append(self.program.main(1.0))
        self.poke()

    def describe(self) -> str:
        """Say what it is doing."""
        core = self.core
        lanes = {name: (lane.entered, lane.complete, lane.phase) for name, lane in core.lanes.items()}
        state = self.finished or ("stopped" if self.stopped else "under way")
        return (
            f"{self.name} (member {core.member}) {state}, epoch {core.epoch} promised {core.promised} "
            f"admitting {core.admitting} {lanes} outstanding {list(core.outstanding)}"
        )

    # --- the session: as session.py ---

    def _connect(self) -> None:
        world = self.world
        if self.core.error is not None or self.finished in ("left", "dead"):
            return
        if world.headquarters.reachable(self):
            world.after(world.lag(world.history.control_delay), self, self._connected)
        else:
            self._again()

    def _connected(self) -> None:
        headquarters, core = self.world.headquarters, self.core
        if not headquarters.reachable(self):
            self._again()
            return
        self._pause, self._needed = 0.05, 0.0
        link = self.link = headquarters.connect(self)
        if core.promised:
            self._send([Resume(core.member, self._secret, core.epoch, core.promised), *core.outstanding.values()])
            self.world.judge.count("resumed")
            self.probe("resumed")
        else:
            self._send([Join(self._secret[::-1], f"host{self.index}", 1, "gloo")])
        if self.world.history.replay and core.epoch:
            headquarters.replay(link)
        self._silent = 0
        self._beat(link)

    def _again(self) -> None:
        """Give up if it is late, else connect again after a pause."""
        core, now = self.core, self.world.now
        if core.error is not None:
            return
        self._stalled(self._statuses())
        self._needed = (self._needed or now) if core.needs_coordinator else 0.0
        if (core.epoch == 0 and now - self._began > JOIN) or (self._needed and now - self._needed > COORDINATOR):
            self.world.judge.count("departed without the coordinator")
            core.fail(CoordinatorUnreachable("away for too long"))
            self._abort()
            self.poke()
            if core.epoch == 0:
                self.end("CoordinatorUnreachable")
            return
        self.world.after(self._pause, self, self._connect)
        self._pause = min(2 * self._pause, 0.5)

    def closed(self, link: Link) -> None:
        """The connection ended."""
        if link is self.link:
            self.link = None
            self._again()

    def drop(self) -> None:
        """Close the connection."""
        link, self.link = self.link, None
        if link is not None:
            self.world.headquarters.up(link, END)

    def _beat(self, link: Link) -> None:
        if link is not self.link:
            return
        if self._silent * HEARTBEAT > SILENCE:
            self.world.judge.count("coordinator silent")
            self.drop()
            self._again()
            return
        statuses = self._statuses()
        self._send([Beat(statuses)])
        self._send(self._stalled(statuses))
        self._silent += 1
        self.world.after(HEARTBEAT, self, self._beat, link)

    def _statuses(self) -> list[LaneStatus]:
        now, epoch, before = self.world.now, self.core.epoch, self._since
        self._since = {}
        statuses: list[LaneStatus] = []
        for row in self.core.statuses():
            key = (epoch, row.lane, row.seq)
            since = self._since[key] = before.get(key, now)
            statuses.append(LaneStatus(row.lane, row.seq, row.kind, row.phase, row.waiting_for, now - since, row.group))
        return statuses

    def _stalled(self, statuses: list[LaneStatus]) -> list[FromPeer]:
        late = [row for row in statuses if row.phase != "idle" and row.seconds > PATIENCE]
        return [message for row in late for message in self.core.stalled(row.lane, row.seq)]

    def post(self, messages: list[FromPeer]) -> None:
        """Send from a thread: now, or when the session gets to it."""
        if messages:
            if self.rng.random() < 0.7:
                self._send(messages)
            else:
                self.world.after(0.01, self, self._send, messages)

    def _send(self, messages: list[FromPeer]) -> None:
        link = self.link
        if link is not None:
            for message in messages:
                self.world.headquarters.up(link, message)

    def receive(self, link: Link, message: FromCoordinator | None) -> None:
        """Handle what arrives on a connection."""
        if link is not self.link or link.lost:
            return
        self._silent = 0
        match message:
            case None:
                self.closed(link)
            case Alive():
                pass
            case Prepare():
                self._prepare(message)
            case Decision():
                self._decide(message)
            case Waiting(count):
                self.waiting = count
            case Welcome(member):
                self.core.member = member
                self.world.say(f"{self.name} is member {member}")
            case Evict():
                self._evicted(message)
            case Refused(reason):
                self.world.judge.fail(f"{self.name} was refused: {reason}")
            case _:
                self.world.judge.fail(f"{self.name} received {message}")

    def _prepare(self, message: Prepare) -> None:
        self.probe("prepared")
        report = self.core.on_prepare(message)
        self.poke()
        if not report:
            return
        self.world.judge.promised(self, message.epoch, report[0])
        if self.rng.random() < 0.3:
            self._step()  # its threads run before the transport is aborted
        self._abort()
        self._send(report)
        self.probe("reported")

    def _abort(self) -> None:
        if self.mesh is not None:
            self.mesh.close(self.core.member)

    def _decide(self, decision: Decision) -> None:
        core = self.core
        before = core.epoch
        if not core.on_decision(decision):
            self.world.judge.count("decision ignored")
            return
        self.world.judge.applied(self, decision, before)
        self.waiting = 0
        again = list(core.outstanding.values())
        self.poke()
        if self.rng.random() < 0.3:
            self._step()
        self._abort()
        meshes = self.world.meshes
        if decision.epoch not in meshes:
            ids = tuple(info.member for info in decision.members)
            meshes[decision.epoch] = Mesh(self.world, decision.epoch, ids)
        self.mesh = meshes[decision.epoch]
        self.mesh.arrive(self)
        self._send(again)
        if before == 0:
            self.world.active += 1
            self.threads.append(self.program.main())
        self.probe("decided")

    def _evicted(self, message: Evict) -> None:
        core = self.core
        self.world.judge.evicted(self, message)
        if core.epoch == 0 and message.kind == "evicted":
            self.core = Member()
            self.drop()
            self._again()
            return
        core.on_evict(message)
        self._abort()
        self.drop()
        self.poke()
        if core.epoch == 0:
            self.end(type(core.error).__name__)

    def link_failed(self, epoch: int, peer: int) -> None:
        """The transport of an epoch could not be built."""
        self._send(self.core.link_down(epoch, peer))

    def give_up(self) -> None:
        """As `Session.depart`: somebody gave up inside an operation."""
        if self.core.error is None:
            self.world.judge.count("gave up inside an operation")
            self.post(self.core.leave("interrupted"))
            self.core.fail(Evicted("departed by itself"))
            self._abort()
            self.poke()

    def depart(self, error: RingholdError) -> None:
        """The program ended with an error that means that this member is out of the run."""
        self.end("left" if self.core.left else type(error).__name__)
