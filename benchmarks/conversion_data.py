"""Checkpoints of any size for `benchmarks.conversion`: DeepSpeed's by DeepSpeed, DCP's out of blocks of random numbers.

python -m benchmarks.conversion_data dcp FOLDER GIGABYTES      (what the benchmark starts)
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from checkpoint.convert import WriteOptions
from checkpoint.formats import write_dcp
from checkpoint.source import Bytes, Entry, Group
from collectives.region import Region
from tests.harness.foreign import FOREIGN, environment

WIDTH = 4096
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


class Noise:
    """A source of square fp32 matrices and their moments: one block of normal numbers, shifted for each tensor."""

    def __init__(self, nbytes: int) -> None:
        matrices = max(1, round(nbytes / (len(_STATES) * WIDTH * WIDTH * 4)))
        names = tuple(f"layers.{number}.weight" for number in range(matrices))
        entries = [Entry(name, state, "F32", (WIDTH, WIDTH)) for name in names for state in _STATES]
        entries += [Entry(name, "step", "F32", ()) for name in names]
        self.format = "noise"
        self.entries = {entry.key: entry for entry in entries}
        self.groups = [Group(names, {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01})]
        self.extras = {"iteration": 3}
        self._block = np.random.default_rng(7).standard_normal(1 << 22, dtype=np.float32)

    def read(self, key: str, box: Region) -> Bytes:
        """Numbers that differ from tensor to tensor and from box to box."""
        if not box.shape:
            return np.full(1, 3.0, np.float32).view(np.uint8)
        shift = (hash(key) + sum(box.start)) % 1000
        return np.resize(self._block[shift:], box.size).view(np.uint8)

    def close(self) -> None:
        """Nothing to close."""


def write_dcp_folder(folder: Path, gigabytes: float) -> None:
    """Write a DCP folder as four ranks of FSDP2 would, of weights and moments."""
    folder.mkdir()
    write_dcp.write(Noise(int(gigabytes * 1e9)), folder, WriteOptions({"dp": 4}), lambda _: None)


def write_deepspeed(folder: Path, stage: int) -> None:
    """Let DeepSpeed train the large model (504 MB of weights and moments) on four ranks, and save it."""
    launcher = [str(FOREIGN), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    script = ["-m", "tests.fixtures.generators.continue_deepspeed", "--sizes", "large", "--only-save"]
    command = [*launcher, *script, "--stage", str(stage), "--save", str(folder)]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        subprocess.run(command, env=environment(), stdout=log, stderr=subprocess.STDOUT, check=True)


if __name__ == "__main__":
    write_dcp_folder(Path(sys.argv[2]), float(sys.argv[3]))
