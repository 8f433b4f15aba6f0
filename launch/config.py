"""What a training job is to do: one value, checked once, that a supervisor hands to its peers as JSON.

Made by the command line, read by `launch.job`, `launch.reference` and `launch.trainer`. Checking a config touches the
disk only to see that the files it names are there; their content is judged by `launch.data`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import msgspec

from collectives.errors import UsageError

Preset = Literal["tiny", "1m", "10m", "100m"]
DType = Literal["fp32", "fp64"]
PRESET_NAMES: tuple[Preset, ...] = get_args(Preset)
DTYPE_NAMES: tuple[DType, ...] = get_args(DType)
_GRID = re.compile(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """A training job. Lengths are in tokens (bytes of text), batches in samples of `context` tokens.

    What the steps compute (`preset`, `context`, `batch`, `dtype`, `seed`, the text) has to be the same on every member
    and in a file that is resumed from; the learning rate and its schedule are part of the training state, so members
    that join and runs that resume take them over.

    Raises:
        UsageError: a value is out of range, names an unknown choice, or a file is not there.

    """

    preset: Preset = "1m"
    """Size of the model, a key of `launch.model.PRESETS`."""
    steps: int = 120
    """The run is over when this many steps are committed, counted from the very first, not from a resume."""
    batch: int = 16
    """Samples of a step, over all members."""
    context: int = 64
    """Tokens of a sample."""
    microbatch: int = 16
    """Most samples in one pass; a member's share is computed in as few passes as that allows."""
    reproducible: bool = False
    """The batch is cut into microbatches of this size for good, and their gradients are summed exactly: the final state
    is that of one process, to the bit, whoever computed what."""
    lr: float = 1e-3
    """Highest learning rate, reached after `warmup` steps. The higher, the more rounding grows that depends on how the
    batch is divided: below 1e-7 of the loss in 120 steps here, 1e-6 at three times this (fp32)."""
    warmup: int = 10
    decay_steps: int | None = None
    """Step at which the cosine reaches its floor, a tenth of `lr`; None: `steps`."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest global norm of the gradient."""
    dtype: DType = "fp32"
    seed: int = 0
    eval_every: int = 20
    """Evaluation after every so many steps and after the last; 0: none."""
    eval_samples: int = 32
    hash_every: int = 10
    """The ledger records the hash of the whole state after every so many steps; 0: never."""
    buckets: int = 3
    """Flat pieces in which the gradient is reduced."""
    sample_tokens: int = 160
    """Length of the text that the trained model writes at the end; 0: none."""
    plan: str = ""
    """Shard the step over the members by a plan: "auto" on a mesh of one axis, "AxB" on one of two as long as there are
    that many members. Empty: each member has all of the state and computes a share of the batch."""
    pins: dict[str, str] = dataclasses.field(default_factory=dict)
    """Placements that a plan must give to parameters, optimizer state or the batch: as `{"batch.0": "S(0)"}`."""
    redundancy: int = 0
    """1: what a member holds alone is kept a second time by another."""
    data: tuple[str, ...] = ()
    """Text files to train on; empty: the text that ships with Python (`launch.data`)."""
    out: str = "run"
    """Folder of the results: `peers/*.jsonl`, `final.safetensors`, `final.json`."""
    resume: str | None = None
    """What to start from: a `final.safetensors`, or a store of checkpoints, perhaps with `@STEP`."""
    checkpoint: str = ""
    """Folder or URL of a store to which checkpoints are saved; empty: none are."""
    checkpoint_every: int = 20
    """After every so many steps, and after the last."""
    shard_optimizer: bool = False
    """Each member writes a flat part of the optimizer's moments, and nobody all of them."""

    def __post_init__(self) -> None:
        _choose("preset", self.preset, PRESET_NAMES)
        _choose("dtype", self.dtype, DTYPE_NAMES)
        for name in ("steps", "batch", "context", "microbatch", "buckets", "eval_samples", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "eval_every", "hash_every", "sample_tokens", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.redundancy in (0, 1), "redundancy", self.redundancy, "0 or 1")
        if self.plan and self.plan != "auto" and not _GRID.fullmatch(self.plan):
            raise UsageError(f"plan is auto or a mesh such as 2x2, not {self.plan!r}")
        if not self.plan and (self.pins or self.redundancy):
            raise UsageError("pins and redundancy belong to a plan; give --plan auto as well")
        if self.shard_optimizer and not self.checkpoint:
            raise UsageError("--shard-optimizer is about checkpoints; give --checkpoint as well")
        if self.plan and self.reproducible:
            raise UsageError("a planned step sums as its plan says, not reproducibly; drop --plan or --reproducible")
        _require(self.seed < 1 << 63, "seed", self.seed, "less than 2**63")
        _require(self.decay_steps is None or self.decay_steps >= 1, "decay_steps", self.decay_steps, "at least 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a positive number")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more"
        )
        for name in self.data:
            if not Path(name).is_file():
                what = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
                raise UsageError(f"{name} {what}; name an existing file")
        if self.resume is not None and "://" not in self.resume:
            there = any(Path(name).exists() for name in (self.resume, self.resume.rpartition("@")[0] or self.resume))
            _require(there, "resume", self.resume, "a file or a store of checkpoints that is there")

    @property
    def out_dir(self) -> Path:
        """`out` as a path."""
        return Path(self.out)

    def replace(self, **changes: object) -> Self:
        """Return a copy with other values, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    def to_json(self) -> str:
        """Return the config as one line of JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UsageError: not JSON, an unknown or missing name, a value of another type, or one out of range.

        """
        try:
            values = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
            if unknown:
                raise UsageError(f"a job has no setting {', '.join(map(repr, unknown))}; remove it")
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UsageError(f"this is not the JSON of a training job: {error}") from None


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is one of {', '.join(choices)}, not {value!r}")


def _require(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise UsageError(f"{name} has to be {bound}, not {value}")
