"""busbw: what makes the speeds of unlike collectives comparable with that of a link, whatever the number of ranks.

Used by the simulator and by `ringhold bench`. The definitions are those of nccl-tests (doc/PERFORMANCE.md).
"""

_SHARES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1, "gather": 1, "scatter": 1}


def bus_factor(kind: str, world: int) -> float:
    """Return busbw / algbw: how often a rank moves its share, all of the buffer but its own part; 1 for other kinds."""
    return _SHARES[kind] * (world - 1) / world if kind in _SHARES else 1.0
