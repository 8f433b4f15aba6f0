"""A coordinator's state machine with everything around it in the test's hands: messages, clock, disk."""

from dataclasses import dataclass, field
from itertools import count

from collectives.membership.coordinator import Action, Close, Coordinator, Persist, Send, Stop
from collectives.membership.protocol import (
    VERSION,
    Beat,
    Decision,
    FromCoordinator,
    FromPeer,
    Join,
    LaneReport,
    LaneStatus,
    Opened,
    Prepare,
    Record,
    Report,
    Resume,
    Welcome,
)
from collectives.options import Options

HEARTBEAT = 1.0
SILENCE = 4.0


def secret_of(name: int) -> bytes:
    """A peer's secret; its nonce is this reversed."""
    return bytes([name]) * 8 + bytes(8)


def row(
    seq: int, phase: str = "waiting", waiting_for: int = 0, lane: str = "main", seconds: float = 60.0
) -> LaneStatus:
    """A lane in a heartbeat; what was decoded is equal to a constant of the program, and not the same object."""
    return LaneStatus(lane, seq, "all_reduce", "".join([*phase]), waiting_for, seconds)


def report_of(complete: int, staged: int = 0, epoch: int = 1, entered: int = 0, left: int = -1) -> LaneReport:
    """A lane in a report: complete and staged by the attempts of `epoch`."""
    entered = max(entered, complete, staged)
    return LaneReport(complete, epoch if complete else 0, staged, epoch if staged else 0, entered, max(left, complete))


@dataclass
class Desk:
    """A coordinator; `told` has what it sent, by connection, `disk` what it wrote."""

    founders: int = 2
    quorum: bool = False
    min_members: int = 1
    disk: list[Record] = field(default_factory=lambda: [Opened("run", VERSION)])
    now: float = 100.0

    def __post_init__(self) -> None:
        options = Options(
            heartbeat=HEARTBEAT,
            heartbeat_timeout=SILENCE,
            op_timeout=30.0,
            founders=self.founders,
            quorum=self.quorum,
            min_members=self.min_members,
        )
        nonces = count(1)
        self.core = Coordinator(
            "run",
            options,
            tuple(self.disk),
            self.now,
            lambda secret: secret[::-1],
            lambda: next(nonces).to_bytes(16, "big"),
        )
        self.told: dict[int, list[FromCoordinator]] = {}
        self.closed: list[int] = []
        self.stops: list[str] = []

    def restart(self) -> "Desk":
        """Another coordinator on the same disk."""
        return Desk(self.founders, self.quorum, self.min_members, list(self.disk), self.now + 1)

    def do(self, actions: list[Action]) -> list[FromCoordinator]:
        """Perform actions; returns what was sent."""
        sent: list[FromCoordinator] = []
        for action in actions:
            match action:
                case Persist(record):
                    self.disk.append(record)
                case Send(connection, message):
                    self.told.setdefault(connection, []).append(message)
                    sent.append(message)
                case Close(connection):
                    self.closed.append(connection)
                case Stop(reason):
                    self.stops.append(reason)
        return sent

    def say(self, connection: int, message: FromPeer) -> list[FromCoordinator]:
        """A peer says something; nobody hears it on a closed connection."""
        if connection in self.closed:
            return []
        return self.do(self.core.on_message(connection, message, self.now))

    def close(self, connection: int) -> list[FromCoordinator]:
        """A connection ends."""
        return self.do(self.core.on_closed(connection, self.now))

    def tick(self, seconds: float = 0.5) -> list[FromCoordinator]:
        """Time passes and the clock ticks."""
        self.now += seconds
        return self.do(self.core.on_tick(self.now))

    def wait(self, seconds: float, *beating: int) -> list[FromCoordinator]:
        """Time passes; these connections beat."""
        sent: list[FromCoordinator] = []
        for _ in range(round(seconds / 0.5)):
            for connection in beating:
                sent += self.say(connection, Beat([]))
            sent += self.tick()
        return sent

    def join(self, connection: int) -> int:
        """A peer joins; its secret is named by the connection. Returns its id."""
        welcome = self.say(connection, Join(secret_of(connection)[::-1], "127.0.0.1", connection, "gloo"))[0]
        assert isinstance(welcome, Welcome)
        return welcome.member

    def resume(self, connection: int, name: int, member: int, epoch: int, promised: int) -> list[FromCoordinator]:
        """The peer that joined on connection `name` resumes on another one."""
        return self.say(connection, Resume(member, secret_of(name), epoch, promised))

    def report(self, *connections: int, lanes: dict[int, LaneReport] | None = None) -> Decision | None:
        """These connections report for the change under way; returns the decision if there is one."""
        assert self.core.change is not None
        epoch = self.core.change.epoch
        decided: Decision | None = None
        for connection in connections:
            main = {"main": lanes[connection]} if lanes and connection in lanes else {}
            for message in self.say(connection, Report(epoch, main)):
                if isinstance(message, Decision):
                    decided = message
        return decided

    def found(self, *connections: int) -> Decision:
        """These peers join and form the first epoch."""
        for connection in connections:
            self.join(connection)
        decision = self.report(*connections)
        assert decision is not None
        return decision

    def preparing(self) -> Prepare | None:
        """The change under way, as it was announced."""
        change = self.core.change
        return Prepare(change.epoch, list(change.members)) if change else None


def ids(decision: Decision | None) -> list[int]:
    """Members of a decision."""
    assert decision is not None
    return [info.member for info in decision.members]
