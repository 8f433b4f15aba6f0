"""Writes a folder of torch.distributed.checkpoint (DCP), without torch, which an FSDP2 job loads with `dcp.load`.

Keys are those of `{"model": ..., "optim": ...}` as `get_state_dict` of `torch.distributed.checkpoint.state_dict` names
them: `model.NAME`, `optim.state.NAME.exp_avg`, `optim.param_groups.0.lr`; what else the source has of JSON values is
under `extra`. Weights are the most exact copy there is (the fp32 master before the 16-bit parameter). Tied names point
to one copy. A source that was saved with `flatten_optimizer_state_dict` is written so again. Called by
`checkpoint.convert`.

`layout`: `dp=4` cuts tensors along dimension 0 into the parts that 4 ranks of FSDP2 ask for, each rank's in files of
its own; other axes count as more ranks. A job of any other size loads them too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.convert import WriteOptions
from checkpoint.formats.dcp_files import Item, Spread, StatePath, Whole, metadata, write_files
from checkpoint.formats.output import Output
from checkpoint.formats.read_dcp import LIFTED
from checkpoint.source import WEIGHTS, Entry, Source, states_by_name, weight_key
from checkpoint.torch_file import saved_box
from collectives.region import Region

_FILES = 4
"""Files that are written where the layout asks for fewer: they can be written at once."""
_FILE_BYTES = 1 << 30
"""Rough size of files where that makes more of them: what is not done twice after a break."""
_ADAM_DEFAULTS = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip
"""What torch's AdamW asks a checkpoint for and other optimizers do not have among their options."""


def write(source: Source, folder: Path, options: WriteOptions, progress: Callable[[int], None]) -> None:
    """Write all of a source into an empty folder."""
    ranks = math.prod(options.layout.values())
    aliases = {other: owner for owner, *others in source.extras.get("tied", ()) for other in others}
    tensors = dict(_tensors(source, aliases))
    values = dict(_values(source))
    stepped = {name for group in source.groups for name in group.names}
    per_rank = -(-max(_FILES, sum(entry.nbytes for entry in tensors.values()) // _FILE_BYTES) // ranks)
    spread = Spread(ranks * per_rank)
    for path, entry in tensors.items():
        parts = ranks if entry.name in stepped or not stepped else 1
        for rank, box in enumerate(_boxes(entry.shape, parts)):
            item = Item(_key(path), saved_box(source, entry, box, progress), box)
            spread.add(item, range(rank * per_rank, (rank + 1) * per_rank))
    for path, value in values.items():
        spread.add(Item(_key(path), value), range(1))
    named = {f"__{n // per_rank}_{n % per_rank}.distcp": items for n, items in enumerate(spread.files) if items}
    places = write_files(Output(folder, options.journal, progress), named)
    other = {_key(("model", alias)): _key(("model", owner)) for alias, owner in aliases.items()}
    paths = {_key(path): path for path in (*tensors, *values, *(("model", alias) for alias in aliases))}
    wholes = {_key(path): Whole(entry.dtype, entry.shape) for path, entry in tensors.items()}
    (folder / ".metadata").write_bytes(metadata(wholes, places, paths, other))


def _key(path: StatePath) -> str:
    return ".".join(map(str, path))


def _tensors(source: Source, aliases: Mapping[str, str]) -> Iterator[tuple[StatePath, Entry]]:
    """The tensors by their path in the nested state, one copy of those that are tied."""
    for name, states in states_by_name(source).items():
        if name in aliases:
            continue
        if weight := weight_key(source, name):
            yield ("model", name), source.entries[weight]
        for state, entry in states.items():
            if state not in WEIGHTS:
                yield _flat(source, ("optim", "state", name, state)), entry


def _values(source: Source) -> Iterator[tuple[StatePath, Any]]:
    """All that is no tensor, by its path."""
    flattened = bool(source.extras.get("flattened"))
    for number, group in enumerate(source.groups):
        options = {key: tuple(value) if key == "betas" else value for key, value in group.options.items()}
        for key, value in ((_ADAM_DEFAULTS if "betas" in options else {}) | options).items():
            for owner in group.names if flattened else (number,):
                yield _flat(source, ("optim", "param_groups", owner, key)), value
        if not flattened:
            yield ("optim", "param_groups", number, "params"), list(group.names)
    own = source.extras.get("extra")
    kept = dict(own) if isinstance(own, dict) else {}
    # What a DCP folder called its iteration and scheduler is there under that name already.
    known = [kept.get("step"), kept.get("lr_sched")]
    kept |= {key: source.extras[key] for key in LIFTED if key in source.extras and source.extras[key] not in known}
    yield from _leaves(("extra",), kept)


def _flat(source: Source, path: StatePath) -> StatePath:
    """A path within `optim`, in one word if the source was saved with `flatten_optimizer_state_dict`."""
    return (path[0], _key(path[1:])) if source.extras.get("flattened") else path


def _leaves(path: StatePath, value: Any) -> Iterator[tuple[StatePath, Any]]:
    """Open dictionaries, as DCP's planner does; a list of plain values is one value to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    else:
        yield path, value


def _boxes(shape: tuple[int, ...], parts: int) -> Iterator[Region]:
    """Dimension 0 in parts of `ceil(size / parts)` rows, as DTensor cuts it; ranks beyond the last row have none."""
    if 0 in shape[:1] or not shape or parts == 1:
        yield Region.whole(shape)
        return
    rows, rest = max(1, -(-shape[0] // parts)), shape[1:]
    for first in range(0, shape[0], rows):
        yield Region((first, *(0 for _ in rest)), (min(first + rows, shape[0]), *rest))
