"""Invariant 8: TLS on the control channel is available, and a peer refuses a coordinator that it cannot trust."""

from pathlib import Path
from typing import Any

import trustme

from tests.conformance.secure import contributors
from tests.harness.cluster import Cluster


def authority(folder: Path, host: str = "127.0.0.1") -> dict[str, Any]:
    """Options of a coordinator and peers that trust an authority of their own."""
    made = trustme.CA()
    issued = made.issue_cert(host)
    made.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    return {name: str(folder / f"{name.removeprefix('tls_')}.pem") for name in ("tls_ca", "tls_cert", "tls_key")}


def test_members_speak_tls_to_the_coordinator(tmp_path: Path) -> None:
    with Cluster(founders=2, **authority(tmp_path)) as cluster:
        assert cluster.run(contributors, 2) == [2, 2]


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    foreign = authority(tmp_path / "other")["tls_ca"]
    with Cluster(founders=1, join_timeout=1.0, **authority(tmp_path)) as cluster:
        cluster.options["tls_ca"] = foreign
        ending = cluster.peer(contributors).ending()
        assert ending.error == "JoinRefused"
        assert "not to be trusted" in ending.message


def test_a_peer_without_tls_is_refused(tmp_path: Path) -> None:
    with Cluster(founders=1, join_timeout=1.0, heartbeat_timeout=1.0, **authority(tmp_path)) as cluster:
        cluster.options["tls_ca"] = ""
        ending = cluster.peer(contributors).ending()
        assert ending.error == "CoordinatorUnreachable"
