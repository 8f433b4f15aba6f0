"""A store: a folder or URL with the steps of a run, which share their chunks.

    STORE/steps/000000120.json       a manifest for each step (`checkpoint.manifest`)
    STORE/packs/NAME.pack            chunks, one behind the other: one file for each writer of a save
    STORE/saves/NAME.json            who is at work (`checkpoint.leases`)

The manifest is written last and appears whole, so a step is there with all its chunks or not at all. What writes a
store: `checkpoint.saving` (many ranks), `checkpoint.writer` (one process). What reads it: `checkpoint.reader`,
`checkpoint.loading`. Needs no torch.
"""

import os
import re
import secrets
from collections.abc import Iterable

from checkpoint.manifest import MAX_MANIFEST, Manifest
from checkpoint.storage import Storage, open_storage
from collectives.errors import NoCheckpoint, StorageFailed, UsageError

STEPS, PACKS = "steps", "packs"
_PACK = re.compile(r"[0-9]{9,18}-[0-9a-f]+-[0-9]+(r[0-9]+)?\.pack", re.ASCII)
_STEP = re.compile(r"([0-9]{9,18})\.json", re.ASCII)


class Store:
    """Access to a store. Opening one creates nothing; for any thread; a context manager that closes its files."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.storage: Storage = open_storage(url)

    @property
    def url(self) -> str:
        """What the user calls it."""
        return self.storage.url

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is kept open."""
        self.storage.close()

    def steps(self) -> list[int]:
        """Numbers of the steps that are there, ascending. A place that does not exist has none."""
        return sorted(int(match[1]) for name in self.storage.names(STEPS) if (match := _STEP.fullmatch(name)))

    def choose(self, step: int | None = None) -> int:
        """A step that is there; None: the newest.

        Raises:
            NoCheckpoint: it is not there, or there is none.

        """
        steps = self.steps()
        if not steps:
            raise NoCheckpoint(f"there is no Ringhold checkpoint in {self.url}; check the path")
        if step is not None and step not in steps:
            shown = ", ".join(map(str, steps[-8:]))
            raise NoCheckpoint(f"{self.url} has no step {step}; it has {'... ' if steps[8:] else ''}{shown}")
        return steps[-1] if step is None else step

    def manifest(self, step: int | None = None) -> Manifest:
        """The manifest of a step; None: of the newest.

        Raises:
            NoCheckpoint: it is not there.
            UnknownFormat, CorruptFile: see `Manifest.decode`.

        """
        name = step_name(self.choose(step))
        return Manifest.decode(self.storage.read(name, MAX_MANIFEST), f"{self.url}/{name}")

    def publish(self, manifest: Manifest) -> None:
        """Let a step appear, when all its packs are closed. A step of this number that is there is replaced.

        Raises:
            StorageFailed: a pack that it names is missing or too short, or it cannot be written.

        """
        ends: dict[int, int] = {}
        for chunk in manifest.chunks:
            ends[chunk.pack] = max(ends.get(chunk.pack, 0), chunk.offset + chunk.length)
        for pack, end in ends.items():
            name = pack_name(manifest.packs[pack])
            if self.storage.size(name) < end:
                raise StorageFailed(f"{self.url}/{name} is shorter than was written; the step was not published")
        self.storage.publish(step_name(manifest.step), manifest.encode())

    def packs(self) -> list[str]:
        """Names of the pack files that are there; what has another name was not written by a save."""
        return [name for name in self.storage.names(PACKS) if _PACK.fullmatch(name)]

    def drafts(self) -> list[str]:
        """Files of manifests that are being written, or were when their writer died."""
        return [f"{STEPS}/{name}" for name in self.storage.names(STEPS) if name.startswith(".")]


def step_name(step: int) -> str:
    """The file of a step.

    Raises:
        UsageError: no such number can be.

    """
    if not 0 <= step < 10**18:
        raise UsageError(f"the number of a step is 0 or more, not {step}")
    return f"{STEPS}/{step:09d}.json"


def pack_name(pack: str) -> str:
    """The file of a pack."""
    return f"{PACKS}/{pack}"


def new_save_name(step: int) -> str:
    """A name for a save that no other has."""
    return f"{step:09d}-{secrets.token_hex(6)}"


def save_of(pack: str) -> str:
    """The save that a pack belongs to, by its name `SAVE-WRITER.pack`."""
    return pack.removesuffix(".pack").rpartition("-")[0]


def parse_reference(text: str) -> tuple[str, int | None]:
    """Read `PATH` or `PATH@STEP`."""
    path, at, step = text.rpartition("@")
    return (path, int(step)) if at and path and step.isdecimal() and step.isascii() else (text, None)


def is_store(url: str | os.PathLike[str]) -> bool:
    """Whether there is a step of a Ringhold checkpoint at this path or URL."""
    try:
        with Store(url) as store:
            return bool(store.steps())
    except StorageFailed:
        return False


def collect_packs(entries: Iterable[str]) -> dict[str, int]:
    """Number names in the order in which they first come."""
    return {name: index for index, name in enumerate(dict.fromkeys(entries))}
