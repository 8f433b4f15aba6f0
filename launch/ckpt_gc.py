"""`ringhold ckpt gc`: remove steps that are not to be kept, and what nobody needs."""

import json
from dataclasses import asdict

import click

from checkpoint.gc import gc
from checkpoint.store import Store
from launch import units


@click.command("gc", context_settings={"max_content_width": 100})
@click.argument("store")
@click.option("--keep-last", type=click.IntRange(1), help="Keep so many of the newest steps.")
@click.option("--keep-every", type=click.IntRange(1), help="Keep steps whose number this divides.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(store: str, keep_last: int | None, keep_every: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove steps of STORE that are not to be kept, and packs that no step and no running save needs.

    Without --keep-last and --keep-every all steps are kept. A step is kept if either says so. Safe while others save.
    """
    with Store(store) as opened:
        report = gc(opened, keep_last, keep_every, dry_run)
    if as_json:
        print(json.dumps(asdict(report)))
        return
    verb = "would remove" if dry_run else "removed"
    steps = ", ".join(map(str, report.removed)) or "no step"
    print(f"{verb} {steps}, {len(report.packs)} packs, {units.size(report.freed)}; kept {len(report.kept)} steps")
    if report.running:
        print(f"kept what running saves need: {', '.join(report.running)}")
