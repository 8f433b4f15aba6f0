"""The one set of knobs of a member and of a coordinator, with defaults, environment variables and bounds.

Every field has the environment variable `RINGHOLD_<FIELD>` (upper case). Precedence: keyword, environment, default.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from collectives.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a run. Times are in seconds; unknown names are refused by `resolve`."""

    heartbeat: float = 0.2
    """Interval between two heartbeats of a member."""
    heartbeat_timeout: float = 2.0
    """A member (or coordinator) that is silent for longer is taken for dead."""
    op_timeout: float = 60.0
    """Members absent for longer from an operation that others have entered are evicted."""
    join_timeout: float = 60.0
    """How long `join` waits for the coordinator and for a place in an epoch."""
    coordinator_timeout: float = 30.0
    """How long a member that needs the coordinator waits for it before it departs."""
    founders: int = 1
    """Members that must have joined before the first epoch is formed."""
    min_members: int = 1
    """An epoch of fewer members is refused (`QuorumLost`)."""
    quorum: bool = False
    """If set, an epoch needs more than half of the last one's members."""
    check_inputs: bool = False
    """Debug: hash the input of each operation before and after it, and complain if the caller changed it."""
    trace: str = ""
    """Folder to which each member writes a trace of what it does (`collectives.trace`); empty: none."""
    listen: str = "127.0.0.1"
    """Address that this process listens on."""
    advertise: str = ""
    """Address that others are told; empty: the same as `listen`."""
    topology: str = ""
    """Topology file, for the emulated transports (`transport="emulated:sockets"`)."""
    tls_ca: str = ""
    """CA certificate file; a member with it speaks TLS to the coordinator and checks its certificate."""
    tls_cert: str = ""
    """Certificate chain file of the coordinator."""
    tls_key: str = ""
    """Private key file of the coordinator."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (math.isfinite(value) and value > 0):
                raise OptionError(f"option {field.name} must be a positive number of seconds, not {value!r}")
            if field.type is int and value < 1:
                raise OptionError(f"option {field.name} must be at least 1, not {value!r}")
        if self.heartbeat_timeout < 2 * self.heartbeat:
            raise OptionError(
                f"option heartbeat_timeout ({self.heartbeat_timeout} s) must be at least twice heartbeat "
                f"({self.heartbeat} s), else one late beat evicts a healthy member"
            )

    @classmethod
    def resolve(cls, given: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Build options from keywords over environment variables over defaults.

        Raises:
            OptionError: an unknown name, or a value of the wrong type or out of range.

        """
        environ = os.environ if environ is None else environ
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, field in fields.items():
            text = environ.get(f"RINGHOLD_{name.upper()}")
            if text is not None:
                values[name] = _parse(name, field.type, text)
        for name, value in (given or {}).items():
            if name not in fields:
                raise OptionError(f"unknown option {name!r}; the options are {', '.join(sorted(fields))}")
            values[name] = _check(name, fields[name].type, value)
        return cls(**values)


def _parse(name: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise OptionError(f"RINGHOLD_{name.upper()}={text!r} is not a {kind.__name__}") from None


def _check(name: str, kind: Any, value: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise OptionError(f"option {name} must be a {kind.__name__}, not {value!r}")
    return value
