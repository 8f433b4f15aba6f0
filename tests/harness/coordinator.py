"""The coordinator as a program of the harness; `Cluster` starts it."""

from pathlib import Path
from typing import Any

from collectives.membership.server import run_coordinator
from collectives.options import Options
from tests.harness.peer import Peer


def coordinate(peer: Peer, journal: str, port: int, new: bool, options: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    run_coordinator(
        "127.0.0.1",
        port,
        Path(journal),
        run=peer.setting["run"],
        token=peer.setting["token"].encode(),
        options=Options.resolve(options, {}),
        new=new,
        ready=lambda port: peer.say("listening", port=port),
    )
