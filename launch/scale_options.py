"""What `ringhold predict` and `ringhold plan --config` have in common: the options that describe a model."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from collectives.errors import UsageError
from parallel.scale import files
from parallel.scale.transformer import Transformer

Command = TypeVar("Command", bound=Callable[..., Any])

NUMBERS = {
    "layers": "Number of layers.",
    "hidden": "Width of the model.",
    "heads": "Attention heads.",
    "kv_heads": "Heads of keys and values.  [default: as many as heads]",
    "ffn": "Width of a feed-forward block.  [default: 4 x hidden]",
    "vocab": "Words of the vocabulary.",
    "seq": "Tokens of a sequence.",
    "experts": "Experts of a layer.",
    "top_k": "Experts that a token visits.",
}


def model_options(command: Command) -> Command:
    """Add --config and a flag for each number of a model, which goes before what the file says."""
    for name, text in reversed(NUMBERS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, type=click.IntRange(1), help=text)(command)
    command = click.option("--gated/--not-gated", default=None, help="Feed-forward blocks of three matrices.")(command)
    command = click.option("--tied/--not-tied", default=None, help="One table for embedding and output.")(command)
    return click.option("--config", metavar="NAME|FILE", help="Model: a name that ships, or a .json file.")(command)


def model_of(config: str | None, given: dict[str, Any]) -> Transformer:
    """The model that the options describe.

    Raises:
        UsageError: too little is said of it, or what is said does not make a model.

    """
    numbers = {name: given[name] for name in (*NUMBERS, "gated", "tied") if given.get(name) is not None}
    if config is not None:
        model = Transformer.load(config)
        return msgspec.structs.replace(model, **numbers) if numbers else model
    if missing := [name for name in ("layers", "hidden", "heads", "vocab", "seq") if name not in numbers]:
        flags = ", ".join(f"--{name}" for name in missing)
        known = ", ".join(files.names("models"))
        raise UsageError(f"--config is needed ({known}, or a .json file), or else also {flags}")
    numbers.setdefault("ffn", 4 * numbers["hidden"])
    return Transformer(**numbers)
