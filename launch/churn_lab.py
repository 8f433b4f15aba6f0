"""The churn lab: strikes members and coordinator of a real run by a plan, and has everything judged.

`launch.churn` makes one and runs it. One loop in one thread: it takes what the peers report, does what is due, and
looks whether everybody moves.
"""

import heapq
import itertools
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

from collectives import faults
from launch.churn_audit import Audit
from launch.churn_peer import PHASES, Word, live
from launch.churn_plan import Blow, Kind
from launch.churn_run import Failed, Guest, Hang, Request
from launch.churn_strike import Strike
from launch.crew import Crew, Message, Peer
from launch.network import Network
from launch.record import Observer, entry

HANG_SECONDS = 30.0
"""The bound: everybody who is not struck does something within it, and gets over a loss."""
_AIM_SECONDS = 3.0
"""A victim that has not come to the point where it is aimed at by then is struck where it is."""
_LONGEST_ABSENCE = 3.0
_REFILL = 0.7
"""Part of the losses that are made good at once."""
_SLOW = (0.1, 0.45)
"""A slow spell lasts for such a part of the heartbeat timeout: nobody may be evicted for it."""


class Lab:
    """One run. `observe` is told of everything that happens, as log entries."""

    def __init__(self, crew: Crew, request: Request, network: Network | None, observe: Observer) -> None:
        self.audit = Audit()
        self.planned: Counter[Kind] = Counter()
        self.fired: Counter[Kind] = Counter()
        self.aimed: Counter[str] = Counter()
        """Strikes that landed at the point they were aimed at, by phase."""
        self.hangs: list[str] = []
        self._crew, self._request, self._network, self._observe = crew, request, network, observe
        self._guests: dict[int, Guest] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        self._late: deque[Blow] = deque()
        self._absent: Strike | None = None
        self._coordinator_down = False
        self._rated, self._done = time.monotonic(), 0
        self._ending = False

    def run(self) -> None:
        """Run to the end of the time, or to the first failure; then let everybody leave.

        Raises:
            Hang, Failed: the run could not go on.

        """
        for _ in range(self._request.least):
            self._start()
        self._until(self._all_work, "the founders did not begin")
        end = time.monotonic() + self._request.seconds
        for index in itertools.count():
            blow = self._request.plan.blow(index)
            self._pump(blow.pause, end)
            if time.monotonic() >= end or self.audit.wrong:
                break
            self._strike(blow)
        self._ending = True
        self._until(self._quiet, "the run did not come to rest")
        for guest in self._guests.values():
            guest.peer.words[Word.LEAVE] = 1
        self._until(lambda: not self._guests, "members did not leave")
        self.audit.close()

    # --- striking ---

    def _strike(self, blow: Blow) -> None:
        """Carry a blow out, or as much of it as can be done now."""
        self._late.append(blow)
        for _ in range(len(self._late)):
            blow = self._late.popleft()
            if not self._carry_out(blow):
                self._late.append(blow)

    def _carry_out(self, blow: Blow) -> bool:
        """False: there is nobody whom it could strike now."""
        match blow.kind:
            case "join":
                if len(self._guests) >= self._request.most:
                    return False
                self._note("fault", fault=blow.index, what="join", peer="", aim="")
                self._start(planned=True)
            case "coordinator":
                if self._coordinator_down:
                    return False
                self._plan(blow, None)
                self._strike_coordinator(blow)
            case "kill" | "stop" if blow.phase == "join":
                if len(self._guests) >= self._request.most:
                    return False
                self._plan(blow, None)
                newcomer = self._start()
                self._after(blow.length * self._crew.join_seconds, partial(self._strike_newcomer, blow, newcomer))
            case _:
                victim = self._victim(blow)
                if victim is None:
                    return False
                if blow.phase in ("sync", "giver", "admit") and len(self._guests) < self._request.most:
                    self._start(planned=True)  # else none may come about
                self._plan(blow, victim)
                self._strike_member(blow, victim)
        if blow.echo is not None:
            self._after(blow.echo, partial(self._echo, blow))
        return True

    def _plan(self, blow: Blow, victim: Guest | None) -> None:
        self.planned[blow.kind] += 1
        name = "coordinator" if blow.kind == "coordinator" else "" if victim is None else _name(victim.peer)
        aim = f"{blow.phase} {blow.aim.point} {blow.aim.op}".strip() if blow.aim else blow.phase
        self._note("fault", fault=blow.index, what=blow.kind, peer=name, aim=aim)

    def _victim(self, blow: Blow) -> Guest | None:
        """Choose somebody who works; of those with the state there must be another one left."""
        able = [guest for guest in self._guests.values() if guest.well and not self._crew.spares(guest.peer)]
        healed = [guest for guest in able if guest.member in self.audit.healed]
        lethal = blow.kind != "slow"
        fewer = blow.kind in ("kill", "leave") and len(self._guests) < self._request.least
        if lethal and (len(able) < 2 or fewer):
            return None
        if lethal and len(healed) < 2:
            able = [guest for guest in able if guest not in healed]
        if not able:
            return None
        if blow.phase == "giver":
            return min(healed, key=lambda guest: guest.member) if len(healed) > 1 else None
        return able[min(len(able) - 1, int(blow.pick * len(able)))]

    def _strike_member(self, blow: Blow, victim: Guest) -> None:
        match blow.kind:
            case "kill":
                self._signal(blow, victim, signal.SIGKILL)
            case "stop":
                self._signal(blow, victim, signal.SIGSTOP)
            case "leave":
                victim.suffers = "leave"
                self._begin(blow, victim)
                victim.peer.words[Word.LEAVE] = 1
            case "partition":
                assert self._network is not None
                victim.suffers = "partition"
                self._begin(blow, victim)
                self._network.cut(victim.peer.host)
            case "slow":
                self._slow_down(blow, victim)
            case "corrupt":
                victim.suffers = "corrupt"
                victim.peer.words[Word.FLIP_PLACE] = int(blow.position * 1e6)
                victim.peer.words[Word.FLIP] = 1 if blow.variant == "data" else 2

    def _forgive(self, victim: Guest) -> None:
        if victim.suffers == "corrupt":
            victim.suffers = ""

    def _slow_down(self, blow: Blow, victim: Guest) -> None:
        low, high = _SLOW
        seconds = (low + (high - low) * blow.length) * self._request.heartbeat_timeout
        if blow.variant == "hold":
            victim.peer.words[Word.HOLD] = int(1000 * seconds)
            return
        victim.suffers = "slow"
        victim.peer.signal(signal.SIGSTOP)

        def go_on() -> None:
            victim.peer.signal(signal.SIGCONT)
            victim.suffers = ""
            self.fired["slow"] += 1

        self._after(seconds, go_on)

    def _signal(self, blow: Blow, victim: Guest, number: signal.Signals) -> None:
        victim.suffers = blow.kind
        if blow.aim is None:
            self._send(blow, victim, number)
            return
        words, aim = victim.peer.words, blow.aim
        words[Word.AIM_PHASE] = PHASES.index(blow.phase if blow.phase else "operation")
        words[Word.AIM_KIND] = 1 + self._request.orders.kinds.index(aim.op) if aim.op else 0
        words[Word.AIM_SKIP], words[Word.AIM_SIGNAL] = aim.skip, number
        words[Word.AIM_DELAY] = int(1e6 * blow.delay)
        words[Word.AIM] = 1 + faults.POINTS.index(aim.point)
        deadline = time.monotonic() + _AIM_SECONDS
        self._after(0.001, partial(self._look_whether_struck, blow, victim, number, deadline))

    def _look_whether_struck(self, blow: Blow, victim: Guest, number: signal.Signals, deadline: float) -> None:
        words = victim.peer.words
        if words[Word.STRUCK] or victim.peer.name not in self._guests:
            when, words[Word.STRUCK] = words[Word.STRUCK] / 1e9, 0
            if when:
                self.aimed[blow.phase] += 1
                victim.peer.stopped = number == signal.SIGSTOP
                self._begin(blow, victim, when)
        elif time.monotonic() > deadline and not self._crew.spares(victim.peer):
            words[Word.AIM] = 0
            self._send(blow, victim, number)
        else:
            self._after(0.002, partial(self._look_whether_struck, blow, victim, number, deadline))

    def _send(self, blow: Blow, victim: Guest, number: signal.Signals) -> None:
        self._begin(blow, victim)
        victim.peer.signal(number)

    def _strike_newcomer(self, blow: Blow, newcomer: Guest) -> None:
        if self._crew.spares(newcomer.peer):
            delay = max(0.02, blow.length * self._crew.join_seconds)
            self._after(delay, partial(self._strike_newcomer, blow, newcomer))
            return
        if newcomer.peer.name not in self._guests or newcomer.suffers or newcomer.working:
            return  # it was quick, and is a member like any other now
        self.aimed["join"] += 1
        number = signal.SIGKILL if blow.kind == "kill" else signal.SIGSTOP
        newcomer.suffers = blow.kind
        if newcomer.member:
            self._begin(blow, newcomer)
        newcomer.peer.signal(number)
        if number == signal.SIGSTOP:
            # Nobody may notice, if it had not come far: it just joins later.
            self.fired["stop"] += 1
            newcomer.excused = True
            self._after(self._request.heartbeat_timeout * (1 + blow.length), partial(self._wake, newcomer))

    def _echo(self, blow: Blow) -> None:
        """Kill another member, or the coordinator's companion, in the middle of the recovery."""
        second = Blow(index=blow.index, kind="kill", pause=0.0, pick=1 - blow.pick)
        victim = self._victim(second)
        if victim is not None and "kill" in self._request.kinds:
            self._plan(second, victim)
            self.aimed["recovery"] += 1
            self._strike_member(second, victim)

    def _begin(self, blow: Blow, victim: Guest, when: float = 0.0) -> None:
        """Note that a member was struck, and follow how the others get over it."""
        audit = self.audit
        audit.struck(victim.peer.name)
        survivors = {g.peer.name for g in self._guests.values() if g.well and g is not victim}
        strike = Strike(len(audit.strikes), blow.kind, "", victim.peer.name, victim.member, survivors)
        strike.time = when or time.time()
        strike.point = f"{blow.phase} {blow.aim.point}" if blow.aim else blow.phase
        self._note("struck", what=blow.kind, peer=_name(victim.peer), at=strike.time)
        words = victim.peer.words
        strike.inside = words[Word.ENTERED] > words[Word.LEFT]
        for other in audit.open_strikes():
            strike.overlapping = other.overlapping = True
        strike.overlapping |= self._coordinator_down
        audit.strikes.append(strike)
        victim.strike, victim.working = strike, False
        self._follow(strike, victim)

    def _follow(self, strike: Strike, victim: Guest) -> None:
        """Once the others went on without a stopped or cut-off member, let it come back."""
        if strike.kind not in ("stop", "partition"):
            return
        if strike.over and not self._coordinator_down:
            self._after(0.3 * (strike.number % 3), partial(self._wake, victim))
        else:
            self._after(0.02, partial(self._follow, strike, victim))

    def _wake(self, victim: Guest) -> None:
        if victim.suffers == "partition":
            assert self._network is not None
            self._network.heal(victim.peer.host)
        victim.peer.signal(signal.SIGCONT)
        self._note("woken", peer=_name(victim.peer))
        victim.suffers = ""
        victim.moved_at = time.monotonic()

    # --- the coordinator ---

    def _strike_coordinator(self, blow: Blow) -> None:
        self._coordinator_down = True
        process = self._crew.coordinator
        absence = blow.length * _LONGEST_ABSENCE
        for strike in self.audit.open_strikes():
            strike.overlapping = True
        if blow.variant == "stop":
            self._crew.signal_coordinator(signal.SIGSTOP)
            self._after(absence, self._let_coordinator_go_on)
            return
        process.kill()
        process.join()
        self._after(absence / 3, self._restart_coordinator)

    def _let_coordinator_go_on(self) -> None:
        self._crew.signal_coordinator(signal.SIGCONT)
        self._coordinator_is_back()

    def _restart_coordinator(self) -> None:
        self._crew.start_coordinator()
        self._coordinator_is_back()

    def _coordinator_is_back(self) -> None:
        self._coordinator_down = False
        self.fired["coordinator"] += 1
        self._note("woken", peer="coordinator")

    # --- peers ---

    def _start(self, planned: bool = False) -> Guest:
        peer = self._crew.start_peer(partial(live, orders=self._request.orders))
        guest = self._guests[peer.name] = Guest(peer, planned=planned)
        self.planned["join"] += planned
        self._note("started", peer=_name(peer), pid=peer.pid, spare=False, planned=planned)
        return guest

    def _refill(self, number: int) -> None:
        """Make a loss good, mostly; and see to it that there are as many as there must be."""
        if self._ending:
            return
        often = "join" in self._request.kinds and (number * 0.618) % 1.0 < _REFILL
        if len(self._guests) < (self._request.most if often else self._request.least):
            self._start(planned=True)

    def _hear(self, guest: Guest, message: Message) -> None:
        peer, guest.moved_at = guest.peer, time.monotonic()
        match message["type"]:
            case "joined":
                guest.member = message["member"]
                self.fired["join"] += guest.planned
                guest.planned = False
            case "op":
                self._done += 1
                guest.working = not guest.suffers
            case "evicted":
                self._evicted(guest, message)
            case "held":
                self.fired["slow"] += 1
            case "flipped":
                self.fired["corrupt"] += 1
                # A damaged control frame costs a member its place, unless the coordinator is just being restarted.
                patience = 2 * self._request.heartbeat_timeout if message["what"] == "control" else 0.0
                self._after(patience, partial(self._forgive, guest))
            case "left" if guest.suffers == "leave":
                self.fired["leave"] += 1
            case "unspawned" if (newcomer := self._guests.get(message["peer"])) and not newcomer.suffers:
                raise Failed(f"peer {peer.name} could not spawn peer {message['peer']}: {message['why']}")
            case "failed":
                raise Failed(f"peer {peer.name}: {message['error']}: {message['message']}")
            case "gone":
                del self._guests[peer.name]
                self.fired["kill"] += guest.suffers == "kill"
                self.audit.gone(peer.name, message["time"])
                self._check_end(guest, message["code"])
                self._refill(peer.name)
        if message["type"] not in ("op", "usage"):
            self._observe({"source": _name(peer), **message})

    def _evicted(self, guest: Guest, message: Message) -> None:
        guest.working = False
        strike = guest.strike
        if strike is not None and strike.kind in ("stop", "partition") and not strike.evicted:
            strike.evicted = True
            self.fired["stop" if strike.kind == "stop" else "partition"] += 1
        elif guest.excused:
            guest.excused = False
        elif guest.suffers == "corrupt":
            guest.suffers = ""
        elif "corrupt" not in self._request.kinds:
            self.audit.false_evictions.append(f"peer {guest.peer.name}: {message['reason']}")

    def _check_end(self, guest: Guest, code: int) -> None:
        if code == 0 or (code == -signal.SIGKILL and guest.suffers == "kill"):
            return
        self.audit.wrong.append(f"peer {guest.peer.name} ended with code {code}")

    # --- waiting ---

    def _all_work(self) -> bool:
        return all(guest.working for guest in self._guests.values())

    def _quiet(self) -> bool:
        return self._all_work() and not self._timers and not self._coordinator_down and not self.audit.open_strikes()

    def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + 3 * HANG_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise Hang(f"{complaint} within {3 * HANG_SECONDS:g} s")
            self._turn(0.05)

    def _pump(self, seconds: float, end: float) -> None:
        end = min(end, time.monotonic() + seconds)
        while (left := end - time.monotonic()) > 0 and not self.audit.wrong:
            self._turn(left)

    def _turn(self, timeout: float) -> None:
        """Take what there is, run the timers that are due, and look whether everybody moves."""
        if self._timers:
            timeout = max(0.0, min(timeout, self._timers[0][0] - time.monotonic()))
        self._crew.tend([guest.peer for guest in self._guests.values() if guest.well])
        for peer, message in self._crew.receive(min(timeout, 0.05)):
            self.audit.hear(peer.name, message)
            self._hear(self._guests[peer.name], message)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        self._look_for_hangs()
        if time.monotonic() - self._rated > 1.0:
            self._note("rate", operations=self._done, members=sum(guest.working for guest in self._guests.values()))
            self._rated, self._done = time.monotonic(), 0

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        for guest in self._guests.values():
            active = guest.peer.words[Word.ACTIVE]
            if active != guest.moved or guest.suffers in ("stop", "partition", "slow") or self._coordinator_down:
                guest.moved, guest.moved_at = active, now
            elif now - guest.moved_at > HANG_SECONDS:
                raise Hang(f"peer {guest.peer.name} did not move for {HANG_SECONDS:g} s")
        for strike in self.audit.open_strikes():
            if time.time() - strike.time > 2 * HANG_SECONDS and not self._coordinator_down:
                late = sorted(strike.survivors - strike.good.keys())
                raise Hang(f"peers {late} did not get over {strike.kind} {strike.number}")

    def _after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay, next(self._counter), action))

    def _note(self, kind: str, **fields: object) -> None:
        self._observe(entry("supervisor", kind, **fields))


def _name(peer: Peer) -> str:
    return f"peer-{peer.name}"
