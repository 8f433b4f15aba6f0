"""`ringhold coordinator`: the coordinator in a process of its own, by hand or as the child of a supervisor."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from collectives.errors import RingholdError, UsageError
from collectives.membership.protocol import Status
from collectives.membership.server import run_coordinator
from collectives.membership.wire import load_token
from collectives.options import Options
from launch import console
from launch.child import REPORT_FD, Link


@click.command("coordinator")
@click.option("--listen", default="127.0.0.1:29400", show_default=True, metavar="HOST:PORT", help="Where to listen.")
@click.option(
    "--run", "run_name", default="default", show_default=True, help="Name of the run; peers of another are refused."
)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Journal file.  [default: ringhold-RUN.journal, made by the first start]",
)
@click.option("--new", is_flag=True, help="Start a new run: the journal must not hold one.")
@click.option(
    "--token-file", type=click.Path(dir_okay=False), help="File with the run's token, instead of RINGHOLD_TOKEN."
)
@click.option("--founders", type=int, help="Peers that form the first epoch.  [default: 1]")
@click.option("--min-members", type=int, help="Refuse epochs of fewer members.  [default: 1]")
@click.option("--quorum", is_flag=True, default=None, help="An epoch needs more than half of the last one's members.")
@click.option("--heartbeat-timeout", type=float, help="Seconds after which a silent member is lost.  [default: 2]")
@click.option("--tls-cert", help="Certificate chain; with --tls-key, peers must speak TLS.")
@click.option("--tls-key", help="Private key of the certificate.")
@click.option("--http", metavar="HOST:PORT", help="Serve a page and Prometheus metrics (/metrics) there, read-only.")
def command(
    listen: str,
    run_name: str,
    journal: Path | None,
    new: bool,
    token_file: str | None,
    http: str | None,
    **options: Any,
) -> int:
    """Run a coordinator alone, in the foreground, until Ctrl-C or SIGTERM.

    The run's token comes from RINGHOLD_TOKEN, or from a file. Every option of the membership also has an environment
    variable, RINGHOLD_FOUNDERS and so on. After a crash, the same command without --new goes on from the journal.
    """
    link = Link.enter() if REPORT_FD in os.environ else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    if link is not None:
        link.listen(lambda command: None)
    try:
        host, port = console.split_address(listen, "--listen")
        path = journal or Path(f"ringhold-{run_name}.journal")
        # A journal that was named and is not there is a mistake; that of the default name is made by the first start.
        new = new or (journal is None and not path.exists())
        _check_journal(path, new)
        chosen = Options.resolve({name: value for name, value in options.items() if value is not None})
        token = _token(token_file)
        try:
            with _watched(http) as watcher:
                run_coordinator(
                    host,
                    port,
                    path,
                    run=run_name,
                    token=token,
                    options=chosen,
                    new=new,
                    ready=lambda port: _ready(link, console.join_address(host, port), run_name),
                    watcher=watcher,
                )
        except UsageError:
            # The address could not be had: leave no journal behind, so that the same command can be repeated.
            _remove_unused(path, new)
            raise
    except RingholdError as error:
        if link is not None:
            link.report("error", error=type(error).__name__, message=str(error), exit_code=error.exit_code)
        raise
    return 0


@contextlib.contextmanager
def _watched(address: str | None) -> Iterator[Callable[[Status], None] | None]:
    """Serve the live page while it lasts, if it was asked for."""
    if address is None:
        yield None
        return
    from launch.live_page import LivePage

    host, port = console.split_address(address, "--http")
    with LivePage(host, port) as page:
        print(f"live page at http://{console.join_address(host, page.port)}/", file=sys.stderr, flush=True)
        yield page.tell


def _check_journal(path: Path, new: bool) -> None:
    """Refuse what only a mistyped command can mean; the journal itself judges its content."""
    if not new and not path.exists():
        raise UsageError(f"there is no journal {path}; name the right one with --journal, or start a run with --new")
    if new and path.exists() and path.stat().st_size:
        raise UsageError(f"the journal {path} holds a run; drop --new to go on with it, or name another with --journal")


def _remove_unused(path: Path, new: bool) -> None:
    """Remove the journal of a run that did not begin: one that was just made, with nothing but its first record."""
    if new and path.exists() and path.read_bytes().count(b"\n") <= 1:
        path.unlink()


def _token(token_file: str | None) -> bytes:
    if token_file is None:
        return load_token()
    os.environ.pop("RINGHOLD_TOKEN", None)
    os.environ["RINGHOLD_TOKEN_FILE"] = token_file
    return load_token()


def _ready(link: Link | None, address: str, run_name: str) -> None:
    if link is not None:
        link.report("listening", address=address)
    else:
        print(f"coordinator of run {run_name!r} listens on {address}", flush=True)


if __name__ == "__main__":
    sys.exit(console.run(command))
