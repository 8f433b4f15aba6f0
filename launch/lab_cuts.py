"""Cuts of the cables of an emulated network: as they are written on a command line, and as a seed draws them.

`launch.lab` carries them out. Pure.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

from collectives.errors import UsageError
from launch.network import Network
from launch.network_shape import Cable, Shape

_CUT = re.compile(r"(\d+|hub|hub2)(?:-(\d+|hub|hub2))?@(\d+(?:\.\d+)?)s?(?:\.\.(\d+(?:\.\d+)?)s?)?")
_PAUSE = (1.0, 7.0)
"""Seconds between the beginnings of two cuts."""
_SHORT, _LONG = (0.2, 1.5), (2.5, 10.0)
"""Seconds that a cut lasts: as often too short for anybody to be taken for dead as long enough."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A cable that is cut, or with `other` empty all cables of a host, from one second to another (None: for good)."""

    one: str
    other: str
    begin: float
    end: float | None

    def __str__(self) -> str:
        return f"{self.one}-{self.other}" if self.other else f"host {self.one}"

    def cables(self, shape: Shape) -> list[Cable]:
        """What is cut: that cable, or all of the host's."""
        return [shape.between(self.one, self.other)] if self.other else shape.of(self.one)


class Switches:
    """Cuts cables of a network and heals them; a cable that two cuts share is healed when both are over."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._cut: Counter[Cable] = Counter()

    def cut(self, cut: Cut) -> None:
        """Begin a cut."""
        for cable in cut.cables(self._network.shape):
            self._cut[cable] += 1
            if self._cut[cable] == 1:
                self._network.cut_cable(*cable)

    def heal(self, cut: Cut) -> None:
        """End it."""
        for cable in cut.cables(self._network.shape):
            self._cut[cable] -= 1
            if not self._cut[cable]:
                self._network.heal_cable(*cable)


def parse_cut(text: str, network: Network) -> Cut:
    """Read a cut: CABLE@FROM..TO or HOST@FROM..TO, in seconds; without the end it stays cut.

    Raises:
        UsageError: it is none, or this network has no such cable or host.

    """
    found = _CUT.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--cut {text!r} is not WHAT@FROM..TO, such as 2-3@10s..20s, 2@10s..20s or hub-hub2@5s")
    one, other, begin, end = found[1], found[2] or "", float(found[3]), found[4]
    if end is not None and float(end) <= begin:
        raise UsageError(f"--cut {text!r} ends before it begins")
    if other:
        network.shape.between(one, other)
    elif not one.isdecimal() or int(one) >= network.size:
        raise UsageError(f"--cut {text!r}: there is no host {one}; there are 0 to {network.size - 1}")
    return Cut(one, other, begin, None if end is None else float(end))


def draw_cuts(shape: Shape, seconds: float, seed: int) -> list[Cut]:
    """Cut one cable after the other, some at a time, each healed before it is cut again, for so many seconds."""
    source = random.Random(f"cuts {seed}")
    healed = dict.fromkeys(shape.cables, 0.0)
    cuts: list[Cut] = []
    now = source.uniform(*_PAUSE)
    while now < seconds:
        cable = source.choice(shape.cables)
        lasts = source.uniform(*source.choice((_SHORT, _LONG)))
        if healed[cable] < now:
            healed[cable] = end = round(min(now + lasts, seconds), 2)
            cuts.append(Cut(*cable, round(now, 2), end))
        now += source.uniform(*_PAUSE)
    return cuts
