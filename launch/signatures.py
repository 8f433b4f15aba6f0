"""`ringhold signatures`: the table of SBP signatures, each one proven by brute force on this machine."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from collectives.errors import UnsoundSignature, UsageError
from launch.display import print_table

if TYPE_CHECKING:
    from parallel.signatures.samples import Call
    from parallel.signatures.verify import Finding

_SHOWN = 4
"""Missing signatures that a row of the table names."""


@click.command("signatures", context_settings={"max_content_width": 100})
@click.argument("operations", nargs=-1, metavar="[OPERATION|FAMILY]...")
@click.option("--worlds", default="2,3,4", show_default=True, help="Ranks of one axis, with commas between.")
@click.option("--meshes", default="2x2", show_default=True, help="Meshes of two axes, with commas between.")
@click.option("--search", is_flag=True, help="Look on two ranks for signatures that the table lacks; takes minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--markdown", is_flag=True, help="Print the table of docs/signatures.md.")
def command(operations: tuple[str, ...], worlds: str, meshes: str, search: bool, as_json: bool, markdown: bool) -> None:
    """Prove the signatures of all operations, or of those whose name or family is given.

    Each sample call runs whole and on the shards of every rank, with inputs placed in every way that the table allows;
    partial sums are of both signs, sizes even, uneven and too small. Exits with 1 if a signature does not hold.

    \b
    ringhold signatures attention einsum --worlds 2,3,4 --meshes 2x2,2x3
    """
    sizes = [_numbers(text, 1) for text in worlds.split(",")] if worlds else []
    grids = [_numbers(text, 2) for text in meshes.split(",")] if meshes else []
    calls = _calls(operations)

    from parallel.signatures.verify import verify

    findings = verify(
        _told(calls),
        [size for (size,) in sizes],
        [(one, other) for one, other in grids],
        searched=(2,) if search else (),
    )
    if as_json:
        print(json.dumps({"operations": [_report(finding) for finding in findings]}))
    elif markdown:
        print("\n".join(_markdown(findings)))
    else:
        headings = ("operation", "family", "sound", "pairs", "unsound", "missing" if search else "")
        print_table(headings, [_row(finding) for finding in findings])
        _summarize(findings)
    faults = [fault for finding in findings for fault in finding.unsound]
    if faults:
        raise UnsoundSignature(f"{len(faults)} signatures do not hold, the first: {faults[0]}; correct its rule")


def _numbers(text: str, count: int) -> list[int]:
    """`4` or `2x3`, each at least 2."""
    parts = text.strip().split("x")
    if len(parts) != count or not all(part.isdecimal() and int(part) > 1 for part in parts):
        form = "numbers of ranks such as 2,3,4" if count == 1 else "meshes such as 2x2,2x3"
        raise UsageError(f"{text!r}: write {form}, each of at least 2")
    return [int(part) for part in parts]


def _calls(operations: Sequence[str]) -> "list[Call]":
    """The sample calls of what was asked for. UsageError: nothing is called so."""
    from parallel.signatures.samples import samples
    from parallel.signatures.table import TABLE

    calls = list(samples())
    if not operations:
        return calls
    for name in operations:
        if not any(name in call.node.op or name == TABLE[call.node.op].family for call in calls):
            families = sorted({entry.family for entry in TABLE.values()})
            raise UsageError(f"no operation and no family is called {name!r}; families are {', '.join(families)}")
    return [
        call for call in calls if any(name in call.node.op or name == TABLE[call.node.op].family for name in operations)
    ]


def _told(calls: "list[Call]") -> "Any":
    """The calls, with progress on a terminal."""
    for number, call in enumerate(calls):
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{len(calls)} {call.node.op:<60}", end="", file=sys.stderr, flush=True)
        yield call
    if sys.stderr.isatty():
        print("\r" + " " * 80 + "\r", end="", file=sys.stderr)


def _report(finding: "Finding") -> dict[str, Any]:
    return {
        "operation": finding.op,
        "family": finding.family,
        "sound": finding.sound,
        "pairs": finding.pairs,
        "unsound": finding.unsound,
        "missing": sorted(finding.missing),
    }


def _row(finding: "Finding") -> tuple[str, ...]:
    counts = (str(finding.sound), str(finding.pairs), str(len(finding.unsound)))
    missing = sorted(finding.missing)
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (finding.op.removeprefix("aten."), finding.family, *counts, "; ".join(missing[:_SHOWN]) + more)


def _summarize(findings: "Sequence[Finding]") -> None:
    sound, pairs = sum(finding.sound for finding in findings), sum(finding.pairs for finding in findings)
    unsound = sum(len(finding.unsound) for finding in findings)
    print(f"{len(findings)} operations: {sound} signatures and {pairs} pairs hold, {unsound} do not")


def _markdown(findings: "Sequence[Finding]") -> list[str]:
    rows = [
        "| family | operation | hold | pairs hold | do not hold | missing |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for finding in findings:
        op, family, sound, pairs, unsound, _ = _row(finding)
        missing = "<br>".join(sorted(finding.missing)) or "-"
        rows.append(f"| {family} | `{op}` | {sound} | {pairs} | {unsound} | {missing} |")
    return rows
