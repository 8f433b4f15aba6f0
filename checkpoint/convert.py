"""Converting a checkpoint of one format into another: open, select, write beside the destination, rename.

A reader gives a `Source`, a writer takes it; neither knows the other. The output appears whole or not at all: it is
written into a folder beside the destination, flushed, and renamed last. A conversion that was interrupted goes on
where it stopped, if source and options are the same. Called by `ringhold ckpt convert`.
Memory: a few blocks (`source.BLOCK_BYTES`) a thread and the names of the tensors, whatever the size of the checkpoint.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from checkpoint.files import Files
from checkpoint.formats.detect import open_source
from checkpoint.formats.gathered import Gathered
from checkpoint.language import Spec
from checkpoint.renaming import Renamed
from checkpoint.selection import Selected, Selection
from checkpoint.source import Entry, Source
from collectives.errors import StorageFailed, UsageError

Progress = Callable[[int], None]
"""Told how many bytes of tensors were written since it was last called; from any thread."""

WRITERS: dict[str, str] = {
    "plain": "checkpoint.formats.write_plain",
    "hf": "checkpoint.formats.write_hf",
    "dcp": "checkpoint.formats.write_dcp",
    "deepspeed-universal": "checkpoint.formats.write_universal",
    "megatron": "checkpoint.formats.write_megatron",
    "ringhold": "checkpoint.formats.write_ringhold",
}
"""Modules with `write(source, folder, options, progress)`; they find an empty folder, or their own earlier files."""

_WHOLE = ("plain", "hf", "ringhold")
"""Formats for which a layout has no meaning."""

JOURNAL = ".ringhold-conversion.json"


class Journal:
    """What of a conversion is finished, so that it can go on: names of files, or bytes of one."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / JOURNAL
        self._identity = identity
        self._done: dict[str, int] = {}

    def resume(self) -> bool:
        """Take up an earlier conversion; False if there is none of the same source and options."""
        try:
            data = json.loads(self._path.read_text())
            if data["identity"] != self._identity:
                return False
            self._done = {str(key): int(value) for key, value in data["done"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def done(self, name: str) -> int:
        """Bytes of a file that were written and flushed; 0 for one that is not known."""
        return self._done.get(name, 0)

    def record(self, name: str, nbytes: int) -> None:
        """Say that so many bytes of a file are flushed. Appears whole or not at all."""
        self._done[name] = nbytes
        self.save()

    def record_all(self, done: Mapping[str, int]) -> None:
        """Say the same of several files at once."""
        self._done |= done
        self.save()

    def save(self) -> None:
        """Write the journal."""
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"identity": self._identity, "done": self._done}))
        new.replace(self._path)


@dataclass(frozen=True)
class WriteOptions:
    """What a writer is told besides the source.

    `layout`: sizes of the axes to write for, as `{"tp": 4, "pp": 2, "dp": 2}`. `journal`: what is finished already.
    `destination`: where the output will be, for messages and for writers of stores. `proven` is called by a writer that
    publishes by itself, before it does: it waits for the checksums of what was read.
    """

    layout: Mapping[str, int] = field(default_factory=dict)
    journal: Journal | None = None
    destination: str = ""
    proven: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Report:
    """What was converted, or would be."""

    source: str
    format: str
    destination: str
    to: str
    tensors: int
    nbytes: int
    groups: int
    left_out: tuple[str, ...]
    resumed: bool = False
    entries: tuple[Entry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        names = ("source", "format", "destination", "to", "tensors", "nbytes", "groups", "resumed")
        kept: dict[str, Any] = {name: getattr(self, name) for name in names}
        return kept | {"states": _states(self.entries), "left_out": list(self.left_out)}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str,
    form: str | None = None,
    spec: Spec | None = None,
    selection: Selection | None = None,
    layout: Mapping[str, int] | None = None,
    dry_run: bool = False,
    progress: Callable[[Report], Progress] | None = None,
) -> Report:
    """Convert a checkpoint.

    Args:
        src: path of the checkpoint, or path or URL of a Ringhold store (`@STEP` behind it for a step).
        dst: where to write; must not exist, but for a Ringhold store, which gets another step.
        to: one of `WRITERS`.
        form: format of the source; found out if None.
        spec: patterns and names to use before the built-in ones.
        selection: which tensors, and in which dtype.
        layout: sizes of the axes to write for.
        dry_run: only find out whether it can be done, and what would be written.
        progress: called with the report when it is known what will be written; returns what is told of the progress.

    Raises:
        UsageError: it cannot be done as asked.
        CorruptFile, UnknownPickle, PiecesMissing, PatternMissing, UnknownFormat: the source cannot be read.
        StorageFailed: the destination cannot be written.

    """
    if to not in WRITERS:
        raise UsageError(f"cannot convert to {to!r}; there are {', '.join(WRITERS)}")
    if layout and to in _WHOLE:
        raise UsageError(f"{to} holds whole tensors, which any layout loads; leave out the layout")
    selection = selection or Selection()
    origin, target = os.fspath(src), os.fspath(dst)
    _apart(origin, target)
    if not dry_run and to != "ringhold":
        _check_free(Path(target))
    opened = open_source(origin, form, spec)
    source: Source = opened
    try:
        if spec is not None and (spec.names or any(pattern.how == "tied" for pattern in spec.patterns)):
            source = Renamed(source, spec)
        if to != "ringhold" or selection != Selection() or source is not opened:
            source = Selected(source, selection, to)  # all of a step of a store goes to another one as it is
        report = _report(source, origin, target, to)
        if not report.tensors:
            raise UsageError(f"{origin}: no tensor is left to convert; look at --include, --exclude and --weights-only")
        if dry_run:
            return report
        files = opened.files if isinstance(opened, Gathered) else Files()
        options = WriteOptions(dict(layout or {}), destination=target, proven=files.proven)
        tell = progress(report) if progress else _silent
        if to == "ringhold":
            files.prove()
            _writer(to)(source, Path(target), options, tell)
            return report
        return _staged(
            files, source, Path(target), options, tell, report, _identity(origin, to, selection, spec, layout)
        )
    finally:
        source.close()


