"""`ringhold ckpt inspect`: tensors, layouts and sizes of a step of a store, or of a checkpoint of another format."""

import json
from collections.abc import Sequence
from typing import Any

import click

from checkpoint.formats.detect import READERS, open_source
from checkpoint.formats.read_ringhold import Stored
from checkpoint.reader import Reader
from checkpoint.source import Source
from launch import units
from launch.display import print_table


@click.command("inspect", context_settings={"max_content_width": 100})
@click.argument("checkpoint")
@click.option("--from", "form", type=click.Choice(list(READERS)), help="Format of it.  [default: found out]")
@click.option("--state", "with_state", is_flag=True, help="Show the values that are no tensors, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(checkpoint: str, form: str | None, with_state: bool, as_json: bool) -> None:
    """Show what a checkpoint holds, whatever its format. Of a Ringhold store: STORE@STEP, or the newest of STORE.

    Reads what is said of the tensors, not the tensors. Of a store, "stored" is what a tensor's chunks take in packs;
    chunks that several tensors share count for each.
    """
    source = open_source(checkpoint, form)
    foreign = not isinstance(source, Stored)
    try:
        if foreign:
            _show_foreign(checkpoint, source, with_state, as_json)
    finally:
        source.close()
    if not foreign:
        _show_store(checkpoint, with_state, as_json)


def _show_foreign(checkpoint: str, source: Source, with_state: bool, as_json: bool) -> None:
    """Tensors as they are whole, however many ranks wrote them, and the parameter groups."""
    rows: list[dict[str, Any]] = [
        {"key": key, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
        for key, entry in source.entries.items()
    ]
    groups = [{"params": len(group.names), **group.options} for group in source.groups]
    total = sum(row["bytes"] for row in rows)
    if as_json:
        report = {"checkpoint": checkpoint, "format": source.format, "bytes": total, "groups": groups, "tensors": rows}
        print(json.dumps({**report, "state": dict(source.extras)}, default=str))
        return
    print_table(
        ("tensor", "dtype", "shape", "size"),
        [(row["key"], row["dtype"], _shape(row["shape"]), units.size(row["bytes"])) for row in rows],
    )
    for number, group in enumerate(groups):
        options = ", ".join(f"{name}={value}" for name, value in group.items() if name != "params")
        print(f"parameter group {number}: {group['params']} parameters, {options}")
    print(f"{checkpoint} is {source.format}: {len(rows)} tensors, {units.size(total)}, {len(groups)} parameter groups")
    if with_state:
        print(json.dumps(dict(source.extras), indent=2, default=str))


def _show_store(store: str, with_state: bool, as_json: bool) -> None:
    with Reader(store) as reader:
        report = _report(reader)
        state: Any = reader.manifest.state
    if as_json:
        print(json.dumps({**report, "state": state}))
        return
    print_table(
        ("tensor", "dtype", "shape", "size", "stored", "ratio", "saved by layout"),
        [_row(row) for row in report["tensors"]],
    )
    ratio = report["stored"] / report["bytes"] if report["bytes"] else 1.0
    print(
        f"step {report['step']} of {report['store']}, saved {report['saved']}: {len(report['tensors'])} tensors, "
        f"{units.size(report['bytes'])}, stored in {units.size(report['stored'])} ({ratio:.3f}), "
        f"{report['chunks']} chunks in {len(report['packs'])} packs"
    )
    if report["metadata"]:
        print(f"metadata: {json.dumps(report['metadata'])}")
    if with_state:
        print(json.dumps(state, indent=2))


def _report(reader: Reader) -> dict[str, Any]:
    manifest = reader.manifest
    rows = []
    for key, entry in manifest.tensors.items():
        layout = manifest.layout(key)
        rows.append(
            {
                "key": key,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "bytes": entry.nbytes,
                "stored": sum(manifest.chunks[index].length for index in entry.chunks),
                "chunks": len(entry.chunks),
                "layout": None if layout is None else str(layout),
            }
        )
    return {
        "store": reader.store.url,
        "step": manifest.step,
        "saved": manifest.saved,
        "bytes": manifest.nbytes,
        "stored": manifest.stored,
        "chunks": len(manifest.chunks),
        "packs": list(manifest.packs),
        "metadata": manifest.metadata,
        "tensors": rows,
    }


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = f"{row['stored'] / row['bytes']:.3f}" if row["bytes"] else ""
    return (
        row["key"],
        row["dtype"],
        _shape(row["shape"]),
        units.size(row["bytes"]),
        units.size(row["stored"]),
        ratio,
        row["layout"] or "",
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
