"""Models that know nothing of ranks, on sequences that are spread over them."""

from collections.abc import Iterator

import pytest

from tests.harness.residents import Residents
from tests.parallel.attention import llama_programs as programs


@pytest.fixture(scope="module")
def group() -> Iterator[Residents]:
    with Residents(2, transport="sockets") as residents:
        yield residents


@pytest.mark.parametrize(
    "balance, scheme, documents",
    [
        ("zigzag", "token_ring", []),
        ("contiguous", "ring", []),
        ("striped", "ulysses", []),
        ("zigzag", "ring", [11, 5, 21]),
    ],
)
def test_a_hugging_face_llama_runs_through_it(
    balance: str, scheme: str, documents: list[int], group: Residents
) -> None:
    for found in group.run(programs.errors, length=37, balance=balance, scheme=scheme, documents=documents):
        assert max(found) <= 1e-10


def test_what_cannot_be_spread_is_refused(group: Residents) -> None:
    whys = ("cannot use a mask", "has no dropout", "need enable_gqa", "turn caches off")
    for said in group.run(programs.refusals):
        assert len(said) == len(whys)
        for text, why in zip(said, whys, strict=True):
            assert text.startswith("UsageError: ") and why in text
