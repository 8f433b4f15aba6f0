"""A pipeline of stages, followed microbatch by microbatch: one forward, one backward, plain or interleaved.

The order of passes on each stage is that of PipeDream-flush and of the interleaved schedule of Narayanan et al.
(arXiv 2104.04473). `predict.py` calls it.
"""

from collections.abc import Sequence

Op = tuple[bool, int, int]
"""Whether it is a backward pass, microbatch, chunk of the stage."""


def makespan(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], microbatches: int, hop: float = 0.0
) -> float:
    """Seconds until the last backward pass of the first stage is done.

    Args:
        forward, backward: seconds of each stage's chunks; chunk c of stage s is part c * stages + s of the model.
        microbatches: of the step; of a multiple of the stages if there are several chunks.
        hop: seconds of a message from a part to the next, which does not hide.

    Long steps are followed for some rounds only: between filling and draining, every further round takes as long as
    the busiest stage does.

    """
    stages, chunks = len(forward), len(forward[0])
    if stages == 1:
        return microbatches * (sum(forward[0]) + sum(backward[0]))
    followed = min(microbatches, 4 * stages)
    followed -= (followed - microbatches) % stages if chunks > 1 else 0
    busiest = max(sum(forward[s]) + sum(backward[s]) + 2 * chunks * hop for s in range(stages))
    orders = [_order(stage, stages, chunks, followed) for stage in range(stages)]
    return _follow(orders, forward, backward, hop) + (microbatches - followed) * busiest


def _order(stage: int, stages: int, chunks: int, microbatches: int) -> list[Op]:
    """The passes of a stage, in its order."""
    total = microbatches * chunks
    forwards = [_nth(number, stages, chunks, False) for number in range(total)]
    backwards = [_nth(number, stages, chunks, True) for number in range(total)]
    warm = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    warm = min(warm, total)
    order = forwards[:warm]
    for number in range(warm, total):
        order += [forwards[number], backwards[number - warm]]
    return order + backwards[total - warm :]


def _nth(number: int, stages: int, chunks: int, backward: bool) -> Op:
    if chunks == 1:
        return backward, number, 0
    round_, inside = divmod(number, stages * chunks)
    chunk, place = divmod(inside, stages)
    return backward, round_ * stages + place, chunks - 1 - chunk if backward else chunk


def _follow(
    orders: Sequence[Sequence[Op]], forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], hop: float
) -> float:
    stages, chunks = len(orders), len(forward[0])
    done: dict[tuple[bool, int, int], float] = {}
    clock, at = [0.0] * stages, [0] * stages
    waiting = set(range(stages))
    while waiting:
        for stage in sorted(waiting):
            while at[stage] < len(orders[stage]):
                back, microbatch, chunk = orders[stage][at[stage]]
                part = chunk * stages + stage
                before = (back, microbatch, part + 1 if back else part - 1)
                if back and part == stages * chunks - 1:
                    before = (False, microbatch, part)
                ready = 0.0 if before[2] < 0 else done.get(before)
                if ready is None:
                    break
                took = (backward if back else forward)[stage][chunk]
                arrived = ready + (hop if before[2] >= 0 and before[2] != part else 0.0)
                clock[stage] = max(clock[stage], arrived) + took
                done[back, microbatch, part] = clock[stage]
                at[stage] += 1
            else:
                waiting.discard(stage)
    return max(clock)


def split_layers(layers: int, parts: int) -> list[int]:
    """Layers of each part of a model: even, but the last and the first have fewer, for they do more besides."""
    counts = [-(-layers // parts)] * parts
    spare = sum(counts) - layers
    by_turns = [place for pair in zip(range(parts - 1, -1, -1), range(parts), strict=True) for place in pair]
    for place in list(dict.fromkeys(by_turns))[:spare]:
        counts[place] -= 1
    return counts
