"""Removing steps that are not to be kept, and packs and leases that nobody needs. `ringhold ckpt gc` calls it.

Safe while others save and load: what a running save needs stays (`checkpoint.leases`). The order makes it safe to die
anywhere: first the manifests go, then the packs that no manifest names any more; what is left over goes the next time.
"""

from dataclasses import dataclass

from checkpoint import leases
from checkpoint.store import Store, new_save_name, pack_name, save_of, step_name
from collectives.errors import NoCheckpoint, UsageError


@dataclass(frozen=True, slots=True)
class GcReport:
    """What was removed, or would be."""

    kept: tuple[int, ...]
    removed: tuple[int, ...]
    packs: tuple[str, ...]
    """Removed ones."""
    freed: int
    """Bytes of these."""
    running: tuple[str, ...]
    """Names of saves under way, whose packs were kept."""


def gc(store: Store, keep_last: int | None = None, keep_every: int | None = None, dry_run: bool = False) -> GcReport:
    """Remove what is not to be kept.

    Args:
        store: where.
        keep_last: so many of the newest steps are kept.
        keep_every: so are steps whose number this divides. Neither: all steps are kept.
        dry_run: only say what would be removed.

    Raises:
        UsageError: `keep_last` or `keep_every` is less than 1.
        NoCheckpoint: there is no store.
        UnknownFormat, CorruptFile: a manifest that is to be kept cannot be read, so that nobody knows what it needs;
            nothing was removed.
        StorageFailed: something cannot be removed; what is left over goes the next time.

    """
    if min(keep_last or 1, keep_every or 1) < 1 or 0 in (keep_last, keep_every):
        raise UsageError("keep at least one step: --keep-last and --keep-every are 1 or more")
    if dry_run:
        return _sweep(store, keep_last, keep_every, True)
    if not store.steps() and not store.packs():
        raise NoCheckpoint(f"there is no Ringhold checkpoint in {store.url}; check the path")
    with leases.take(store.storage, leases.Lease.mine("gc", new_save_name(0)), "gc"):
        return _sweep(store, keep_last, keep_every, False)


def _sweep(store: Store, keep_last: int | None, keep_every: int | None, dry_run: bool) -> GcReport:
    # In this order: a save takes its lease before its first pack, and drops it after its manifest is there.
    packs, drafts = store.packs(), store.drafts()
    found = leases.read_all(store.storage)
    steps = store.steps()
    alive = [lease for lease in found.values() if lease.kind == "save" and lease.alive]
    pinned = {step for lease in alive for step in lease.base}
    kept = [step for step in steps if step in pinned or _wanted(step, steps, keep_last, keep_every)]
    needed = {pack for step in kept for pack in store.manifest(step).packs}
    running = {lease.save for lease in alive}
    gone = [pack for pack in packs if pack not in needed and save_of(pack) not in running]
    freed = sum(store.storage.size(pack_name(pack)) for pack in gone)
    removed = [step for step in steps if step not in kept]
    if not dry_run:
        for step in removed:
            store.storage.remove(step_name(step))
        for pack in gone:
            store.storage.remove(pack_name(pack))
        for draft in () if alive else drafts:
            store.storage.remove(draft)
        for name, lease in found.items():
            if not lease.alive:
                store.storage.remove(f"{leases.FOLDER}/{name}")
    return GcReport(tuple(kept), tuple(removed), tuple(gone), freed, tuple(sorted(running)))


def _wanted(step: int, steps: list[int], keep_last: int | None, keep_every: int | None) -> bool:
    if keep_last is None and keep_every is None:
        return True
    return (keep_last is not None and step in steps[-keep_last:]) or (keep_every is not None and step % keep_every == 0)