def _silent(_nbytes: int) -> None:
    return


def _writer(to: str) -> Callable[[Source, Path, WriteOptions, Progress], None]:
    module = import_module(WRITERS[to])
    write: Callable[[Source, Path, WriteOptions, Progress], None] = module.write
    return write


def _report(source: Source, src: str, dst: str, to: str) -> Report:
    entries = tuple(source.entries.values())
    left_out = tuple(source.extras.get("left_out", ()))
    nbytes = sum(entry.nbytes for entry in entries)
    return Report(src, source.format, dst, to, len(entries), nbytes, len(source.groups), left_out, False, entries)


def _states(entries: Sequence[Entry]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        found[entry.state] = found.get(entry.state, 0) + 1
    return found


def _apart(src: str, dst: str) -> None:
    """Refuse a destination that is the source, or within it, or around it."""
    if "://" in src or "://" in dst:
        if src == dst:
            raise UsageError(f"{src} is source and destination; give another destination")
        return
    origin, target = Path(src.rpartition("@")[0] or src if not Path(src).exists() else src), Path(dst)
    a, b = origin.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"{dst} is {src}, or one lies within the other; give a destination elsewhere")


def _check_free(target: Path) -> None:
    if target.is_symlink() or target.exists():
        raise UsageError(f"{target} exists; give a destination that does not, or remove it")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is no folder; make it first")


def _identity(src: str, to: str, selection: Selection, spec: Spec | None, layout: Mapping[str, int] | None) -> str:
    """Text that is the same for the same conversion of the same files."""
    root = Path(src)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    return repr((to, selection, spec, sorted((layout or {}).items()), stats))


def _staged(
    files: Files, source: Source, target: Path, options: WriteOptions, tell: Progress, report: Report, identity: str
) -> Report:
    """Write into a folder beside the target, flush it, and rename it."""
    staging = target.absolute().parent / f".{target.name}.ringhold-partial"
    try:
        with _held(staging):
            resumed = _prepare(staging, identity)
            _check_room(staging, report.nbytes if not resumed else 0)
            journal = Journal(staging, identity)
            if not journal.resume():
                journal.save()
            files.prove(all_of_it=resumed)
            _writer(report.to)(source, staging, replace(options, journal=journal), tell)
            files.proven()
            (staging / JOURNAL).unlink()
            result = _result(staging, report.to)
            flush(result)
            _check_free(target)
            os.rename(result, target)  # noqa: PTH104
            _sync(target.absolute().parent)
    except _Held:
        raise UsageError(f"another conversion to {target} is at work; wait for it, or stop it") from None
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = error.strerror or str(error)
        raise StorageFailed(f"{target}: cannot be written: {reason}; nothing was left behind") from None
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return replace(report, resumed=resumed)


class _Held(Exception):
    """The staging folder is another process's."""


@contextmanager
def _held(staging: Path) -> Iterator[None]:
    """Hold the staging folder, made if it is not there, as long as this process lives."""
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Held from None
        yield
    finally:
        os.close(descriptor)


def _prepare(staging: Path, identity: str) -> bool:
    """Empty the staging folder, unless it holds an earlier part of the same conversion."""
    if Journal(staging, identity).resume():
        return True
    for item in staging.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    return False


def _check_room(staging: Path, nbytes: int) -> None:
    free = shutil.disk_usage(staging).free
    if nbytes > free:
        raise StorageFailed(
            f"{staging.parent}: {nbytes} bytes are needed and {free} are free; make room, or convert elsewhere"
        )


def _result(staging: Path, to: str) -> Path:
    """What is renamed: the folder, or the one file of a format that has no more."""
    if to != "plain":
        return staging
    (file,) = staging.iterdir()
    return file


def flush(path: Path) -> None:
    """Make a file, or all files of a folder and the folders, durable."""
    if path.is_file():
        _sync(path)
        return
    folders = [path, *(item for item in path.rglob("*") if item.is_dir())]
    files = [item for item in path.rglob("*") if item.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync, files))
        list(pool.map(_sync, folders))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
