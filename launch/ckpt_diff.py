"""`ringhold ckpt diff`: which tensors of two checkpoints differ, and by how much, without torch."""

import json
import math
import sys

import click

from checkpoint.compare import Comparison, Difference, compare
from checkpoint.formats.detect import open_source
from collectives.errors import OptionError
from launch.display import print_table


@click.command("diff", context_settings={"max_content_width": 100})
@click.argument("a")
@click.argument("b")
@click.option("--tolerance", type=float, help="Take x and y for equal if |x - y| <= T max(1, |x|, |y|).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(a: str, b: str, tolerance: float | None, as_json: bool) -> None:
    """Say which tensors of the checkpoints A and B differ, and by how much.

    The formats and layouts may be different: whole tensors are compared, bit for bit unless a tolerance is given, and
    the parameter groups. The exit code is 1 if anything differs.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise OptionError(f"--tolerance must be 0 or more, not {tolerance}")
    one = open_source(a)
    try:
        other = open_source(b)
        try:
            found = compare(one, other, tolerance)
        finally:
            other.close()
    finally:
        one.close()
    if as_json:
        print(json.dumps({"a": a, "b": b, "formats": [one.format, other.format], **found.to_json()}))
    else:
        _show(a, b, found)
    if not found.equal:
        sys.exit(1)


def _show(a: str, b: str, found: Comparison) -> None:
    if found.tensors:
        print_table(("tensor", "differs in", "elements", "largest", "relative"), [_row(one) for one in found.tensors])
    for line in found.groups:
        print(line)
    differing = sum(one.kind not in ("only in A", "only in B") for one in found.tensors)
    alone = len(found.tensors) - differing
    verdict = "are equal" if found.equal else f"differ in {differing} tensors, and {alone} are in one only"
    print(f"A: {a}\nB: {b}\n{found.compared} tensors compared: A and B {verdict}")


def _row(one: Difference) -> tuple[str, ...]:
    numbers = ("" if value is None else f"{value:.3g}" for value in (one.max_abs, one.max_rel))
    if one.kind == "values":
        return (one.key, "values", f"{one.count} of {one.elements}", *numbers)
    return (one.key, f"{one.kind}: {one.detail}" if one.detail else one.kind, "", "", "")
