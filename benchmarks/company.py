"""Ranks of `benchmarks.attention_rank`, started and heard; for `benchmarks.attention` and `benchmarks.weaving`."""

import os
import secrets
from typing import Any

from launch.bench_host import Company
from launch.environment import peer_environment


def together(what: str, ranks: int, transport: str, topology: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Have ranks measure something; their figures, by rank."""
    token = secrets.token_urlsafe(16)
    environ = {**peer_environment(os.environ), "OMP_NUM_THREADS": "1", "RINGHOLD_HEARTBEAT_TIMEOUT": "30"}
    with Company(token, environ) as company:
        children = [company.start(f"rank {rank}", "benchmarks.attention_rank") for rank in range(ranks)]
        address = company.host(["attention"], ranks)["attention"]
        for child in children:
            order = {"what": what, "address": address, "token": token, "transport": transport, "topology": topology}
            child.send({**order, "given": given})
        found: list[dict[str, Any]] = []
        while len(found) < ranks:
            _, message = company.hear()
            if message["type"] == "figures":
                found.append(message)
    return sorted(found, key=lambda one: int(one["rank"]))
