"""`ringhold ckpt inspect`: the tensors, layouts and sizes of a step."""

import json
from typing import Any

import click

from checkpoint.reader import Reader
from launch import units
from launch.display import print_table


@click.command("inspect", context_settings={"max_content_width": 100})
@click.argument("store")
@click.option("--state", "with_state", is_flag=True, help="Show the values that are no tensors, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(store: str, with_state: bool, as_json: bool) -> None:
    """Show what a step holds: STORE@STEP, or the newest of STORE. Reads the manifest alone.

    "stored" is what a tensor's chunks take in packs; chunks that several tensors share count for each.
    """
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
    shape = " x ".join(map(str, row["shape"])) or "scalar"
    return (
        row["key"],
        row["dtype"],
        shape,
        units.size(row["bytes"]),
        units.size(row["stored"]),
        ratio,
        row["layout"] or "",
    )
