"""`ringhold ckpt convert`: a checkpoint of one format into another, without torch."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from checkpoint.convert import WRITERS, Progress, Report, convert
from checkpoint.dtypes import TORCH
from checkpoint.formats.detect import READERS
from checkpoint.language import Spec
from checkpoint.selection import Selection, check_patterns
from collectives.errors import UsageError
from launch import units

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64", **TORCH}
_EVERY = 0.2
"""Seconds between two looks of the progress line."""


@click.command("convert", context_settings={"max_content_width": 100})
@click.argument("src")
@click.argument("dst", required=False)
@click.option("--to", required=True, type=click.Choice(list(WRITERS)), help="Format to write.")
@click.option("--from", "form", type=click.Choice(list(READERS)), help="Format of SRC.  [default: found out]")
@click.option("--dtype", help="Cast the weights: bf16, fp16, fp32. Moments stay as they are.")
@click.option("--layout", default="", help="Axes to write for, as tp=4,pp=2,dp=2.")
@click.option("--weights-only", is_flag=True, help="Leave out the optimizer.")
@click.option("--include", multiple=True, help="Only names that match this regular expression; may be repeated.")
@click.option("--exclude", multiple=True, help="No names that match this regular expression; may be repeated.")
@click.option("--spec", help="Patterns or new names: a TOML file, or a built-in one (ringhold ckpt spec).")
@click.option("--dry-run", is_flag=True, help="Say whether it can be done and what would be written; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    src: str,
    dst: str | None,
    to: str,
    form: str | None,
    dtype: str | None,
    layout: str,
    weights_only: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    spec: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC into DST, model and optimizer, whatever the number of ranks that wrote it.

    DST appears whole or not at all. An interrupted conversion goes on where it stopped when the same command is given
    again. Pickles are read without executing anything. Memory stays below 128 MiB whatever the size.

    \b
    ringhold ckpt convert runs/zero3 model-hf --to hf --dtype bf16
    ringhold ckpt convert iter_0001000 llama --to hf --spec megatron-gpt-to-hf-llama
    """
    if dst is None and not dry_run:
        raise UsageError("give the destination DST, or --dry-run")
    selection = Selection(
        check_patterns(include, "--include"), check_patterns(exclude, "--exclude"), weights_only, _dtype(dtype)
    )
    began = time.monotonic()
    with _Line() as line:
        report = convert(
            src,
            dst if dst is not None else str(Path(src).absolute().parent / ".nowhere"),
            to=to,
            form=form,
            spec=Spec.find(spec) if spec else None,
            selection=selection,
            layout=parse_layout(layout),
            dry_run=dry_run,
            progress=line.begin,
        )
    seconds = time.monotonic() - began
    if as_json:
        print(json.dumps({**report.to_json(), "dry_run": dry_run, "seconds": round(seconds, 3)}))
    else:
        print(_sentence(report, dry_run, seconds))


def _sentence(report: Report, dry_run: bool, seconds: float) -> str:
    what = f"{report.tensors} tensors, {units.size(report.nbytes)}, {report.groups} parameter groups"
    states = ", ".join(f"{count} {state}" for state, count in report.to_json()["states"].items())
    if dry_run:
        return f"{report.source} is {report.format}: {what} ({states}); it can be converted to {report.to}"
    rate = units.rate(report.nbytes / max(seconds, 1e-9))
    again = ", resumed" if report.resumed else ""
    return f"{report.destination}: {what} ({states}) from {report.format} in {units.duration(seconds)}, {rate}{again}"


def parse_layout(text: str) -> dict[str, int]:
    """Read `tp=4,pp=2`. `UsageError`: it is not of that form."""
    found: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, equals, size = item.partition("=")
        if not equals or not size.isdecimal() or int(size) < 1 or name in found:
            raise UsageError(f"--layout {text!r}: write axes with sizes, as tp=4,pp=2,dp=2")
        found[name.strip()] = int(size)
    return found


def _dtype(text: str | None) -> str | None:
    if text is None:
        return None
    if text not in _DTYPES:
        raise UsageError(f"--dtype {text!r}: take one of bf16, fp16, fp32")
    return _DTYPES[text]


class _Line:
    """A line of progress on stderr, if that is a terminal: bytes, rate, time left."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._done, self._total = 0, 0
        self._began = self._told = 0.0

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._shown and self._total:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def begin(self, report: Report) -> Progress:
        """Take what will be written; return what is told of the progress."""
        self._total, self._began = report.nbytes, time.monotonic()
        told: Callable[[int], None] = self._add
        return told

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if not self._shown or now - self._told < _EVERY:
                return
            self._told = now
            rate = self._done / max(now - self._began, 1e-9)
            left = max(0, self._total - self._done) / max(rate, 1.0)
            text = f"{units.size(self._done)} of {units.size(self._total)}, {units.rate(rate)}, {left:.0f} s left"
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
