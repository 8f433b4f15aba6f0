"""Every way to divide a training step among so many devices, the best first.

`ringhold plan --config` calls it. Divisions that do not fit in memory are dropped before they are timed; the rest are
ranked by formula, and those that differ in nothing that matters are folded. The pipelines of those in front are
followed microbatch by microbatch, with what a program for the inside of a stage finds (`parallel.stages`).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import msgspec

from collectives.errors import RingholdError, UsageError
from parallel.scale.cluster import Cluster
from parallel.scale.layer import Layers
from parallel.scale.memory import peak
from parallel.scale.predict import Prediction, predict
from parallel.scale.strategy import Precision, Recompute, Strategy
from parallel.scale.transformer import Transformer

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_MICROBATCHES = (1, 2, 4, 8)
_FOLLOWED = 3
"""So many times as many divisions as are wanted are followed through their pipelines."""
_ALIKE = 0.02
"""Share of the time within which divisions whose passes are the same count as alike."""

Inside = Callable[[Layers], tuple[float, float]]
"""Seconds of a layer's forward and backward pass that the best plan of a stage's inside saves."""


class DoesNotFit(RingholdError):
    """No plan keeps within the memory of a device."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A division and what it takes, and the divisions that are as good: they cut the same tokens otherwise."""

    strategy: Strategy
    prediction: Prediction
    alike: tuple["Candidate", ...] = ()

    def why(self, better: "Candidate") -> str:
        """Why it loses to a better one: the causes in which the time differs most."""
        mine, other = self.prediction.seconds.by_cause(), better.prediction.seconds.by_cause()
        slower = sorted(((mine[cause] - other[cause], cause) for cause in mine), reverse=True)
        limit = 0.1 * (self.prediction.time - better.prediction.time)
        lost = [f"{cause} +{seconds:.3g} s" for seconds, cause in slower[:3] if seconds > limit]
        won = [f"{cause} {seconds:.3g} s" for seconds, cause in slower[::-1][:1] if seconds < -limit]
        return ", ".join(lost) + (f" (but {won[0]})" if won else "")


@dataclass(frozen=True, slots=True)
class Found:
    """The best divisions, and how many there were.

    Attributes:
        best: the fastest first; of each dp x tp x pp x cp x ep the fastest of its microbatches, interleavings and
            amounts of recomputation. Those that only trade samples for parts of a sequence (dp and microbatches for
            cp) and are within 2% of each other are one.
        tried: strategies that the model allows.
        pruned: of these, how many do not fit in memory.

    """

    best: tuple[Candidate, ...]
    tried: int
    pruned: int


def search(
    model: Transformer,
    cluster: Cluster,
    devices: int,
    batch: int,
    count: int = 10,
    precision: Precision = "bf16",
    memory: float | None = None,
    inside: Inside | None = None,
) -> Found:
    """Find the fastest divisions of a step of `batch` sequences among `devices`.

    Args:
        model, cluster: what is trained, and on what.
        devices, batch: how many there are, and sequences of a step.
        count: of divisions to return.
        precision: of the large matrix products.
        memory: bytes of a device that may be used; None: all of it.
        inside: plans the insides of stages; None: they are as the formulas have them.

    Raises:
        UsageError: there is no way to divide the model so.
        DoesNotFit: there is, but none that keeps within the memory.

    """
    limit = cluster.memory if memory is None else memory
    tried, least = 0, (float("inf"), "")
    fitting: list[Candidate] = []
    for strategy in strategies(model, cluster, devices, batch, precision):
        tried += 1
        needed = peak(Layers(model, strategy, cluster)).total
        least = min(least, (needed, str(strategy)))
        if needed <= limit:
            fitting.append(Candidate(strategy, predict(model, strategy, cluster, follow=False)))
    if not tried:
        raise UsageError(
            f"nothing divides {model.layers} layers of {model.heads} heads and a batch of {batch} among {devices} "
            f"devices; take another number of devices or a batch that it divides"
        )
    if not fitting:
        raise DoesNotFit(
            f"none of {tried} divisions fits in {limit / 1e9:.4g} GB a device; the least is {least[0] / 1e9:.4g} GB, "
            f"of {least[1]}; take more devices or a smaller batch"
        )
    ranked = sorted(fitting, key=_time)
    ahead = _folded(_first_of_each(ranked, _division))[: _FOLLOWED * count]
    divisions = {_division(c.strategy) for candidate in ahead for c in (candidate, *candidate.alike)}
    again = [c for c in ranked if _division(c.strategy) in divisions]
    followed = [_follow(model, cluster, c) for group in _grouped(again, _division) for c in group[:2]]
    best = _best(followed, count)
    if inside is not None:
        best = _best([planned for kept in best for planned in _planned(model, cluster, kept, inside)], count)
    return Found(tuple(best), tried, tried - len(fitting))


