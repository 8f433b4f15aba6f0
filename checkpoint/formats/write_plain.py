"""Writes one safetensors file with every tensor whole under `NAME|STATE`; groups and extras in its metadata.

The simplest form there is: to look into with any tool, to compare with, and to convert on. Called by `convert`.
"""

import json
from pathlib import Path

from checkpoint.convert import Progress, WriteOptions
from checkpoint.formats.read_safetensors import EXTRAS, GROUPS
from checkpoint.formats.safetensors_file import write_file
from checkpoint.source import Source

FILE = "state.safetensors"


def write(source: Source, folder: Path, options: WriteOptions, progress: Progress) -> None:
    """Write the file into a folder, from which it is moved to the destination."""
    groups = [{"names": group.names, "options": group.options} for group in source.groups]
    metadata = {"format": "pt", GROUPS: json.dumps(groups), EXTRAS: json.dumps(dict(source.extras))}
    write_file(folder / FILE, list(source.entries.items()), source, metadata, progress, options.journal)
