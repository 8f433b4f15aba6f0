"""The faults of a churn run, drawn from its seed: kind, instant, victim, and the point of the protocol where it lands.

Pure: a plan knows nothing of processes. `launch.churn_lab` carries it out, and chooses the victim by `pick` among those
that may be struck then; so the same seed gives the same faults, whatever the machine's speed makes of their instants.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

from collectives import faults
from collectives.errors import UsageError

Kind = Literal["kill", "stop", "leave", "join", "coordinator", "partition", "slow", "corrupt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Phase = Literal["", "operation", "sync", "giver", "admit", "join", "save"]
"""Where a kill or a stop lands: at a random instant, in an operation, in a state sync (any member, or the one that
gives), in an admission, in a peer that is joining, in a member that saves a checkpoint."""
_PHASES: dict[Phase, int] = {"": 6, "operation": 6, "sync": 2, "giver": 2, "admit": 2, "join": 2, "save": 2}
_ECHO = 0.25
"""Part of the losses that are followed by another one within moments, in the middle of the recovery."""
_WITH_COORDINATOR = 0.3
"""Part of the coordinator's deaths that take a member with them."""
_MOST_SKIPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A point of the protocol: `skip` passings of `point` are let go by first; `op` is a kind, "" any."""

    point: str
    op: str
    skip: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One planned fault. Times in seconds; numbers from 0 to 1 choose among what is there when it strikes.

    Attributes:
        pause: before it, since the one before.
        pick: the victim.
        phase, aim: where it lands, of a kill or a stop; `aim` is None at a random instant.
        delay: the victim lives on for so long at that point.
        length: of a slow spell, of the coordinator's absence, and how long a stopped or cut-off member stays away after
            its eviction; from 0 to 1.
        variant: "stop" or "hold" (of the interpreter's lock) for a slow member, "kill" or "stop" for the coordinator,
            "data" or "control" for the frame that is damaged.
        echo: seconds until another member is killed in the middle of the recovery, None: nobody is.
        position: of the byte that is damaged, in its frame.

    """

    index: int
    kind: Kind
    pause: float
    pick: float
    phase: Phase = ""
    aim: Aim | None = None
    delay: float = 0.0
    length: float = 0.0
    variant: str = ""
    echo: float | None = None
    position: float = 0.0


class Plan:
    """The endless list of the blows of a seed.

    Args:
        seed: of everything.
        kinds: faults to draw; each comes once in every so many.
        ops: kinds of operations that aims are taken at.
        shortest, longest: seconds between two.
        data: whether frames of data can be damaged, because all of them have checksums.

    """

    def __init__(
        self,
        seed: int,
        kinds: tuple[Kind, ...],
        ops: tuple[str, ...],
        shortest: float,
        longest: float,
        *,
        data: bool,
    ) -> None:
        self._seed, self._kinds, self._ops = seed, kinds, ops
        self._pause = (shortest, longest)
        self._variants: dict[Kind, tuple[str, ...]] = {
            "slow": ("stop", "hold"),
            "coordinator": ("kill", "kill", "stop"),
            "corrupt": ("data", "data", "data", "control") if data else ("control",),
        }

    def blow(self, index: int) -> Blow:
        """Return number `index`."""
        turn, place = divmod(index, len(self._kinds))
        order = random.Random(f"churn order {self._seed} {turn}").sample(self._kinds, len(self._kinds))
        source = random.Random(f"churn blow {self._seed} {index}")
        kind = order[place]
        phase, aim = self._aim(source)
        lethal = kind in ("kill", "stop")
        echoes = {"kill": _ECHO, "leave": _ECHO, "coordinator": _WITH_COORDINATOR}.get(kind, 0.0)
        return Blow(
            index=index,
            kind=kind,
            pause=source.uniform(*self._pause),
            pick=source.random(),
            phase=phase if lethal else "",
            aim=aim if lethal else None,
            delay=source.choice((0.0, 0.0, 0.005, 0.05)) * source.random(),
            length=source.random(),
            variant=source.choice(self._variants.get(kind, ("",))),
            echo=source.choice((0.0, 0.01, 0.08)) * source.random() if source.random() < echoes else None,
            position=source.random(),
        )

    def _aim(self, source: random.Random) -> tuple[Phase, Aim | None]:
        phase = source.choices(list(_PHASES), list(_PHASES.values()))[0]
        point, op = source.choice(faults.POINTS), source.choice(self._ops)
        if point == "reduce" and "reduce" not in op:
            point = "transfer"
        skip = source.randrange(_MOST_SKIPS + 1) if point in ("transfer", "reduce") else 0
        if phase in ("", "join"):
            return phase, None
        if phase != "operation" or source.random() < 0.5:
            op = ""  # whatever comes first
        return phase, Aim(point=point, op=op, skip=skip)


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Read `--faults`: names with commas between, or "all".

    Raises:
        UsageError: an unknown name, or none.

    """
    if text == "all":
        return KINDS
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(wanted - set(KINDS)):
        raise UsageError(f"--faults: there is no fault {unknown[0]!r}; there are {', '.join(KINDS)}")
    if not wanted:
        raise UsageError(f"--faults names no fault; there are {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in wanted)
