"""The coordinator's page and Prometheus metrics: what `ringhold top` shows, over HTTP, read-only.

`ringhold coordinator --http 127.0.0.1:PORT` starts it in threads of its own: whoever reads, however slowly, holds up
nothing. It knows no secrets: names of lanes, states and ages. It answers to the names of this machine only, so that no
page of elsewhere reads it through the browser of somebody here (DNS rebinding).
"""

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from collectives.errors import UsageError
from collectives.membership.protocol import Status
from launch.report_style import STYLE
from launch.vitals import HEADINGS, Vitals, Watch

_REFRESH = 2
"""Seconds after which the page loads itself again."""
_PATIENCE = 5.0
"""Seconds that a reader may keep a connection waiting."""


_MOST_CONNECTIONS = 32
"""At a time; when more come, the oldest goes: descriptors are the coordinator's, too."""


class LivePage:
    """Serves the latest status that it was told. A context manager.

    Raises:
        UsageError: the address cannot be had.

    """

    def __init__(self, host: str, port: int) -> None:
        self._watch = Watch()
        self._vitals: Vitals | None = None
        registry = CollectorRegistry()
        registry.register(_Metrics(self))

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE
            page = self

            def do_GET(self) -> None:
                if not _is_ours(self.headers.get("Host", "localhost"), host):  # browsers always name one
                    self.send_error(421, "Misdirected Request", "ask for this machine by its name or its address")
                elif self.path == "/metrics":
                    self._answer("text/plain; version=0.0.4; charset=utf-8", generate_latest(registry))
                elif self.path == "/":
                    self._answer("text/html; charset=utf-8", self.page.html().encode())
                else:
                    self.send_error(404)

            def _answer(self, kind: str, data: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        try:
            self._server = _server_of(host)((host, port), Handler)
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --http") from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="ringhold-http", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tell(self, status: Status) -> None:
        """Take the newest status; from one thread."""
        self._vitals = self._watch.look(status)

    @property
    def vitals(self) -> Vitals | None:
        """The newest; None before the first."""
        return self._vitals

    def html(self) -> str:
        """The page."""
        vitals = self._vitals
        head = "".join(f"<th>{name}</th>" for name in HEADINGS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.cells()) + "</tr>"
            for row in (vitals.rows if vitals else ())
        )
        title = escape(vitals.headline() if vitals else "starting")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="refresh" content="{_REFRESH}"><title>Ringhold: {title}</title>'
            f"<style>{STYLE}</style></head><body><main><header><h1>{title}</h1></header>"
            f'<section><div class="wide">{table}</div></section><p class="note"><a href="/metrics">metrics</a></p>'
            "</main></body></html>\n"
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[Any, None] = {}
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection; where there are too many, make room."""
        if len(self._open) >= _MOST_CONNECTIONS:
            with contextlib.suppress(OSError, StopIteration):
                oldest = next(iter(self._open))
                self._open.pop(oldest, None)
                oldest.shutdown(socket.SHUT_RDWR)
        self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: readers come and go."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _server_of(host: str) -> type[_Server]:
    return _Server6 if ":" in host else _Server


def _is_ours(header: str, host: str) -> bool:
    """Whether a Host header names this machine: by an address, as localhost, as it is called, or as we listen."""
    name = header.rpartition("]")[0].strip("[") if header.startswith("[") else header.partition(":")[0]
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.lower() in {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


class _Metrics(Collector):
    """The newest vitals as Prometheus reads them."""

    def __init__(self, page: LivePage) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        vitals = self._page.vitals
        if vitals is None:
            return
        for name, text, value in (
            ("epoch", "Number of the current epoch", vitals.epoch),
            ("members", "Members of the current epoch", vitals.members),
            ("waiting", "Peers that wait for a place", vitals.waiting),
            ("changing", "1 while the membership changes", int(bool(vitals.change))),
        ):
            yield GaugeMetricFamily(f"ringhold_{name}", text, value)
        ages = GaugeMetricFamily("ringhold_heartbeat_age_seconds", "Since a peer was last heard", labels=["member"])
        for member, age in {row.member: row.age for row in vitals.rows}.items():
            ages.add_metric([str(member)], age)
        yield ages
        done = CounterMetricFamily("ringhold_operations", "Operations entered", labels=["member", "lane"])
        busy = GaugeMetricFamily(
            "ringhold_phase_seconds", "How long a lane is in its phase", labels=["member", "lane", "phase"]
        )
        for row in vitals.rows:
            if row.lane:
                done.add_metric([str(row.member), row.lane], row.seq)
                busy.add_metric([str(row.member), row.lane, row.phase], row.seconds)
        yield done
        yield busy
