"""Plain values of a checkpoint, put into a nested state in place; the tensors are filled elsewhere.

`checkpoint.loading` calls it twice: first to hear what is missing, then to write. Dicts and lists that are there are
kept, so that whoever holds them sees the new values.
"""

from typing import Any

from checkpoint import nest
from checkpoint.nest import Json
from checkpoint.tensors import is_tensor


def fill(into: dict[str, Any], state: Json, write: bool) -> list[str]:
    """Put the plain values of `state` (see `checkpoint.nest`) into a nest; the paths of those it has no values for.

    A part of the checkpoint without tensors is taken whole; in one with tensors, what the nest does not have is left
    out: another rank may want it.
    """
    missing: list[str] = []
    _fill(into, _decoded(state), (), write, missing)
    return missing


class _Slot:
    """Stands where a tensor of the checkpoint stands."""


_SLOT = _Slot()


def _decoded(state: Json) -> Any:
    return nest.put_together(state, lambda _: _SLOT)


def _fill(old: Any, new: Any, path: nest.Path, write: bool, missing: list[str]) -> Any:
    """What is to stand where `old` stands."""
    if is_tensor(old) or isinstance(new, _Slot):
        return old  # tensors are compared by key before
    if isinstance(old, dict) and isinstance(new, dict):
        _fill_dict(old, new, path, write, missing)
        return old
    if isinstance(old, list) and isinstance(new, list):
        if len(old) == len(new):
            items = [
                _fill(*pair, (*path, index), write, missing) for index, pair in enumerate(zip(old, new, strict=True))
            ]
        elif _plain(new):
            items = new
        else:
            return old
        if write:
            old[:] = items
        return old
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new) and not _plain(new):
        return tuple(
            _fill(*pair, (*path, index), write, missing) for index, pair in enumerate(zip(old, new, strict=True))
        )
    return new if _plain(new) else old


def _fill_dict(old: dict[Any, Any], new: dict[Any, Any], path: nest.Path, write: bool, missing: list[str]) -> None:
    for key in list(old):
        if key not in new:
            if _any_plain(old[key]):
                missing.append(nest.key_of((*path, key)))
            continue
        item = _fill(old[key], new[key], (*path, key), write, missing)
        if write and item is not old[key]:
            old[key] = item
    if write:
        for key, item in new.items():
            if key not in old and _plain(item):
                old[key] = item


def _plain(node: Any) -> bool:
    """Whether a nest of the checkpoint has no tensor in it."""
    if isinstance(node, dict):
        return all(map(_plain, node.values()))
    if isinstance(node, list | tuple):
        return all(map(_plain, node))
    return not isinstance(node, _Slot)


def _any_plain(node: Any) -> bool:
    """Whether a nest that is to be filled has a plain value in it."""
    if isinstance(node, dict):
        return any(map(_any_plain, node.values()))
    if isinstance(node, list | tuple):
        return any(map(_any_plain, node))
    return not is_tensor(node)
