"""`ringhold ckpt verify`: read every byte of a store and prove it."""

import json
import os
import sys
from dataclasses import asdict

import click

from checkpoint.store import Store, parse_reference
from checkpoint.verify import VerifyReport, verify
from collectives.errors import CorruptChunk
from launch import units


@click.command("verify", context_settings={"max_content_width": 100})
@click.argument("store")
@click.option("--threads", type=click.IntRange(1), default=min(4, os.cpu_count() or 1), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(store: str, threads: int, as_json: bool) -> int:
    """Read every byte of STORE (all its steps, or STORE@STEP) and prove it; exit code 4 if anything is damaged.

    Chunks are proven by their digests, manifests by their own, so that no flipped bit passes. Names what is damaged,
    and the tensors that cannot be loaded.
    """
    path, step = parse_reference(store)
    with Store(path) as opened:
        opened.choose(step)
        report = verify(opened, opened.steps() if step is None else [step], threads, _progress(sys.stderr.isatty()))
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _show(report)
    return CorruptChunk.exit_code if report.damages else 0


def _show(report: VerifyReport) -> None:
    for damage in report.damages:
        print(f"DAMAGED {damage.where}: {damage.what}")
        for tensor in damage.tensors[:8]:
            print(f"    cannot be loaded: {tensor}")
        if damage.tensors[8:]:
            print(f"    and {len(damage.tensors) - 8} more")
    state = f"{len(report.damages)} damages" if report.damages else "all is as it was saved"
    print(f"{len(report.steps)} steps, {report.chunks} chunks, {units.size(report.read)} read: {state}")


def _progress(terminal: bool) -> "Progress | None":
    return Progress() if terminal else None


class Progress:
    """A line that is written over, on a terminal."""

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        end = "\n" if done == total else ""
        print(f"\r{units.size(done)} of {units.size(total)}      ", end=end, file=sys.stderr, flush=True)
