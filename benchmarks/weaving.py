"""TokenWeave, measured: what a woven stack gains by splitting its tokens, and that the choice of the split never loses.

Called as `python -m benchmarks.attention weave` and `split`. Links are emulated; computation is modelled by sleeping,
as on few cores ranks would take the time of each other's transfers, unless `--compute real` is asked for. Split and
unsplit passes take turns; a time is the median of the slowest rank's. Beside it stands what the exact simulator finds
for the same stack, without what Python and copies take.
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.company import together
from benchmarks.figures import table
from collectives.algorithms.weave import weave as weave_schedule
from collectives.simulate import simulate
from collectives.topology import Link, Topology, flat
from launch.attention_rank import overlap
from launch.bench_request import parse_size
from parallel.overlap import WovenShape
from parallel.split_choice import Load, choose_split, simulated

WIDTH = 64
LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
FIXED = (0.0, 4e-3)
"""Seconds that half a block takes however few tokens there are: with some a split does not pay."""
_SHORT = 0.5
"""Seconds: shorter passes are made more often in a round."""


@dataclass(frozen=True, slots=True)
class Case:
    """A stack, its tokens, the split and the load."""

    shape: WovenShape
    tokens: int
    split: int
    load: Load

    def simulated(self, world: int, network: Topology, split: int) -> float:
        """Seconds of a pass with that split."""
        return simulated(self.shape, self.tokens, split, world, self.load, network)

    def order(self, passes: int = 1) -> dict[str, Any]:
        """What ranks are told; so many passes a round."""
        load = {"fixed": self.load.fixed, "each": self.load.each}
        return {"layers": self.shape.layers, "tokens": self.tokens, "split": self.split, "passes": passes, **load}


def gains(given: argparse.Namespace) -> int:
    """`weave`: 4 and 8 layers, computation of 0.5, 1 and 2 times the communication."""
    (world,) = given.ranks or (2,)
    tokens, link = given.length or 2048, Link(1e-4, _rate(given))
    if given.compute == "real":
        return _computed(world, given.length or 512, link, given.rounds)
    network, rows = flat(world, link), []
    moving = simulate(weave_schedule(world, tokens, WIDTH), network).time
    cases = [
        (ratio, Case(WovenShape(WIDTH, world, world, layers), tokens, tokens // 2, _load(ratio * moving / tokens)))
        for layers in (4, 8)
        for ratio in (0.5, 1.0, 2.0)
    ]
    orders = [case.order() for _, case in cases]
    for (ratio, case), (split, whole) in zip(cases, _measured(world, link, orders, min(given.rounds, 3)), strict=True):
        communicate = 2 * case.shape.layers * moving
        due, due_whole = (case.simulated(world, network, point) for point in (case.split, tokens))
        etas = [overlap(time, ratio * communicate, communicate) or 0.0 for time in (split, due)]
        rows.append(
            (
                case.shape.layers,
                f"{ratio:g}",
                *(f"{1e3 * time:.0f}" for time in (split, due, whole, due_whole)),
                *(f"{gain:.2f}" for gain in (whole / split, due_whole / due)),
                *(f"{eta:.2f}" for eta in (*etas, etas[0] / etas[1])),
            )
        )
    header = ("split, ms", "simulated", "whole, ms", "simulated", "times as fast", "simulated", "eta", "simulated")
    print(table(("layers", "compute/communicate", *header, "of it"), rows))
    _say(world, link, f"{tokens} tokens, an exchange of {1e3 * moving:.0f} ms")
    return 0


def choice(given: argparse.Namespace) -> int:
    """`split`: the chosen split against none, for many lengths, also where no split pays."""
    (world,) = given.ranks or (2,)
    link, shape = Link(1e-4, _rate(given)), WovenShape(WIDTH, world, world, 4)
    network = flat(world, link)
    each = simulate(weave_schedule(world, max(LENGTHS), WIDTH), network).time / max(LENGTHS)
    cases, dues = [], []
    for fixed in FIXED:
        load = Load(fixed, each)
        for tokens in LENGTHS:
            case = Case(shape, tokens, choose_split(shape, tokens, world, load, network), load)
            cases.append(case)
            dues.append([case.simulated(world, network, point) for point in (case.split, tokens)])
    passes = [max(1, min(10, round(_SHORT / whole))) for _, whole in dues]
    orders = [case.order(count) for case, count in zip(cases, passes, strict=True)]
    rows, worst, expected = [], 0.0, 0.0
    for case, due, (split, whole) in zip(cases, dues, _measured(world, link, orders, given.rounds), strict=True):
        worst, expected = max(worst, split / whole), max(expected, due[0] / due[1])
        rows.append(
            (
                f"{1e3 * case.load.fixed:g}",
                case.tokens,
                case.split if case.split < case.tokens else "none",
                f"{1e3 * split:.1f}",
                f"{1e3 * whole:.1f}",
                f"{split / whole:.3f}",
                f"{due[0] / due[1]:.3f}",
            )
        )
    print(table(("fixed, ms", "tokens", "chosen", "ms", "unsplit, ms", "ratio", "simulated"), rows))
    print(f"worst: {worst:.3f} of the unsplit time, by the simulator {expected:.3f}")
    _say(world, link, f"{shape.layers} layers")
    return 0


def _rate(given: argparse.Namespace) -> float:
    link: str = given.link or "2M"
    return float(parse_size(link))


def _load(each: float) -> Load:
    """So many seconds a token, and nothing that a simulator of links does not know."""
    return Load(0.0, each, exchange=0.0)


def _computed(world: int, tokens: int, link: Link, rounds: int) -> int:
    settings = {"tokens": tokens, "width": 512, "layers": 4, "rounds": rounds}
    found = _together(world, link, "weave", settings)
    ((split, whole),) = _medians(found)
    print(table(("split, s", "whole, s", "times as fast"), [(f"{split:.2f}", f"{whole:.2f}", f"{whole / split:.2f}")]))
    return 0


def _measured(world: int, link: Link, orders: list[dict[str, Any]], rounds: int) -> list[tuple[float, float]]:
    """Seconds of a pass, split and whole, for each case."""
    return _medians(_together(world, link, "weave modelled", {"width": WIDTH, "cases": orders, "rounds": rounds}))


def _medians(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of the slowest rank, by case."""
    by_case = zip(*(rank["cases"] for rank in found), strict=True)
    return [
        (_median([rank["split"] for rank in ranks]), _median([rank["whole"] for rank in ranks])) for ranks in by_case
    ]


def _median(ranks: list[list[float]]) -> float:
    slowest: list[float] = [max(times) for times in zip(*ranks, strict=True)]
    return statistics.median(slowest)


def _together(world: int, link: Link, what: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "links.json"
        path.write_bytes(msgspec.json.encode({"kind": "flat", "ranks": world, "link": link}))
        return together(what, world, "emulated:sockets", str(path), settings)


def _say(world: int, link: Link, what: str) -> None:
    print(f"{world} ranks, emulated links of {link.bandwidth / 2**20:g} MiB/s, {what}")
    print("computation was modelled by sleeping")
    print(f"load of this machine of {os.cpu_count()} cores: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
