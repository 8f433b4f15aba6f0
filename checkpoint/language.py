"""The pattern language: how the shards of a parameter combine, and what it is called, by patterns over names.

The words are those of Universal Checkpointing (arXiv 2406.18820): a pattern selects parameters and says that along an
axis of the job they are unique, replicated, fragments along a dimension (of fused parts, too), or to be averaged.
`docs/patterns.md` describes the TOML files; those of the built-in readers are in `checkpoint/specs`. Readers ask
`Spec.combine`; `checkpoint.renaming` asks `Spec.targets`. Nothing here knows of files of a checkpoint.
"""

import ast
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from checkpoint.lazy import Cut, Lazy, Mean, Part, PiecesMissing, Placed
from collectives.errors import RingholdError, UsageError
from collectives.region import Region

HOWS = ("unique", "replicated", "fragment", "average", "tied", "frozen", "refuse")
AXES = ("tp", "pp", "optimizer")


class SpecError(UsageError):
    """A file of patterns cannot be read, or says what has no meaning."""


class PatternMissing(RingholdError):
    """No pattern, or more than one of a rank, says how the shards of a parameter combine."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the shards of the parameters whose whole names match combine along an axis.

    `how`: `unique` one rank of the axis holds it; `replicated` all hold the same, the first is taken; `fragment` each
    holds a part along `dim`, in order of ranks; `average` each holds its own, the mean is taken; `tied` it is another
    name of the tensor `of`, and its own bytes are left alone; `frozen` (of the axis `optimizer`) it is not stepped,
    which some formats do not tell; `refuse` it cannot be converted.
    `parts` of a fragment: the tensor is several fused along `dim`, each cut over the ranks by itself: the sizes of the
    parts in the whole tensor, or how many equal ones there are. `widths` gives each part's share on each rank, where
    it is not an even split. `rank`: patterns of a lower rank are asked first; two of one rank may not both match.
    """

    match: str
    how: str
    axis: str = "tp"
    dim: int = 0
    parts: tuple[int | str, ...] | int | str = 1
    widths: tuple[tuple[int, ...], ...] = ()
    of: str = ""
    rank: int = 0

    def __post_init__(self) -> None:
        compiled(self.match)
        if self.how not in HOWS:
            raise SpecError(f"pattern {self.match!r}: how = {self.how!r}; write one of {', '.join(HOWS)}")
        if self.axis not in AXES:
            raise SpecError(f"pattern {self.match!r}: axis = {self.axis!r}; write one of {', '.join(AXES)}")
        if (self.how == "tied") != bool(self.of):
            raise SpecError(f"pattern {self.match!r}: write of = 'NAME' for a tied parameter, and for no other")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Parameters whose rows are padded: only the first `rows` are theirs."""

    match: str
    rows: int | str


@dataclass(frozen=True, slots=True)
class Rename:
    """What the parameters whose whole names match are called elsewhere.

    `to` are templates: `{1}` or `{layer}` is a group of the match, and `{layer + first_layer}` computes with whole
    numbers, groups and settings. Several templates cut the tensor along `dim` into `parts` (sizes or expressions), of
    each of `groups` repetitions: a group's parts lie together, as in the query groups of a fused QKV. No template
    leaves the parameter out.
    """

    match: str
    to: tuple[str, ...]
    dim: int = 0
    parts: tuple[int | str, ...] = ()
    groups: int | str = 1


@dataclass(frozen=True)
class Spec:
    """Patterns, padded vocabularies and names; `default` holds for parameters that no pattern matches, by axis."""

    patterns: tuple[Pattern, ...] = ()
    vocabularies: tuple[Vocabulary, ...] = ()
    names: tuple[Rename, ...] = ()
    default: Mapping[str, Pattern] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    title: str = "spec"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file. `SpecError`: it is not there, no TOML, or says what has no meaning."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        return cls.parse(text, str(path))

    @classmethod
    def built_in(cls, name: str) -> Self:
        """Read `checkpoint/specs/NAME.toml`. `SpecError`: there is none of that name."""
        folder = resources.files("checkpoint") / "specs"
        known = sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))
        if name not in known:
            raise SpecError(f"no spec is called {name!r}; there are {', '.join(known)}, or give a path")
        return cls.parse((folder / f"{name}.toml").read_text(), f"spec {name}")

    @classmethod
    def find(cls, name: str) -> Self:
        """Read a file if `name` is a path, else the built-in spec of that name."""
        return cls.load(Path(name)) if "/" in name or name.endswith(".toml") else cls.built_in(name)

    @classmethod
    def parse(cls, text: str, title: str = "spec") -> Self:
        """Read the text of a TOML file. `SpecError`: as `load`."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{title}: no TOML: {error}") from None
        known = {"about", "default", "pattern", "vocabulary", "name", "settings"}
        if strangers := sorted(set(data) - known):
            raise SpecError(f"{title}: unknown {', '.join(strangers)}; a spec has {', '.join(sorted(known))}")
        default = data.get("default", {})
        whole = not isinstance(default, dict) or "how" in default
        defaults = {"tp": default} if whole else default
        return cls(
            tuple(_made(Pattern, row, title) for row in _rows(data, "pattern", title)),
            tuple(_made(Vocabulary, row, title) for row in _rows(data, "vocabulary", title)),
            tuple(_made(Rename, row, title) for row in _rows(data, "name", title)),
            {axis: _default(axis, value, title) for axis, value in defaults.items()},
            data.get("settings", {}),
            title,
        )

    def with_settings(self, settings: Mapping[str, Any]) -> "Spec":
        """Return the same patterns with more settings to compute with; the file's own come last."""
        merged = {**settings, **self.settings}
        return Spec(self.patterns, self.vocabularies, self.names, self.default, merged, self.title)

    def over(self, other: "Spec") -> "Spec":
        """Return a spec that asks this one's patterns first, then `other`'s; its own defaults come first too."""
        shift = 1 + max((pattern.rank for pattern in self.patterns), default=-1)
        moved = tuple(replace(pattern, rank=pattern.rank + shift) for pattern in other.patterns)
        return Spec(
            self.patterns + moved,
            self.vocabularies + other.vocabularies,
            self.names + other.names,
            {**other.default, **self.default},
            {**other.settings, **self.settings},
            f"{self.title} over {other.title}",
        )

    def pattern(self, name: str, axis: str = "tp") -> Pattern:
        """Return the pattern that claims a parameter.

        Raises:
            PatternMissing: two of one rank match, or none and there is no default.

        """
        found = [p for p in self.patterns if p.axis == axis and compiled(p.match).fullmatch(name)]
        if not found:
            if axis not in self.default:
                raise PatternMissing(
                    f"{name}: no pattern of {self.title} says how its shards over {axis} combine, and there is no "
                    f"default; add one with --spec, for instance:\n[[pattern]]\n"
                    f"match = '{re.escape(name)}'\naxis = \"{axis}\"\n"
                    f'how = "replicated"  # or "fragment" with dim = 0'
                )
            return self.default[axis]
        first = min(pattern.rank for pattern in found)
        claims = [pattern for pattern in found if pattern.rank == first]
        if len(claims) > 1:
            raise PatternMissing(
                f"{name}: patterns {' and '.join(repr(p.match) for p in claims)} of {self.title} are of rank {first} "
                f"and both claim it; make one narrower or give them different ranks"
            )
        return claims[0]

    def combine(self, name: str, shards: Sequence[Lazy], axis: str = "tp") -> Lazy:
        """Put a parameter together from the shards of the ranks of an axis, in their order.

        Raises:
            PatternMissing: as `pattern`, or it says "refuse".
            PiecesMissing: shapes of the shards do not fit what the pattern says.

        """
        if len(shards) == 1:
            return shards[0]
        pattern = self.pattern(name, axis)
        if pattern.how == "unique":
            raise PiecesMissing(
                f"{name}: pattern {pattern.match!r} says that one rank of {axis} holds it, and {len(shards)} do"
            )
        if pattern.how in ("replicated", "tied"):
            if any(shard.shape != shards[0].shape for shard in shards):
                raise PiecesMissing(
                    f"{name}: pattern {pattern.match!r} says that it is replicated over {axis}, and its shards have "
                    f"shapes {[shard.shape for shard in shards]}; is it a fragment?"
                )
            return shards[0]
        if pattern.how == "average":
            return Mean(name, shards)
        if pattern.how == "refuse":
            raise PatternMissing(f"{name}: pattern {pattern.match!r} of {self.title} says that it cannot be converted")
        return self._fragments(name, pattern, [shard for shard in shards if shard.size])

    def _fragments(self, name: str, pattern: Pattern, shards: Sequence[Lazy]) -> Lazy:
        dim, rest = pattern.dim, {(*s.shape[: pattern.dim], *s.shape[pattern.dim + 1 :]) for s in shards}
        if len(rest) != 1 or any(dim >= len(shard.shape) for shard in shards):
            raise PiecesMissing(
                f"{name}: pattern {pattern.match!r} says that its shards are cut along dimension {dim}, and they have "
                f"shapes {[shard.shape for shard in shards]}; is it replicated, or cut along another?"
            )
        extents = [shard.shape[dim] for shard in shards]
        widths = self._widths(name, pattern, extents)
        shape = (*shards[0].shape[:dim], sum(extents), *shards[0].shape[dim + 1 :])
        parts: list[Part] = []
        at, taken = 0, [0] * len(shards)
        for row in widths:
            for index, width in enumerate(row):
                box = along(shape, dim, at, at + width)
                start = tuple(taken[index] if d == dim else 0 for d in range(len(shape)))
                parts.append(Part(box, shards[index], start))
                at, taken[index] = at + width, taken[index] + width
        return Placed(name, shape, parts)

    def _widths(self, name: str, pattern: Pattern, extents: list[int]) -> list[list[int]]:
        """For each fused part, its extent on each rank."""
        if pattern.widths:
            widths = [list(row) for row in pattern.widths]
        elif isinstance(pattern.parts, int | str):
            count = evaluate(pattern.parts, self.settings, pattern.match)
            widths = [[extent // max(count, 1) for extent in extents]] * count
        else:
            sizes = [evaluate(part, self.settings, pattern.match) for part in pattern.parts]
            widths = [[extent * size // (sum(sizes) or 1) for extent in extents] for size in sizes]
        if (
            any(len(row) != len(extents) for row in widths)
            or [sum(col) for col in zip(*widths, strict=False)] != extents
        ):
            raise PiecesMissing(
                f"{name}: pattern {pattern.match!r} cuts it into parts of {widths} over the ranks, whose shards have "
                f"extents {extents} along dimension {pattern.dim}"
            )
        return widths

    def frozen(self, name: str) -> bool:
        """Whether a pattern of the axis `optimizer` says that a parameter is not stepped."""
        rows = [p for p in self.patterns if p.axis == "optimizer" and p.how == "frozen"]
        return any(compiled(pattern.match).fullmatch(name) for pattern in rows)

    def owner(self, name: str) -> str | None:
        """The name of the tensor that a parameter is another name of; None if no pattern says so."""
        for pattern in self.patterns:
            if pattern.how == "tied" and (match := compiled(pattern.match).fullmatch(name)):
                return fill(pattern.of, match, self.settings)
        return None

    def unpadded(self, name: str, tensor: Lazy) -> Lazy:
        """Return a tensor without the rows that pad a vocabulary."""
        for vocabulary in self.vocabularies:
            if compiled(vocabulary.match).fullmatch(name):
                rows = evaluate(vocabulary.rows, self.settings, vocabulary.match)
                if not tensor.shape or rows > tensor.shape[0]:
                    raise PiecesMissing(
                        f"{name}: vocabulary pattern {vocabulary.match!r} keeps {rows} rows of shape {tensor.shape}"
                    )
                return tensor if rows == tensor.shape[0] else Cut(tensor, along(tensor.shape, 0, 0, rows))
        return tensor

    def targets(self, name: str) -> tuple[Rename, tuple[str, ...]] | None:
        """Return the rule that renames a parameter and the new names; None if none does.

        Raises:
            PatternMissing: two rules match.

        """
        found = [(rule, m) for rule in self.names if (m := compiled(rule.match).fullmatch(name))]
        if len(found) > 1:
            both = " and ".join(repr(rule.match) for rule, _ in found)
            raise PatternMissing(f"{name}: names {both} of {self.title} both claim it; make one narrower")
        if not found:
            return None
        rule, match = found[0]
        return rule, tuple(fill(template, match, self.settings) for template in rule.to)


def cleaned(spec: Spec, name: str) -> str:
    """Return a name after the spec's rules, which have one target each, applied until none matches."""
    while (found := spec.targets(name)) is not None and found[1][0] != name:
        name = found[1][0]
    return name


def along(shape: tuple[int, ...], dim: int, start: int, stop: int) -> Region:
    """Return the box of a tensor that holds `[start, stop)` of one dimension and all of the others."""
    first = tuple(start if d == dim else 0 for d in range(len(shape)))
    return Region(first, tuple(stop if d == dim else extent for d, extent in enumerate(shape)))


_COMPILED: dict[str, re.Pattern[str]] = {}


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern once. `SpecError`: it is no regular expression."""
    if pattern not in _COMPILED:
        try:
            _COMPILED[pattern] = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise SpecError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return _COMPILED[pattern]


def fill(template: str, match: re.Match[str], settings: Mapping[str, Any]) -> str:
    """Fill the braces of a name's template from a match and settings."""

    def value(hole: re.Match[str]) -> str:
        text = hole.group(1).strip()
        if text.isdecimal():
            if int(text) > (match.re.groups or 0):
                raise SpecError(f"template {template!r}: {match.re.pattern!r} has no group {text}")
            return match.group(int(text)) or ""
        groups = match.groupdict()
        if text in groups:
            return groups[text] or ""
        numbers = {key: int(found) for key, found in groups.items() if found and found.isdecimal()}
        numbers |= {f"_{i}": int(g) for i, g in enumerate(match.groups(), 1) if g and g.isdecimal()}
        return str(evaluate(re.sub(r"\$(\d+)", r"_\1", text), {**settings, **numbers}, template))

    return re.sub(r"\{([^{}]*)\}", value, template)


def evaluate(expression: int | str, settings: Mapping[str, Any], where: str) -> int:
    """Compute a whole number from names and `+ - * // %`.

    Raises:
        SpecError: something else stands in it, or a name has no value.

    """
    if isinstance(expression, int):
        return expression
    try:
        return _value(ast.parse(str(expression), mode="eval").body, settings)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise SpecError(f"{where}: cannot compute {expression!r}: {error}") from None


def _value(node: ast.expr, settings: Mapping[str, Any]) -> int:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            value = settings.get(name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} has no value here; set it under [settings]")
            return value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, settings), _value(right, settings)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return a // b
                case ast.Mod():
                    return a % b
    raise ValueError("only whole numbers, names and + - * // % may stand in it")


def _rows(data: Mapping[str, Any], key: str, title: str) -> list[dict[str, Any]]:
    rows = data.get(key, [])
    if not isinstance(rows, list) or any(not isinstance(row, dict) for row in rows):
        raise SpecError(f"{title}: write each {key} under a heading [[{key}]]")
    return rows


def _made(kind: Any, row: Mapping[str, Any], title: str) -> Any:
    allowed = {f.name for f in fields(kind)}
    if strangers := sorted(set(row) - allowed):
        raise SpecError(f"{title}: {row.get('match', row)!r} has unknown {', '.join(strangers)}")
    values = {key: _tuple(value) for key, value in row.items()}
    if kind is Rename and isinstance(values.get("to"), str):
        values["to"] = (values["to"],)
    try:
        return kind(**values)
    except TypeError as error:
        raise SpecError(f"{title}: {row.get('match', row)!r}: {error}") from None


def _default(axis: str, value: Any, title: str) -> Pattern:
    row = {"how": value} if isinstance(value, str) else value
    if not isinstance(row, dict):
        raise SpecError(f"{title}: default {value!r}; write how, and dim for a fragment")
    made: Pattern = _made(Pattern, {"match": ".*", "axis": axis, **row}, title)
    return made


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
