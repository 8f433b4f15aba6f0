"""The kinds of collectives that `ringhold bench` measures, and the arithmetic of its columns.

The definitions are those of nccl-tests (doc/PERFORMANCE.md): `size` is the larger of what a rank gives and gets, algbw
is size over time, and busbw is algbw times a factor that makes the number comparable with the speed of a link, whatever
the number of ranks. Nothing here imports torch: the command line reads it for its help.
"""

from dataclasses import dataclass

DTYPES: dict[str, tuple[str, int]] = {
    "float": ("float32", 4),
    "double": ("float64", 8),
    "half": ("float16", 2),
    "bfloat16": ("bfloat16", 2),
    "int8": ("int8", 1),
    "uint8": ("uint8", 1),
    "int32": ("int32", 4),
    "int64": ("int64", 8),
}
"""nccl-tests' name of a type: torch's name, and bytes."""
OPS = ("sum", "prod", "min", "max", "avg")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the columns of one kind mean.

    Attributes:
        parts: the buffer of `size` bytes has a part for each rank, and `count` is a part's elements.
        reduces: takes a reduce op.
        rooted: takes a root.
        out_of_place, in_place: which forms there are.

    """

    name: str
    parts: bool = False
    reduces: bool = False
    rooted: bool = False
    out_of_place: bool = True
    in_place: bool = True


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("all_reduce", reduces=True),
        Kind("reduce_scatter", parts=True, reduces=True, in_place=False),
        Kind("all_gather", parts=True),
        Kind("all_to_all", parts=True, in_place=False),
        Kind("reduce", reduces=True, rooted=True),
        Kind("gather", parts=True, rooted=True, in_place=False),
        Kind("scatter", parts=True, rooted=True, in_place=False),
        Kind("broadcast", rooted=True, out_of_place=False),
        Kind("barrier", out_of_place=False),
    )
}


def elements(kind: Kind, size: int, item: int, ranks: int, lanes: int) -> int:
    """Elements of one lane's buffer: as many of `item` bytes as fit in `size` / `lanes`, whole parts for every rank."""
    count = size // item // lanes
    return count // ranks * ranks if kind.parts else count


def bandwidth(size: int, seconds: float) -> float:
    """Return algbw in GB/s (1e9 bytes), 0 for nothing."""
    return size / seconds / 1e9 if size else 0.0
