"""Real text as training samples, and which samples make the batch of a step.

Used by `launch.trainer` (tokens), `launch.job` (a member's share) and `launch.ledger` (what a step should have used).
The training text is cut into windows that do not overlap; a data epoch is one pass over all windows in an order drawn
from (seed, epoch). The batch of a step is a function of the step alone, so it does not matter who computes it.
"""

import importlib.util
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from collectives.errors import UsageError
from collectives.region import split

_PYTHON_TEXT_LIMIT = 3 << 20
"""Bytes of the default text, at most."""
_VALIDATION_SHARE = 20
"""One byte of so many, from the end, is kept for validation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples each step uses: `windows` samples a data epoch, `batch` a step, in the order that `seed` gives.

    A sample's id is `epoch * windows + window`: unique over the whole run, and it tells which text the sample is.
    """

    windows: int
    batch: int
    seed: int

    def samples(self, step: int) -> list[int]:
        """Return the ids of the samples of a step, in order. A batch may run over into the next data epoch."""
        ids = []
        first = step * self.batch
        for place in range(first, first + self.batch):
            epoch, index = divmod(place, self.windows)
            ids.append(epoch * self.windows + int(_permutation(self.windows, self.seed, epoch)[index]))
        return ids

    def share(self, step: int, rank: int, size: int, unit: int = 1) -> list[int]:
        """Return the samples of a step that `rank` of `size` members computes; none where members outnumber units.

        Every `unit` samples from the first on stay together.
        """
        start, stop = split(-(-self.batch // unit), size)[rank]
        return self.samples(step)[start * unit : stop * unit]

    def position(self, step: int) -> tuple[int, int]:
        """Return the data epoch and the samples of it that are used up before a step."""
        return divmod(step * self.batch, self.windows)


@lru_cache(maxsize=4)
def _permutation(windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text in memory: the part for training and the part held out, uint8, and the context it is cut for."""

    train: Tensor
    validation: Tensor
    context: int

    @property
    def windows(self) -> int:
        """Samples in the training part. The last token of a window predicts the byte after it, so one byte is over."""
        return _windows(self.train, self.context)

    @property
    def validation_windows(self) -> int:
        """Samples in the part held out."""
        return _windows(self.validation, self.context)

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (len(windows), context), int64, of the named training windows."""
        return _cut(self.train, self.context, windows)

    def validation_batch(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets like `batch`, of the part held out."""
        return _cut(self.validation, self.context, windows)


def _windows(text: Tensor, context: int) -> int:
    return max(text.numel() - 1, 0) // context


def _cut(text: Tensor, context: int, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
    start = torch.tensor(windows, dtype=torch.int64) * context
    tokens = text[start.unsqueeze(1) + torch.arange(context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


def load(files: Sequence[str], context: int, batch: int) -> Corpus:
    """Read the text files in order, or Python's own text if none are named.

    Raises:
        UsageError: a file cannot be read or is empty, or the text is too short for one batch and one held-out sample.

    """
    text = b"\n".join(_read(Path(name)) for name in files) if files else python_text()
    held_out = len(text) // _VALIDATION_SHARE
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    corpus = Corpus(tokens[: len(text) - held_out], tokens[len(text) - held_out :], context)
    if corpus.windows < batch or corpus.validation_windows < 1:
        # The smallest lengths that leave a batch, and a window, once the tail is cut off.
        needed = max(
            batch * context * _VALIDATION_SHARE // (_VALIDATION_SHARE - 1) + 1, (context + 1) * _VALIDATION_SHARE
        )
        raise UsageError(
            f"{', '.join(files) or 'the text that ships with Python'}: {len(text)} bytes are too short for batches of "
            f"{batch} samples of {context} tokens and a held-out sample; give at least {needed} bytes, or a smaller "
            "batch or context"
        )
    return corpus


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name a readable text file") from None
    if not text:
        raise UsageError(f"{path} is empty; name a file with text")
    return text


def python_text() -> bytes:
    """Return the text that ships with this Python: pydoc's topics, then top-level library sources by name, up to 3 MiB.

    The same Python version gives the same bytes everywhere; files that describe the machine are left out.

    Raises:
        UsageError: this Python came without its library's sources.

    """
    parts = []
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        from pydoc_data.topics import topics

        parts = [topics[name].encode() for name in sorted(topics)]
    total = sum(map(len, parts))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        size = path.stat().st_size
        if not path.name.startswith("_sysconfigdata") and total + size <= _PYTHON_TEXT_LIMIT:
            parts.append(path.read_bytes())
            total += size
    if not parts:
        raise UsageError("this Python came without its library's sources; name text files with --data")
    return b"\n".join(parts)
