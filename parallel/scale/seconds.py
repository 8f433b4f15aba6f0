"""Seconds by cause: where the time of a pass or of a step goes."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of each cause; they add up, and scale with the number of times."""

    products: float = 0.0
    """Matrix products of layers."""
    attention: float = 0.0
    elementwise: float = 0.0
    """Norms, activations, residuals: what memory limits."""
    vocabulary: float = 0.0
    """Embedding, output layer and loss."""
    tensor: float = 0.0
    """Communication of tensor parallelism that does not hide."""
    context: float = 0.0
    expert: float = 0.0
    stages: float = 0.0
    """Messages between stages of the pipeline."""
    bubble: float = 0.0
    """Waiting for other stages."""
    data: float = 0.0
    """Communication of data parallelism that does not hide."""
    optimizer: float = 0.0

    def __add__(self, other: Self) -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.by_cause().values())

    def by_cause(self) -> dict[str, float]:
        """Seconds by the name of the cause."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
