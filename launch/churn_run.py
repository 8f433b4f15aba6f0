"""What a churn run is about: the request, the peers as the lab sees them, how it can fail, and the evidence of that.

For `launch.churn_lab` and `launch.churn`.
"""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from collectives.errors import RingholdError
from launch.churn_peer import Orders
from launch.churn_plan import Kind, Plan
from launch.churn_strike import Strike
from launch.crew import Crew, Peer


class Hang(RingholdError):
    """Something did not happen within the bound."""

    exit_code = 1


class Failed(RingholdError):
    """A peer ended with an error."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What to run. Times in seconds."""

    orders: Orders
    plan: Plan
    kinds: tuple[Kind, ...]
    least: int
    most: int
    seconds: float
    heartbeat_timeout: float


@dataclass(slots=True)
class Guest:
    """What the lab knows of a peer: the member that it is, if it works, and what it suffers."""

    peer: Peer
    member: int = 0
    working: bool = False
    suffers: str = ""
    """The fault that it is under, "" none."""
    planned: bool = False
    """Whether its coming is a fault of the plan."""
    excused: bool = False
    """Whether its next eviction is owed to a fault that found it joining."""
    strike: Strike | None = None
    moved: int = -1
    moved_at: float = field(default_factory=time.monotonic)

    @property
    def well(self) -> bool:
        """Whether it works, and is under no fault."""
        return self.working and not self.suffers


def evidence(crew: Crew, folder: Path) -> str:
    """Stacks of the peers that are there, what the coordinator knows, and the end of the logs; kept in `folder`."""
    there = [peer for peer in crew.living.values() if not peer.stopped]
    for peer in there:
        peer.signal(signal.SIGUSR1)
    time.sleep(0.5)
    logs = [crew.folder / "coordinator.log", *(peer.log for peer in there)]
    texts = [f"--- {log.stem}\n{log.read_text(errors='replace')[-30000:]}" for log in logs if log.exists()]
    path = folder / "evidence.txt"
    path.write_text("\n".join([crew.status(), *texts]))
    return str(path)
