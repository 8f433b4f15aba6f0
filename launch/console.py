"""How every command of Ringhold ends: exit codes, one-line errors, no traceback for what a user can put right.

Used by `launch.cli` and by the modules that are run with `python -m`.
"""

import errno
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from collectives.errors import RingholdError, StorageFailed, UsageError


class Finite(click.FloatRange):
    """A number of an option within a range, which neither nan nor infinity is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class OutputFile(click.Path):
    """A file that an option names for what the command finds; `require_writable` at once."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        require_writable(path, param.opts[-1] if param is not None else "file")
        return path


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: the value it returns (None: 0), or the code of the error that ended it.

    0 ok, 1 wrong result or failed check, 2 usage, 3 peers lost and not recovered, 4 corrupt data, 124 timeout,
    130 Ctrl-C. A defect of Ringhold itself keeps its traceback.
    """
    name = "ringhold" if isinstance(command, click.Group) else f"ringhold {command.name}"
    try:
        result: Any = command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        _complain(_sentence(error))
        return UsageError.exit_code
    except RingholdError as error:
        _complain(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`ringhold ... | head`): nobody is there to be told, nor at the final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        _complain(f"there is no space left on the disk{where}; free some, and run it again")
        return StorageFailed.exit_code
    return int(result or 0)


@contextmanager
def terminated() -> Iterator[None]:
    """While inside, SIGTERM ends this process in order, as Ctrl-C does."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def require_writable(path: Path, option: str) -> None:
    """Raise `UsageError` unless a file can be written there: now, rather than when there is something to write."""
    try:
        made = not path.exists()
        path.open("ab").close()
        if made:
            path.unlink(missing_ok=True)  # ranks of a launcher all do this
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror}; name another file") from None


def split_address(text: str, what: str) -> tuple[str, int]:
    """Split "HOST:PORT" (or "[IPV6]:PORT").

    Raises:
        UsageError: it is not of that form; `what` names the option.

    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{what} {text!r} is not HOST:PORT, for example 127.0.0.1:29400")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return "HOST:PORT", an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _sentence(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message} (see: {context.command_path} --help)"


def _complain(message: str) -> None:
    print(f"ringhold: error: {message}", file=sys.stderr)


@contextmanager
def told() -> Iterator[None]:
    """Write warnings of this block to stderr behind it, one line each; those that begin alike, as one of each layer
    does, as one with their number."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            texts = dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
            alike: dict[str, list[str]] = {}
            for text in texts:
                alike.setdefault(text.partition(" (")[0], []).append(text)
            for first, *others in alike.values():
                more = f" (and {len(others)} more like this)" if others else ""
                print(f"ringhold: warning: {first}{more}", file=sys.stderr)


def replay(subcommand: str) -> str:
    """The command line of this process, as a user would give it again. Tokens are never in it."""
    return shlex.join(["ringhold", *([] if subcommand in sys.argv[1:2] else [subcommand]), *sys.argv[1:]])
