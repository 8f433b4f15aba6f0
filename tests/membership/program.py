"""What the threads of a simulated process do: they call the operations of the history's program, as a user would."""

from typing import TYPE_CHECKING

from collectives.errors import DescriptorMismatch, RingholdError, UsageError
from collectives.membership.claims import lane_of
from collectives.membership.member import MAIN
from tests.membership.history import PATIENCE, Spec, Team
from tests.membership.runner import Call, Quit, Runner, Steps

if TYPE_CHECKING:
    from tests.membership.host import Host

SIDE = "side"


class Program:
    """The threads of one host."""

    def __init__(self, host: "Host") -> None:
        self.host = host
        self.history = host.world.history
        self.judge = host.world.judge
        self._runner = Runner(host)
        self._running: set[str] = set()
        """Lanes that another thread is busy with."""
        self._teams: dict[str, Team] = {}
        """By the names of their lanes, the sub-groups that this member is in."""
        self._opened = False

    @property
    def ended(self) -> bool:
        """Whether this member has called all of the program."""
        return self.host.core.lane(MAIN).entered == len(self.history.program)

    # --- threads ---

    def main(self, pause: float = 0.0) -> Steps:
        """The main thread: after a pause, every operation of the program from where the lane stands."""
        host, specs = self.host, self.history.program
        lane = host.core.lane(MAIN)
        issued: tuple[int, tuple[int, ...]] | None = None
        if not self._opened:
            self._opened = True
            self._open_teams()
        yield from self._pause(pause)
        try:
            while lane.entered < len(specs):
                seq = lane.entered + 1
                spec = specs[seq - 1]
                yield from self._pause(self.history.think)
                deviation = self.history.deviations.get((host.index, seq), "")
                if deviation in ("absent", "late", "leave"):
                    yield from self._stay_away(deviation)
                yield from self._side_lane(spec, before_cross=spec.cross)
                for name, team in self._teams.items():
                    yield from self._beside(name, team.kinds, team.until[seq - 1], spec.kind == "admit")
                if issued is None or not spec.batch:
                    issued = self._view(MAIN)
                if spec.kind == "admit":
                    yield from self._admit(issued)
                    issued = None
                    continue
                call = self._call(spec.kind, spec.on_loss, MAIN, issued)
                if deviation == "other":
                    call.kind = "barrier" if call.kind == "all_reduce" else "all_reduce"
                    self.judge.deviates = True
                halted = False
                if spec.cross and deviation != "swap":
                    yield from self._crossing(spec)
                if (yield from self._runner.run(call)) == "MemberLost" and spec.on_loss == "raise":
                    halted = True
                if spec.cross and deviation == "swap":
                    yield from self._crossing(spec)
                if halted:
                    issued = None
            while self._running:
                yield
            yield from self._leave_at_the_end()
        except RingholdError as error:
            host.depart(error)
        except Quit:
            host.give_up()
            yield from self._await_error()

    def _leave_at_the_end(self) -> Steps:
        host = self.host
        if self.history.leaves:
            yield from self._leave("at the end")
            return
        host.end("done")

    def _leave(self, why: str) -> Steps:
        """As `Communicator.leave`: the coordinator has a little time to say goodbye."""
        host, world = self.host, self.host.world
        host.suspect = True
        host.post(host.core.leave(why))
        until = world.now + 2.0
        world.at(until, host, host.poke)
        while host.core.error is None and world.now < until:
            yield
        if host.core.error is None:
            self.judge.count("left without an answer")
            host.core.fail(UsageError("closed"))
            host.drop()
            host.end("left")
            return
        host.depart(host.core.error)

    def _await_error(self) -> Steps:
        """Wait until this member is out of the run."""
        while self.host.core.error is None:
            yield
        self.host.depart(self.host.core.error)

    def _stay_away(self, deviation: str) -> Steps:
        """Do something else instead of the next operation."""
        host = self.host
        self.history.deviations.pop((host.index, host.core.lane(MAIN).entered + 1))
        if deviation == "late":
            yield from host.sleep(PATIENCE * 0.6)
            return
        if deviation == "leave":
            self.judge.count("left between operations")
            yield from self._leave("no more")
            raise host.core.error or AssertionError
        host.suspect = True
        host.world.after(5 * PATIENCE, host, self._give_way)
        while host.core.error is None:
            yield
        raise host.core.error

    def _give_way(self) -> None:
        """Nobody missed this absent one."""
        if self.host.core.error is None:
            self.host.end("done")

    def _side_lane(self, spec: Spec, before_cross: bool) -> Steps:
        """Have the side lane where the main lane's next operation wants it."""
        waits = spec.kind == "admit" or before_cross
        yield from self._beside(SIDE, self.history.side, spec.side_until - before_cross, waits)

    def _beside(self, name: str, kinds: list[str], until: int, waits: bool) -> Steps:
        """Have another lane's operations up to a number under way in a thread, or complete."""
        lane = self.host.core.lane(name)
        while name in self._running and (waits or lane.entered < until):
            yield
        if lane.entered < until:
            self._running.add(name)
            self.host.threads.append(self._work(name, kinds, until))
            self.host.poke()
            while waits and name in self._running:
                yield

    def _work(self, name: str, kinds: list[str], until: int) -> Steps:
        core = self.host.core
        lane = core.lane(name)
        try:
            while lane.entered < until and name not in core.refused:
                yield from self._runner.run(self._call(kinds[lane.entered], "retry", name, self._view(name)))
            if name in core.refused:
                try:
                    core.enter(name, kinds[-1])
                except DescriptorMismatch as error:
                    self.judge.raised(self.host, name, lane.entered + 1, error)
                else:
                    self.judge.fail(f"{self.host.name} enters {name}, which was refused")
        except RingholdError:
            pass  # the main thread sees it too
        except Quit:
            self.host.give_up()
        self._running.discard(name)

    def _open_teams(self) -> None:
        """As `Communicator.group`, for each sub-group that a founder is in."""
        core = self.host.core
        assert core.decision is not None
        if not any(info.founder for info in core.decision.members if info.member == core.member):
            return
        for team in self.history.teams:
            if max(team.ranks) >= len(core.members):
                continue
            members = tuple(core.members[rank] for rank in team.ranks)
            if core.member not in members:
                continue
            if team.misnamed >= 0 and core.members[team.misnamed] == core.member:
                self.judge.deviates = True
                members = members[::-1]
            name = lane_of(team.name, members, MAIN)
            core.lane(name, members)
            self.judge.groups[name] = members
            self._teams[name] = team

    def _crossing(self, spec: Spec) -> Steps:
        kind = self.history.side[spec.side_until - 1]
        if self.host.core.lane(SIDE).entered < spec.side_until:
            yield from self._runner.run(self._call(kind, "retry", SIDE, self._view(SIDE)))

    def _admit(self, issued: tuple[int, tuple[int, ...]]) -> Steps:
        """As `Communicator.admit`."""
        host = self.host
        call = self._call("all_reduce", "retry", MAIN, issued)
        call.bit = host.waiting > 0
        outcome = yield from self._runner.run(call)
        if outcome != "waiting":
            return
        core = host.core
        if core.error is None:
            host.post(core.admit())
            self.judge.count("stood at a safe point")
            yield from self._runner.point("admitting")
        while core.admitting and core.error is None:
            yield
        if core.error is not None:
            raise core.error
        self.judge.admitted(host)

    # --- small things ---

    def _view(self, lane: str) -> tuple[int, tuple[int, ...]]:
        core = self.host.core
        epoch = core.lane(lane).view
        return epoch, core.members_of(lane, epoch)

    def _call(self, kind: str, on_loss: str, lane: str, view: tuple[int, tuple[int, ...]]) -> Call:
        root = min(view[1]) if kind == "broadcast" else 0
        return Call(kind, on_loss, lane, *view, root)

    def _pause(self, seconds: float) -> Steps:
        if seconds:
            yield from self.host.sleep(self.host.world.lag(seconds))
