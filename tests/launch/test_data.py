"""Text and samples: every sample once an epoch, shares that add up, and errors that name the file."""

from pathlib import Path

import pytest
import torch

from collectives.errors import UsageError
from launch import data
from launch.data import Corpus, Plan


def test_every_sample_of_an_epoch_is_used_exactly_once_and_epochs_differ() -> None:
    plan = Plan(windows=13, batch=4, seed=3)
    used = [sample for step in range(13) for sample in plan.samples(step)]  # four epochs
    for epoch in range(4):
        assert sorted(used[13 * epoch : 13 * epoch + 13]) == list(range(13 * epoch, 13 * epoch + 13))
    orders = {tuple(sample % 13 for sample in used[13 * epoch : 13 * epoch + 13]) for epoch in range(4)}
    assert len(orders) == 4


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    plan = Plan(100, 8, seed=1)
    later = plan.samples(40)
    assert Plan(100, 8, seed=1).samples(40) == later
    assert Plan(100, 8, seed=2).samples(40) != later


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
def test_shares_are_the_batch_in_order_and_balanced(size: int) -> None:
    plan = Plan(50, 8, seed=0)
    shares = [plan.share(3, rank, size) for rank in range(size)]
    assert [sample for share in shares for sample in share] == plan.samples(3)
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_shares_of_units_never_cut_a_unit(size: int) -> None:
    plan = Plan(windows=100, batch=11, seed=2)
    shares = [plan.share(3, rank, size, unit=4) for rank in range(size)]
    assert [sample for share in shares for sample in share] == plan.samples(3)
    assert sorted(len(share) % 4 for share in shares if share) == [*[0] * (sum(map(bool, shares)) - 1), 3]
    assert sum(map(bool, shares)) == min(size, 3)


def test_position_counts_whole_epochs_and_the_rest() -> None:
    plan = Plan(windows=10, batch=4, seed=0)
    assert [plan.position(step) for step in (0, 2, 3, 5)] == [(0, 0), (0, 8), (1, 2), (2, 0)]


def test_windows_do_not_overlap_and_targets_are_the_next_bytes() -> None:
    text = torch.arange(21, dtype=torch.uint8)
    corpus = Corpus(text, text[:11], context=5)
    assert (corpus.windows, corpus.validation_windows) == (4, 2)
    inputs, targets = corpus.batch([3, 0])
    assert inputs.tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]
    assert targets.tolist() == [[16, 17, 18, 19, 20], [1, 2, 3, 4, 5]]
    assert inputs.dtype == torch.int64


def test_files_are_joined_in_order_and_the_tail_is_held_out(tmp_path: Path) -> None:
    names = []
    for index, letter in enumerate("ab"):
        path = tmp_path / f"{index}.txt"
        path.write_text(letter * 1000)
        names.append(str(path))
    corpus = data.load(names, context=8, batch=2)
    whole = bytes(torch.cat((corpus.train, corpus.validation)).tolist())
    assert whole == b"a" * 1000 + b"\n" + b"b" * 1000
    assert corpus.validation.numel() == 100


def test_the_default_text_is_a_few_megabytes_and_the_same_each_time() -> None:
    text = data.python_text()
    assert 1 << 20 < len(text) <= (3 << 20) + 1000
    assert data.python_text() == text
    assert data.load((), 64, 16).windows > 10_000


def test_unusable_files_are_refused_by_name(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("too short")
    cases = [
        (tmp_path / "missing.txt", "cannot read .*missing.txt: No such file"),
        (tmp_path, "cannot read .*Is a directory"),
        (empty, "empty.txt is empty"),
        (short, r"short.txt: 9 bytes are too short for batches of 4 samples of 8 tokens"),
    ]
    for path, message in cases:
        with pytest.raises(UsageError, match=message) as caught:
            data.load([str(path)], context=8, batch=4)
        assert caught.value.exit_code == 2


def test_the_length_that_an_error_asks_for_suffices(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for context, batch in ((8, 4), (64, 1), (3, 100)):
        path.write_text("x")
        with pytest.raises(UsageError, match="bytes are too short") as caught:
            data.load([str(path)], context, batch)
        needed = int(str(caught.value).split("at least ")[1].split()[0])
        path.write_text("x" * needed)
        assert data.load([str(path)], context, batch).windows >= batch
        path.write_text("x" * (needed - 1))
        with pytest.raises(UsageError):
            data.load([str(path)], context, batch)
