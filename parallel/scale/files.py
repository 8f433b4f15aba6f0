"""The JSON files of this package: models and hardware, by name or by path."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from collectives.errors import UsageError

_HERE = Path(__file__).parent
_KINDS = {"models": "model", "hardware": "cluster"}
Kind = TypeVar("Kind", bound=msgspec.Struct)


def names(folder: str) -> list[str]:
    """Names of the files that ship in a folder, without their ending."""
    return sorted(path.stem for path in (_HERE / folder).glob("*.json"))


def read(
    folder: str, name: str, kind: type[Kind], adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Kind:
    """Read a file that ships by its name, or one of the user's by its path (anything that ends in .json).

    `adapt` brings an object of another form into this one; it may raise UsageError.

    Raises:
        UsageError: there is none of that name, it cannot be read, or its content is not of that kind.

    """
    path = Path(name) if name.endswith(".json") else _HERE / folder / f"{name}.json"
    try:
        content = msgspec.json.decode(path.read_bytes())
        if adapt is not None and isinstance(content, dict):
            content = adapt(content)
        return msgspec.convert(content, type=kind)
    except FileNotFoundError:
        raise UsageError(_missing(folder, name)) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name another file") from error
    except (msgspec.DecodeError, UsageError) as error:
        raise UsageError(
            f"{path} does not describe a {_KINDS[folder]}: {error}; compare it with those in {_HERE / folder}"
        ) from error


def _missing(folder: str, name: str) -> str:
    what, known = _KINDS[folder], names(folder)
    if name.endswith(".json"):
        return f"there is no file {name!r} to read a {what} from; those that ship are {', '.join(known)}"
    near = get_close_matches(name.lower(), known, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no {what} {name!r}{hint}; there are {', '.join(known)}, or name a .json file of your own"
