"""Schedules, the engine that runs them, transports, membership and the communicator.

The public face: `Communicator` and what its methods return and raise.
"""

from collectives.communicator import Communicator
from collectives.options import Options
from collectives.outcome import Outcome, Work
from collectives.step import Step
from collectives.sync import SyncReport

__all__ = ["Communicator", "Options", "Outcome", "Step", "SyncReport", "Work"]
