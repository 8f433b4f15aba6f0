"""How DeepSpeed says that tensor parallel shards combine, put into patterns.

`universal_checkpoint_info` (versions 0.1 to 0.4 of the universal checkpoint) lists patterns by category, matched at the
start of a name; version 0.4 may add an affine map, which gives every block of every rank. Source:
`deepspeed/checkpoint/ds_to_universal.py` and `affine_ir_spec.md` of DeepSpeed 0.19. Called by the DeepSpeed readers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.language import Pattern, Spec, SpecError, Vocabulary, compiled
from checkpoint.lazy import Lazy, Part, PiecesMissing, Placed, row_major
from checkpoint.unpickle import Opaque
from collectives.region import Region

_NAMED: tuple[tuple[str, str, dict[str, Any]], ...] = (  # in the order in which DeepSpeed asks them
    ("tp_replicated_parameter_patterns", "replicated", {}),
    ("parameter_to_average_patterns", "average", {}),
    ("parameter_with_2_sub_params_cat_dim_0", "fragment", {"parts": 2}),
    ("parameter_with_sub_params", "", {}),
    ("parameter_with_row_parallelism_patterns", "fragment", {"dim": 1}),
    ("autotp_unsupported_parameter_patterns", "refuse", {}),
)


def spec_of(info: Mapping[str, Any]) -> Spec:
    """Translate `universal_checkpoint_info`: what it does not name is cut along dimension 0.

    Raises:
        SpecError: the info is malformed.

    """
    patterns: list[Pattern] = []
    for rank, (key, how, rest) in enumerate(_NAMED):
        for item in info.get(key) or ():
            if how:
                patterns.append(Pattern(_open(item), how, rank=rank, **rest))
            else:
                patterns.extend(_fused(item, info, rank))
    patterns += [
        Pattern(_open(item), "replicated", axis="pp")
        for item in info.get("pipeline_replicated_parameter_patterns") or ()
    ]
    patterns.append(Pattern(r"tied_modules\..*", "replicated", axis="pp", rank=1))
    rows = info.get("original_vocab_size")
    named = info.get("vocabulary_parameter_patterns") or ()
    if named and not isinstance(rows, int):
        raise SpecError("universal_checkpoint_info names vocabulary parameters and no original_vocab_size")
    return Spec(
        tuple(patterns),
        tuple(Vocabulary(_open(item), int(rows or 0)) for item in named),
        default={"tp": Pattern(".*", "fragment", dim=0), "pp": Pattern(".*", "unique", axis="pp")},
        title="universal_checkpoint_info",
    )


def _open(pattern: Any) -> str:
    """A pattern that matches at the start of a name, as one that matches whole names."""
    if not isinstance(pattern, str):
        raise SpecError(f"universal_checkpoint_info has {pattern!r} among its patterns")
    return f"(?:{pattern})(?s:.*)"


def _fused(item: Any, info: Mapping[str, Any], rank: int) -> list[Pattern]:
    """Patterns of one `SubparamShape`: fused parameters, each cut by itself along a dimension."""
    row = item.state if isinstance(item, Opaque) else item
    try:
        names, shape, dim = row["patterns"], row["shape"], int(row["partition_dim"])
        sizes = shape[dim]
    except (KeyError, TypeError, IndexError, ValueError):
        raise SpecError(f"universal_checkpoint_info has malformed sub-parameters: {item!r}") from None
    widths = info.get("sub_param_shard_widths") or {}
    parts = tuple(int(size) for size in sizes) if isinstance(sizes, list | tuple) else int(sizes)
    return [
        Pattern(
            _open(name),
            "fragment",
            dim=dim,
            parts=parts,
            widths=tuple(tuple(int(w) for w in row) for row in widths.get(name, ())),
            rank=rank,
        )
        for name in names
    ]


def by_affine_map(name: str, info: Mapping[str, Any], shards: Sequence[Lazy]) -> Lazy | None:
    """Put a parameter together as the affine map says; None if the info has none for it.

    A map whose pieces are scaled or no boxes of both tensors is left to the categories, which the info carries too.

    Raises:
        PiecesMissing: the map and the shards do not fit each other.

    """
    table = info.get("affine_map") or {}
    if table.get("version", 1) != 1:
        raise SpecError(f"affine map of version {table['version']}; Ringhold knows version 1")
    params = table.get("params") or {}
    found = [row for pattern, row in params.items() if compiled(pattern).match(name)]
    if not found:
        return None
    try:
        shape = tuple(int(n) for n in found[0]["logical_shape"])
        ranks = {int(rank): row for rank, row in found[0]["ranks"].items()}
        parts: list[Part] = []
        taken: set[Region] = set()
        for rank, row in sorted(ranks.items()):
            held = tuple(int(n) for n in row["shard_shape"])
            if rank >= len(shards) or shards[rank].shape != held:
                raise PiecesMissing(
                    f"{name}: rank {rank} stores shape {shards[rank].shape}, its affine map says {held}"
                )
            for piece in row["pieces"]:
                box, start = _box(piece["source"], piece["shape"], shape), _box(piece["dest"], piece["shape"], held)
                if box is None or start is None or float(piece.get("scale", 1.0)) != 1.0:
                    return None
                if box not in taken:
                    parts.append(Part(box, shards[rank], start.start))
                    taken.add(box)
    except (KeyError, TypeError, ValueError, IndexError):
        raise SpecError(f"{name}: its affine map is malformed") from None
    return Placed(name, shape, parts)


def _box(side: Any, extent: Any, shape: tuple[int, ...]) -> Region | None:
    """The box that offset and strides describe in a row-major tensor; None if they describe none."""
    offset, strides = int(side[0]), tuple(int(n) for n in side[1])
    extents = tuple(int(n) for n in extent)
    steps = row_major(shape)
    if len(extents) != len(shape) or any(n != s for n, s, e in zip(strides, steps, extents, strict=True) if e > 1):
        return None
    if offset >= math.prod(shape) or 0 in extents:
        return None
    start = tuple(offset // step % size for step, size in zip(steps, shape, strict=True))
    stop = tuple(a + e for a, e in zip(start, extents, strict=True))
    return Region(start, stop) if all(b <= n for b, n in zip(stop, shape, strict=True)) else None
