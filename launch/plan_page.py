"""The sharded graph of a plan as one HTML page: no script, nothing fetched, repeated layers folded.

Each module is a box of its operations in their order, in three columns: forward, backward, update. An operation carries
the placement of its result as a coloured chip; where a value is resharded, a bar says by what, and how much is sent.
"""

from collections.abc import Iterable
from html import escape

from parallel.explain import folded, labels, places, written
from parallel.graph import Node, Phase, Role
from parallel.layout import Broadcast, Partial, Placement
from parallel.plans import Placements, Plan, Reshard
from parallel.tables import size, totals

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #23292f; --soft: #5a6570; --line: #d7dde2; --box: #f6f8f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15191d; --ink: #e6eaee; --soft: #a3aeb8; --line: #333c44; --box: #1d2328; } }
body { margin: 24px; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, "Segoe UI", sans-serif; }
h1 { font-size: 20px; } h2 { font-size: 15px; margin: 0 0 8px; text-transform: capitalize; }
pre, .facts { color: var(--soft); font: 12.5px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
table { border-collapse: collapse; margin: 12px 0 24px; } td, th { padding: 2px 14px 2px 0; text-align: left; }
th { color: var(--soft); font-weight: 500; }
.columns { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 18px; align-items: start; }
section { border: 1px solid var(--line); border-radius: 8px; background: var(--box); padding: 8px 10px;
  margin: 0 0 10px; }
section > b { font-weight: 600; overflow-wrap: anywhere; }
section > i { color: var(--soft); font-style: normal; float: right; }
.op { display: inline-flex; gap: 5px; margin: 3px 10px 3px 0; align-items: center; white-space: nowrap; }
.chip { border-radius: 4px; padding: 0 5px; font: 12px ui-monospace, monospace; color: #fff; }
.s0 { background: #0b62a8; } .s1 { background: #0f7a55; } .s2 { background: #8a2a8f; } .s3 { background: #3f4fb5; }
.b { background: #5d6973; } .p { background: #b3123f; }
.move { border-left: 4px solid #c2410c; padding: 2px 8px; margin: 5px 0; overflow-wrap: anywhere; }
.move small { color: var(--soft); }
"""


def page(plan: Plan) -> str:
    """Draw a plan."""
    names = labels(plan.graph)
    columns = "".join(f"<div><h2>{phase}</h2>{_column(plan, phase, names)}</div>" for phase in Phase)
    key = " ".join(f"{_chip(p)} {text}" for p, text in _key(plan))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plan on {escape(str(plan.mesh))}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Plan on mesh {escape(str(plan.mesh))}</h1>"
        f"<pre>{escape(totals(plan))}</pre><p>{key}</p>{_inputs(plan)}"
        f'<div class="columns">{columns}</div></body></html>\n'
    )


def _key(plan: Plan) -> list[tuple[Placement, str]]:
    found: dict[Placement, None] = {}
    for placed in plan.made.values():
        found.update(dict.fromkeys(placed))
    words = {"B": "whole on every rank", "P": "partial: the ranks' values add up"}
    return [
        (p, words.get(str(p), f"split along {p}" if str(p)[0] == "S" else "partial")) for p in sorted(found, key=str)
    ]


def _inputs(plan: Plan) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}{f' ×{count}' if count > 1 else ''}</td><td>{_chips(placed)}</td>"
        f"<td>{size(nbytes)}</td></tr>"
        for name, placed, count, nbytes in places(plan, frozenset({Role.PARAMETER, Role.BATCH, Role.BUFFER}))
    )
    return f"<table><tr><th>tensor</th><th>lives</th><th>bytes, whole</th></tr>{rows}</table>"


def _column(plan: Plan, phase: Phase, names: dict[str, str]) -> str:
    """The boxes of a phase: one for each stretch of one module, equal ones of repeated layers folded into one."""
    moves: dict[str, list[Reshard]] = {}
    for reshard in plan.collectives:
        moves.setdefault(reshard.wanted_by, []).append(reshard)
    stretches: list[tuple[str, list[str]]] = []
    for node, sharding in zip(plan.graph.nodes, plan.nodes, strict=True):
        if node.phase != phase:
            continue
        module = folded(node.module) or "step"
        if not stretches or stretches[-1][0] != module:
            stretches.append((module, []))
        stretches[-1][1].extend(_move(reshard, names) for reshard in moves.get(node.name, ()))
        stretches[-1][1].append(_operation(node, sharding.outputs))
    counts: dict[tuple[str, str], int] = {}
    for module, parts in stretches:
        key = module, "".join(parts)
        counts[key] = counts.get(key, 0) + 1
    ends = [r for r in plan.collectives if r.phase == phase and r.wanted_by.partition(" ")[0] in set(Role)]
    boxes = [_box(module, body, count) for (module, body), count in counts.items()]
    if ends:
        boxes.append(_box("at the end", "".join(_move(r, names) for r in ends), 1))
    return "".join(boxes)


def _box(module: str, body: str, count: int) -> str:
    times = f"<i>×{count}</i>" if count > 1 else ""
    return f"<section><b>{escape(module)}</b>{times}<div>{body}</div></section>"


def _operation(node: Node, placed: Iterable[Placements]) -> str:
    kind = node.op.split(".")[1].strip("_")
    what = f" {escape(str(node.args[0]))}" if kind == "einsum" else ""
    shapes = ", ".join(str(list(value.shape)) for value in node.outputs)
    chips = " ".join(map(_chips, placed))
    return f'<span class="op" title="{escape(shapes)}">{escape(kind)}{what} {chips}</span>'


def _move(reshard: Reshard, names: dict[str, str]) -> str:
    label = folded(names[reshard.value.name])
    if ": " in label:
        label = "_".join(part for part in label.partition(": ")[2].split("_") if not part.isdecimal())
    change = f"{_chips(reshard.before.placements)} → {_chips(reshard.after.placements)}"
    return (
        f'<div class="move">{reshard.boxing.kind} {change} <small>{escape(label)}, {size(reshard.nbytes)} sent along '
        f"{escape(', '.join(reshard.boxing.axes))}</small></div>"
    )


def _chips(placed: Placements) -> str:
    return f'<span title="{escape(written(placed))}">{"".join(map(_chip, placed))}</span>'


def _chip(placement: Placement) -> str:
    kind = "b" if isinstance(placement, Broadcast) else "p" if isinstance(placement, Partial) else ""
    return f'<span class="chip {kind or "s" + str(int(str(placement)[2:-1]) % 4)}">{placement}</span>'
