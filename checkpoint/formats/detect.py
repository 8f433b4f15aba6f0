"""Finds out what a checkpoint is and opens it with the reader of its format. Called by `convert`, `diff` and `spec`."""

import os
import re
from importlib import import_module
from pathlib import Path

from checkpoint.files import Unreadable
from checkpoint.language import Spec
from checkpoint.source import Source
from collectives.errors import CorruptFile, UnknownFormat, UsageError

READERS: dict[str, str] = {
    "ringhold": "checkpoint.formats.read_ringhold",
    "deepspeed-universal": "checkpoint.formats.read_universal",
    "deepspeed": "checkpoint.formats.read_deepspeed",
    "megatron": "checkpoint.formats.read_megatron_dist",
    "megatron-legacy": "checkpoint.formats.read_megatron_legacy",
    "dcp": "checkpoint.formats.read_dcp",
    "hf": "checkpoint.formats.read_safetensors",
}
"""Modules with `read(folder, spec)` and `is_folder(folder)`, in the order in which they are asked."""

_POINTERS = ("latest_universal", "latest", "latest_checkpointed_iteration.txt")
_NAME = re.compile(r"[\w.+=-]+")


def open_source(path: str | os.PathLike[str], form: str | None = None, spec: Spec | None = None) -> Source:
    """Open a checkpoint.

    Args:
        path: folder or file; the folder may be that of a run, which names its newest checkpoint in a file, or that
            of one checkpoint in it. Or path or URL of a Ringhold store.
        form: one of `READERS`; found out if None.
        spec: patterns to ask before the format's own.

    Raises:
        UnknownFormat: it is none that Ringhold reads.
        UsageError: `form` is none.
        Unreadable: it is not there.
        CorruptFile: it is damaged.

    """
    if form is not None and form not in READERS:
        raise UsageError(f"cannot read {form!r}; there are {', '.join(READERS)}")
    found, place = (form, resolved(Path(path), form)) if form and form != "ringhold" else _detect(os.fspath(path), form)
    module = import_module(READERS[found])
    try:
        source: Source = module.read(place, spec)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror or error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"{path}: not laid out as {found} writes it ({error!r}); is it whole?") from error
    return source


def _detect(path: str, form: str | None) -> tuple[str, str | Path]:
    if form == "ringhold" or "://" in path or not Path(path).exists():
        from checkpoint.store import is_store, parse_reference

        if form == "ringhold" or is_store(parse_reference(path)[0]):
            return "ringhold", path
    place = resolved(Path(path), None)
    try:
        for name, module in READERS.items():
            if name != "ringhold" and (name == "hf" or place.is_dir()) and import_module(module).is_folder(place):
                return name, place
    except OSError as error:
        raise Unreadable(f"{place} cannot be read: {error.strerror}") from None
    from checkpoint.store import is_store

    if is_store(path):
        return "ringhold", path
    raise UnknownFormat(
        f"{path} is no checkpoint that Ringhold reads: it has none of latest, latest_universal, *_model_states.pt, "
        f".metadata, latest_checkpointed_iteration.txt, mp_rank_*/, *.safetensors or a store's steps/; name the "
        f"folder of the checkpoint itself, or its format with --from ({', '.join(READERS)})"
    )


def resolved(path: Path, form: str | None) -> Path:
    """Follow the file that names the newest checkpoint of a run, if there is one.

    Raises:
        Unreadable: the path or what is named is not there, or the name leads out of the folder.

    """
    if not path.exists():
        raise Unreadable(f"{path} does not exist; check the path")
    if not path.is_dir():
        return path
    pointers = [name for name in _POINTERS if (path / name).is_file()]
    if not pointers or (form == "deepspeed" and pointers == ["latest_universal"]):
        return path
    pointer = path / ("latest" if form == "deepspeed" and "latest" in pointers else pointers[0])
    try:
        tag = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{pointer} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not _NAME.fullmatch(tag) or set(tag) <= {"."}:
        raise Unreadable(f"{pointer} names {tag!r}, which is no folder beside it; name the checkpoint's own folder")
    if pointer.name.endswith(".txt") and tag.isdecimal():
        tag = f"iter_{int(tag):07d}"
    if not (path / tag).is_dir():
        raise Unreadable(f"{pointer} names {tag}, and {path / tag} is not there; copy the checkpoint whole")
    return path / tag
