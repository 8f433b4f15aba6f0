"""What a benchmark is asked to do: the checked form of the command line of `ringhold bench`, as the ranks get it."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Self

from collectives.errors import UsageError
from launch.bench_kinds import DTYPES, KINDS, OPS, Kind

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:i?B)?", re.IGNORECASE)
_FOREIGN = ("gloo", "mpi")
"""Rivals that are not ours: torch.distributed's gloo and the MPI library's own collectives."""
OURS, CONTROL = "ours", "control"
"""Runs: the one that is measured, and the one by which ranks agree and gather numbers. Rivals' have their names."""
_PREFIX = "ours:"
"""Makes a rival of one of our transports whose name is also a foreign one's."""
_CONTROL_TRANSPORT = "sockets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One benchmark. Raises `UsageError` where its parts do not fit together.

    Attributes:
        kind: name of a kind of `KINDS`.
        sizes: in bytes, ascending; a barrier has the one size 0.
        rivals: what takes turns with us: see `_FOREIGN` and `_PREFIX`.
        rounds: timed turns of each competitor. warmup: turns before them. checks: turns whose results are compared.

    """

    kind: str
    sizes: tuple[int, ...]
    transport: str
    algorithm: str = "auto"
    dtype: str = "float"
    op: str = "sum"
    root: int = 0
    lanes: int = 1
    registered: bool = False
    """Buffers are from `Communicator.empty`, which peers can map where the transport knows how."""
    rivals: tuple[str, ...] = ()
    rounds: int = 20
    warmup: int = 3
    checks: int = 2
    calibrate: bool = False
    """Instead of rivals, all algorithms take turns, and the cost model is fitted to their times."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"there is no collective {self.kind!r}; bench knows {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown --dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        if self.op not in OPS:
            raise UsageError(f"unknown --op {self.op!r}; there are {', '.join(OPS)}")
        if self.op == "avg" and "int" in self.dtype:
            raise UsageError(f"--op avg of {self.dtype} is not exact; choose a floating-point --dtype")
        if len(set(self.rivals)) != len(self.rivals) or "" in self.rivals:
            raise UsageError(f"--vs {','.join(self.rivals)!r} is not a list of different rivals, such as gloo,mpi")
        if "mpi" in self.rivals and self.kind != "barrier" and self.dtype in ("half", "bfloat16"):
            raise UsageError(f"MPI has no type for {self.dtype}; drop mpi from --vs, or choose another --dtype")

    @property
    def what(self) -> Kind:
        """The kind."""
        return KINDS[self.kind]

    @property
    def needs_mpi(self) -> bool:
        """Whether the ranks must be processes of an MPI launcher."""
        return "mpi" in (*self.rivals, *self.runs.values())

    @property
    def runs(self) -> dict[str, str]:
        """The runs that it needs a coordinator for, each with its transport."""
        own = {name: name.removeprefix(_PREFIX) for name in self.rivals if name not in _FOREIGN}
        return {CONTROL: _CONTROL_TRANSPORT, OURS: self.transport, **own}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**{**values, "sizes": tuple(values["sizes"]), "rivals": tuple(values["rivals"])})


def parse_size(text: str) -> int:
    """Return bytes from "64K", "1M", "2GiB" or "100"; units are powers of 1024. Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size; write bytes, or a number with K, M or G, such as 64K")
    return int(match[1]) * _UNITS[match[2].upper()]


def steps(first: int, last: int, factor: int, increment: int) -> tuple[int, ...]:
    """Return the sizes from `first` to `last`: each `factor` times the one before, or `increment` more if given.

    Raises:
        UsageError: they never get there.

    """
    if first > last:
        raise UsageError(f"the sizes begin at {first} and end at {last} bytes; the first must not be the larger")
    if not increment and (factor < 2 and first < last):
        raise UsageError(f"a factor of {factor} never gets from {first} to {last} bytes; give --factor 2 or more")
    if not increment and first == 0:
        raise UsageError("sizes that grow by a factor cannot begin at 0; give --begin 1 or more, or --increment")
    sizes = [first]
    while (size := sizes[-1] + increment if increment else sizes[-1] * factor) <= last and size > sizes[-1]:
        sizes.append(size)
    return tuple(sizes)