def strategies(
    model: Transformer, cluster: Cluster, devices: int, batch: int, precision: Precision
) -> Iterator[Strategy]:
    """Every division that the model allows: tensor and expert parallelism within a node."""
    for tp in _divisors(devices):
        if tp > cluster.node or (devices > cluster.node and cluster.node % tp):
            continue  # a group would lie across nodes
        for pp in _divisors(devices // tp):
            if pp > model.layers:
                continue
            for cp in _divisors(devices // (tp * pp)):
                dp = devices // (tp * pp * cp)
                if (cp > 1 and (cp & (cp - 1) or model.seq // cp < 1024)) or batch % dp:
                    continue
                yield from _variants(
                    model, cluster, Strategy(batch=batch, dp=dp, tp=tp, pp=pp, cp=cp, precision=precision)
                )


def _variants(model: Transformer, cluster: Cluster, base: Strategy) -> Iterator[Strategy]:
    experts = [ep for ep in _divisors(model.experts) if ep * base.tp <= max(cluster.node, base.tp)]
    for ep in experts:
        for microbatch in _MICROBATCHES:
            if base.batch % (base.dp * microbatch):
                continue
            for interleave in _interleavings(model.layers, base.pp):
                for recompute in _RECOMPUTE:
                    if recompute == "selective" and cluster.flash:
                        continue  # fused attention computes its scores again in any case
                    strategy = msgspec.structs.replace(
                        base, ep=ep, microbatch=microbatch, interleave=interleave, recompute=recompute
                    )
                    if _allowed(strategy, model):
                        yield strategy


def _allowed(strategy: Strategy, model: Transformer) -> bool:
    try:
        strategy.check(model)
    except UsageError:
        return False
    return True


def _interleavings(layers: int, pp: int) -> list[int]:
    """Plain, and parts of equal numbers of layers: one, or two and so on."""
    if pp == 1:
        return [1]
    each = -(-layers // pp)
    return sorted({1} | {each // size for size in (1, 2, 4) if each % size == 0})


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _division(strategy: Strategy) -> Hashable:
    return strategy.dp, strategy.tp, strategy.pp, strategy.cp, strategy.ep


def _passes(strategy: Strategy) -> Hashable:
    """What a microbatch's passes and the memory depend on, but for the exchange of keys and values."""
    tokens = Fraction(strategy.microbatch, strategy.cp)
    return strategy.tp, strategy.pp, strategy.ep, strategy.interleave, strategy.recompute, tokens


def _time(candidate: Candidate) -> float:
    return candidate.prediction.time


def _grouped(candidates: Iterable[Candidate], key: Callable[[Strategy], Hashable]) -> list[list[Candidate]]:
    groups: dict[Hashable, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(key(candidate.strategy), []).append(candidate)
    return list(groups.values())


def _first_of_each(candidates: Iterable[Candidate], key: Callable[[Strategy], Hashable]) -> list[Candidate]:
    return [group[0] for group in _grouped(candidates, key)]


def _folded(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of candidates in order of their time: those that are alike as one, the fastest standing for them."""
    found: list[Candidate] = []
    for group in _grouped(candidates, _passes):
        rest = group
        while rest:
            limit = rest[0].prediction.time * (1.0 + _ALIKE)
            alike = tuple(c for c in rest[1:] if c.prediction.time <= limit)
            found.append(replace(rest[0], alike=alike))
            rest = rest[1 + len(alike) :]
    return sorted(found, key=_time)


def _best(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    return _folded(_first_of_each(sorted(candidates, key=_time), _division))[:count]


def _follow(
    model: Transformer, cluster: Cluster, candidate: Candidate, saved: tuple[float, float] = (0.0, 0.0)
) -> Candidate:
    return Candidate(candidate.strategy, predict(model, candidate.strategy, cluster, saved=saved))


def _planned(model: Transformer, cluster: Cluster, candidate: Candidate, inside: Inside) -> list[Candidate]:
    """A candidate and those that are alike with what the plan of its stages' inside saves."""
    saved = inside(Layers(model, candidate.strategy, cluster))
    return [_follow(model, cluster, each, saved) for each in (candidate, *candidate.alike)]
