"""Writes what Hugging Face libraries load: safetensors shards of at most 5 GB, with an index, tied names left out.

Of each name the most exact weight is written: the fp32 master where there is one; `--dtype bf16` rounds it. Names that
share a tensor are written once, and the index's metadata says `{"alias": "owner"}` as huggingface_hub does. Called by
`convert`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from checkpoint.convert import Progress, WriteOptions
from checkpoint.formats.safetensors_file import Named, write_file
from checkpoint.source import Source, states_by_name, weight_key

SHARD_BYTES = 5 * 10**9
"""As huggingface_hub cuts by default; one tensor may be larger."""
INDEX = "model.safetensors.index.json"


def write(source: Source, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write the shards and, of more than one, or with tied names, the index."""
    aliases = {alias: owner for owner, *others in source.extras.get("tied", ()) for alias in others}
    names = [name for name in states_by_name(source) if name not in aliases]
    named = [(name, source.entries[key]) for name in names if (key := weight_key(source, name))]
    shards = list(_shards(named))
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, source, {"format": "pt"}, progress, options.journal)
    if len(shards) > 1 or aliases:
        total = sum(entry.nbytes for _, entry in named)
        table = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        index = {"metadata": {"total_size": total, **aliases}, "weight_map": table}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(named: list[Named]) -> Iterator[list[Named]]:
    shard: list[Named] = []
    size = 0
    for name, entry in named:
        if shard and size + entry.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, entry))
        size += entry.nbytes
    if shard:
        yield shard
