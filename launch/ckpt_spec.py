"""`ringhold ckpt spec`: the pattern files there are, what one says, and what it makes of a checkpoint."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import click

from checkpoint.formats.detect import READERS, open_source
from checkpoint.language import Spec
from checkpoint.renaming import Renamed
from checkpoint.source import Source, states_by_name
from launch.display import print_table


@click.command("spec", context_settings={"max_content_width": 100})
@click.argument("spec", required=False)
@click.argument("checkpoint", required=False)
@click.option("--from", "form", type=click.Choice(list(READERS)), help="Format of CHECKPOINT.  [default: found out]")
@click.option("--show", is_flag=True, help="Print the file SPEC itself, to copy and change it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(spec: str | None, checkpoint: str | None, form: str | None, show: bool, as_json: bool) -> None:
    """List the built-in specs; check SPEC, a name or a TOML file; show what it makes of each parameter of CHECKPOINT.

    Where a checkpoint cannot be read by it, the error names the parameter, the pattern, and one that would help.
    docs/patterns.md describes the files.

    \b
    ringhold ckpt spec
    ringhold ckpt spec megatron-gpt-to-hf-llama --show > mine.toml
    ringhold ckpt spec mine.toml iter_0001000
    """
    if spec is None:
        _print_names(as_json)
        return
    found = Spec.find(spec)
    if show:
        print(_text(spec), end="")
        return
    if checkpoint is None:
        counts = {"patterns": len(found.patterns), "names": len(found.names), "vocabularies": len(found.vocabularies)}
        sentence = ", ".join(f"{count} {what}" for what, count in counts.items())
        print(json.dumps({"spec": found.title, **counts}) if as_json else f"{found.title}: {sentence}")
        return
    source: Source = open_source(checkpoint, form, found)
    try:
        rows = _rows(source, found)
    finally:
        source.close()
    if as_json:
        print(json.dumps({"spec": found.title, "format": source.format, "parameters": rows}))
    else:
        cells = [(r["name"], " ".join(r["becomes"]), r["dtype"], str(r["shape"]), " ".join(r["states"])) for r in rows]
        print_table(("parameter", "becomes", "dtype", "shape", "states"), cells)


def _rows(source: Source, spec: Spec) -> list[dict[str, Any]]:
    """What becomes of each parameter; raises what a conversion would."""
    renamed = Renamed(source, spec)
    rows = []
    for name, states in states_by_name(source).items():
        first = next(iter(states.values()))
        found = renamed.spec.targets(name)
        becomes = [name] if found is None else list(found[1])
        row = {"name": name, "becomes": becomes, "dtype": first.dtype, "shape": list(first.shape)}
        rows.append({**row, "states": list(states)})
    return rows


def _print_names(as_json: bool) -> None:
    files = sorted((resources.files("checkpoint") / "specs").iterdir(), key=lambda item: item.name)
    names = [item.name.removesuffix(".toml") for item in files if item.name.endswith(".toml")]
    print(json.dumps({"specs": names}) if as_json else "\n".join(names))


def _text(spec: str) -> str:
    if "/" in spec or spec.endswith(".toml"):
        return Path(spec).read_text()
    return (resources.files("checkpoint") / "specs" / f"{spec}.toml").read_text()
