"""The JSON files of this package: models and hardware, by name or by path."""

from pathlib import Path
from typing import TypeVar

import msgspec

from collectives.errors import UsageError

_HERE = Path(__file__).parent
Kind = TypeVar("Kind", bound=msgspec.Struct)


def names(folder: str) -> list[str]:
    """Names of the files that ship in a folder, without their ending."""
    return sorted(path.stem for path in (_HERE / folder).glob("*.json"))


def read(folder: str, name: str, kind: type[Kind]) -> Kind:
    """Read a file that ships by its name, or one of the user's by its path (anything that ends in .json).

    Raises:
        UsageError: there is none of that name, it cannot be read, or its content is not of that kind.

    """
    path = Path(name) if name.endswith(".json") else _HERE / folder / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        known = ", ".join(names(folder))
        raise UsageError(f"no {folder} file {name!r}; there are {known}, or name a .json file of your own") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; name another file") from error
    except (msgspec.DecodeError, UsageError) as error:
        raise UsageError(
            f"{path} does not describe {folder}: {error}; compare it with those in {_HERE / folder}"
        ) from error
