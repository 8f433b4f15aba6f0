"""`ringhold ckpt ls`: the steps of a store."""

import json
from typing import Any

import click

from checkpoint.manifest import Manifest
from checkpoint.store import Store
from collectives.errors import NoCheckpoint
from launch import units
from launch.display import print_table


@click.command("ls", context_settings={"max_content_width": 100})
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(store: str, as_json: bool) -> None:
    """List the steps of STORE: when they were saved, what they hold, and what they share with earlier ones."""
    with Store(store) as opened:
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for step in opened.steps():
            rows.append(_row(opened.manifest(step), seen))
        if not rows:
            raise NoCheckpoint(f"there is no Ringhold checkpoint in {store}; check the path")
    if as_json:
        print(json.dumps({"store": store, "steps": rows}))
        return
    print_table(
        ("step", "saved", "tensors", "size", "stored", "not shared"),
        [
            (
                str(row["step"]),
                row["saved"],
                str(row["tensors"]),
                *(units.size(row[name]) for name in ("bytes", "stored", "new")),
            )
            for row in rows
        ],
    )


def _row(manifest: Manifest, seen: set[str]) -> dict[str, Any]:
    """What is said of a step; `seen` are the chunks of those before it."""
    new = sum(chunk.length for chunk in manifest.chunks if chunk.digest not in seen)
    seen.update(chunk.digest for chunk in manifest.chunks)
    return {
        "step": manifest.step,
        "saved": manifest.saved,
        "tensors": len(manifest.tensors),
        "bytes": manifest.nbytes,
        "stored": manifest.stored,
        "new": new,
    }
