"""What the options of `ringhold plan` ask for: a mesh, a machine, pins, a step."""

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from collectives.cost import Profile
from collectives.errors import RingholdError, UsageError
from launch.scale_options import NUMBERS
from parallel.capturing import Step, capture
from parallel.layout import Mesh, parse_placement
from parallel.machine import CPU, Machine
from parallel.models.examples import VISION, example
from parallel.plans import Placements

SIZES: dict[str, tuple[str, ...]] = {"mlp": ("hidden",), **dict.fromkeys(VISION, ())}
"""Sizes that an example takes beside the batch; language models, the others, take a number of layers and a length."""


def mesh_of(text: str) -> Mesh:
    """Read "4", "2x4" or "dp=2,tp=4". UsageError: it is none of these, or has more than two axes."""
    axes = []
    for number, part in enumerate(text.strip().split("," if "=" in text else "x")):
        name, equals, size = part.partition("=") if "=" in part else (f"axis{number}", "=", part)
        if not name or not equals or not size.strip().isdecimal() or int(size) < 1:
            raise UsageError(f'--mesh {text!r} is no mesh; write "4", "2x4" or "dp=2,tp=4"')
        axes.append((name.strip(), int(size)))
    if len(axes) > 2:
        raise UsageError(f"--mesh {text!r} has {len(axes)} axes; plans are made for one or two")
    return Mesh(tuple(axes))


def machine_of(hardware: str | None, profile: Path | None) -> Machine:
    """The machine of a cluster or of a calibrated profile; ranks of this host unless told otherwise."""
    if hardware is not None and profile is not None:
        raise UsageError("--hardware and --profile both say what the machine is like; give one of them")
    if hardware is not None:
        return Machine.load(hardware)
    return CPU if profile is None else Machine.of_profile(Profile.load(profile), str(profile))


def pins_of(texts: Sequence[str]) -> dict[str, Placements]:
    """Read pins such as "head.weight=S(0),B". UsageError: one is malformed, or two are of one tensor."""
    pins: dict[str, Placements] = {}
    for text in texts:
        name, equals, placements = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--pin {text!r} is not NAME=PLACEMENTS, for example up.weight=S(0) or up.weight=S(0),B")
        if name in pins:
            raise UsageError(f"--pin {name} is given twice")
        pins[name] = tuple(parse_placement(part) for part in placements.split(","))
    return pins


def step_of(given: dict[str, Any]) -> Step:
    """Capture the example or the user's step. What their code prints goes to stderr.

    Errors: those of `example`, `capture` and `_function`.
    """
    if given["example"] is not None:
        _refuse_numbers(given, f"--example {given['example']}", SIZES.get(given["example"], ("layers", "seq")))
        hidden, layers, length = (given[name] or 0 for name in ("hidden", "layers", "seq"))
        built = example(given["example"], given["batch"] or 8, hidden=hidden, layers=layers, length=length)
        return built.capture()
    name = given["step"]
    _refuse_numbers(given, "--step", ())
    with redirect_stdout(sys.stderr):
        make = _function(name)
        try:
            made = make()
        except RingholdError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is theirs to see, in a line
            raise UsageError(f"--step {name}: the function raised {type(error).__name__}: {error}") from error
        if isinstance(made, Step):
            return made
        if not isinstance(made, tuple | list) or len(made) != 4:
            what = f"{len(made)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
            raise UsageError(
                f"--step {name} must return a Step, or loss function, model, optimizer and batch, not {what}"
            )
        return capture(*made)


def _refuse_numbers(given: dict[str, Any], who: str, used: tuple[str, ...]) -> None:
    """Raise `UsageError` if a number of a model is given that would be ignored."""
    for name in (*NUMBERS, "gated", "tied", *(("batch",) if who == "--step" else ())):
        if given.get(name) is not None and name not in used:
            flag = name.replace("_", "-")
            own = "the step has sizes of its own" if who == "--step" else f"it takes {_flags(used)}"
            raise UsageError(f"--{flag} is not for {who}: {own}")


def _flags(names: tuple[str, ...]) -> str:
    return " and ".join(f"--{name}" for name in (*names, "batch"))


def _function(name: str) -> Any:
    """The user's function. Modules beside its file can be imported, as when the file is run."""
    path, _, function = name.rpartition(":")
    if not path or not function:
        raise UsageError(f"--step {name!r} is not FILE:FUNCTION, for example train.py:make_step")
    spec = importlib.util.spec_from_file_location("ringhold_step", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UsageError(f"--step {name}: there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--step {name}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"--step {name}: {path} has no function {function}")
    return found
