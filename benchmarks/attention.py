"""What the schemes of long-context attention cost against each other, against one process and against the simulator.

    python -m benchmarks.attention links            # every scheme on a mesh of duplex links, transfers alone
    python -m benchmarks.attention overlap          # how much of computing and communicating overlaps, by their ratio
    python -m benchmarks.attention real             # ranks over shared memory against one process: time, memory
    python -m benchmarks.attention weave            # a tensor-parallel stack with its tokens split and not
    python -m benchmarks.attention split            # the split that is chosen against none, for many lengths
    python -m benchmarks.attention counters         # bytes of each rank by the kernel's counters; root
    python -m benchmarks.attention map --svg FILE   # which scheme wins for how many heads of keys, by the simulator

What is compared takes turns in one run. In `links` and `overlap`, and unless `--compute
real` is given in `weave` and `split`, computation is modelled by sleeping.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import attention_links, attention_real, counters, weaving
from benchmarks.attention_links import modelled
from benchmarks.figures import table
from launch.chart import line_chart
from parallel.attention.layout import SCHEMES

GROUPS = (1, 2, 4, 8, 16, 32)
"""Heads of queries for each of keys, in the map."""


def main(arguments: Sequence[str] | None = None) -> int:
    modes = {
        "links": attention_links.links,
        "overlap": overlap,
        "real": attention_real.real,
        "weave": weaving.gains,
        "split": weaving.choice,
        "counters": counters.count,
        "map": draw_map,
    }
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=tuple(modes))
    parser.add_argument("--ranks", type=int, nargs="+", default=None)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", help="bytes a second of a link, where one is emulated (1M; of woven stacks 2M)")
    parser.add_argument("--compute", choices=("modelled", "real"), default="modelled", help="of weave")
    parser.add_argument("--network", choices=("mesh", "ring"), default="ring", help="of the map")
    parser.add_argument("--scheme", choices=SCHEMES, nargs="+", help="of counters, links and real: only these")
    parser.add_argument("--json", action="store_true", help="of counters: a JSON object a rank and pass")
    parser.add_argument("--svg", type=Path, default=None)
    given = parser.parse_args(arguments)
    return modes[given.what](given)


def overlap(given: argparse.Namespace) -> int:
    rows = []
    for ranks in given.ranks or (4,):
        for ratio in ("0.5", "1", "2"):
            found = modelled(given, "ring,token_ring", ranks, given.length or 4096, "--ratio", ratio)
            rows += [(ranks, ratio, row["scheme"], f"{row['eta']:.2f}", f"{row['predicted_eta']:.2f}") for row in found]
    print(table(("ranks", "compute/communicate", "scheme", "eta", "simulated"), rows))
    print("computation was modelled by sleeping")
    return 0


def draw_map(given: argparse.Namespace) -> int:
    """Times of the schemes over the heads of queries for each of keys, as shares of the one-way ring's."""
    import torch

    from collectives import topology
    from collectives.topology import Link
    from parallel.attention.choice import Rates, candidates, predict
    from parallel.attention.layout import Problem
    from parallel.attention.shares import Balance

    (ranks,) = given.ranks or (8,)
    length = given.length or 32768
    series: dict[str, list[tuple[float, float]]] = {}
    shares = Balance().shares(length, ranks)
    made = {"mesh": topology.mesh, "ring": topology.ring}[given.network]
    network, rates = made(ranks, Link(2e-5, 1e9)), Rates(flops=1e15, copied=1e13)
    rows = []
    for group in GROUPS:
        problem = Problem(
            1, 32, 32 // group, 128, torch.bfloat16, shares, shares, False, 1.0, "ring", columns=1, parts=8
        )
        times = {}
        for one in candidates(replace(problem, parts=8)):
            if one.columns in (1, 2):
                name = one.scheme if one.columns == 1 else f"{one.scheme}, nodes of {one.columns}"
                times[name] = predict(one, network, rates)
        for name, time in times.items():
            series.setdefault(name, []).append((float(group), time / times["ring"]))
        rows.append((group, min(times, key=times.__getitem__), *(f"{t * 1e3:.1f}" for t in times.values())))
    print(table(("heads a key head", "fastest", *series), rows))
    if given.svg is not None:
        title = f"Attention of {length} rows on {ranks} ranks, {given.network} of duplex links: transfers alone"
        chart = line_chart(
            series,
            title,
            "heads of queries for each head of keys (g)",
            "time, the one-way ring's = 1",
            log_x=True,
            log_y=True,
            x_ticks=[float(group) for group in GROUPS],
        )
        given.svg.write_text(chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
