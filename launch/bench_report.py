"""What a benchmark prints: the table of nccl-tests with a column for each rival, JSON lines, a chart.

`Report` takes the messages of rank 0 (see `bench_rank`); it is the same whoever started the ranks.
"""

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from collectives.errors import UsageError
from launch.bench_request import Request

_GIB = 2**30


class Report:
    """A context manager; call it with each message.

    Args:
        json_to: a file for one JSON object a row, "-" for stdout (then there is no table), or "".
        plot_to: an SVG file of time over size, or None.

    Raises:
        UsageError: a file cannot be written.

    """

    def __init__(self, request: Request, peers: int, json_to: str, plot_to: Path | None) -> None:
        self._request, self._peers = request, peers
        self._rows: list[dict[str, Any]] = []
        self._line: list[dict[str, Any]] = []
        self._held = ExitStack()
        self._plot_to = plot_to
        self._json: TextIO | None = sys.stdout if json_to == "-" else None
        self._table = json_to != "-"
        self._progress = sys.stderr.isatty()
        try:
            if json_to not in ("", "-"):
                self._json = self._held.enter_context(Path(json_to).open("w"))  # noqa: SIM115 - closed with the report
            if plot_to is not None:
                plot_to.touch()
        except OSError as error:
            raise UsageError(f"cannot write {error.filename}: {error.strerror}") from None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        self._held.close()

    def __call__(self, message: dict[str, Any]) -> None:
        """Take one message."""
        match message["type"]:
            case "progress" if self._progress:
                text = f"{message['done']} of {message['of']}: {message['size']} bytes"
                print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
            case "row":
                self._clear()
                self._row({name: value for name, value in message.items() if name not in ("type", "time")})
            case "memory":
                self._print(
                    f"# Memory of this host: copies {message['copy'] / _GIB:.1f} GiB/s, adds "
                    f"{message['add'] / _GIB:.1f} GiB/s, all ranks together; all_reduce of {message['size']} B reaches "
                    f"{100 * message['fraction']:.0f}% of what that allows ({message['floor_us']:.0f} us)"
                )
            case "profile":
                self._clear()
                self._profile(message)
            case "done" if not self._request.calibrate:
                self._end(message["wrong"])
            case "done":
                self._print(f"# Out of bounds values : {message['wrong']} {'FAILED' if message['wrong'] else 'OK'}")

    def _row(self, row: dict[str, Any]) -> None:
        if not self._rows:
            self._head(row)
        self._rows.append(row)
        self._line.append(row)
        if self._json is not None:
            print(json.dumps(row), file=self._json, flush=True)
        forms = self._request.what.out_of_place + self._request.what.in_place
        if len(self._line) == forms:
            first, by_form = self._line[0], {row["inplace"]: row for row in self._line}
            left = (
                f"{first['size']:>12} {first['count']:>12} {first['dtype']:>9} {first['redop']:>6} {first['root']:>6}"
            )
            self._print(f"{left} {self._form(by_form.get(False))} {self._form(by_form.get(True))}")
            self._line = []

    def _head(self, row: dict[str, Any]) -> None:
        request = self._request
        rivals = "".join(f" {'x' + name[:9]:>10}" for name in request.rivals)
        columns = f" {'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>7}{rivals}"
        units = f" {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>7}{' ' * len(rivals)}"
        self._print(
            f"# {request.kind}: {self._peers} ranks, transport {row['transport']}, algorithm {request.algorithm}, "
            f"lanes {request.lanes}{', registered memory' if request.registered else ''}, "
            f"{request.rounds} rounds after {request.warmup} to warm up, {request.checks} checked"
        )
        if request.rivals:
            self._print("# xNAME: time of NAME over ours, in turns within the same processes; above 1 ours is faster")
        width = len(columns) - 1
        self._print(f"#{'':>49} {'out-of-place':^{width}} {'in-place':^{width}}")
        self._print(f"#{'size':>11} {'count':>12} {'type':>9} {'redop':>6} {'root':>6} {columns[1:]} {columns[1:]}")
        self._print(f"#{'(B)':>11} {'(elements)':>12} {'':>9} {'':>6} {'':>6} {units[1:]} {units[1:]}")

    def _form(self, row: dict[str, Any] | None) -> str:
        if row is None:
            return " ".join(
                [f"{'N/A':>9} {'N/A':>7} {'N/A':>7} {'N/A':>7}", *(f"{'N/A':>10}" for _ in self._request.rivals)]
            )
        rivals = "".join(f" {row['vs'][name]['ratio']:>10.2f}" for name in self._request.rivals)
        return f"{row['time_us']:>9.1f} {row['algbw']:>7.2f} {row['busbw']:>7.2f} {row['wrong']:>7}{rivals}"

    def _profile(self, message: dict[str, Any]) -> None:
        """Write the profile of the cost model, whole at once, and print what it says and how well it fits."""
        profile, (error, algorithm, size) = message["profile"], message["worst"]
        if self._json is not None:
            self._json.write(json.dumps(profile, indent=2) + "\n")
        near, compute = profile["near"], profile["compute"]
        products = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in compute["flops"].items())
        lines = (
            f"# all_reduce of every algorithm, {self._peers} ranks, transport {self._request.transport}: "
            f"{len(message['times'])} algorithms, {len(self._request.sizes)} sizes",
            f"alpha, a hop           {near['latency'] * 1e6:10.1f} us",
            f"overhead, a message    {profile['overhead'] * 1e6:10.1f} us at each end",
            f"operation              {profile['operation'] * 1e6:10.1f} us: header, confirmation",
            f"beta, a byte moved     {1e9 / near['bandwidth']:10.4f} ns ({near['bandwidth'] / 1e9:.2f} GB/s)",
            f"gamma, a byte reduced  {1e9 / profile['reduce_rate']:10.4f} ns ({profile['reduce_rate'] / 1e9:.2f} GB/s)",
            f"memory, all ranks      {message['copy'] / _GIB:10.2f} GiB/s copied, "
            f"{message['add'] / _GIB:.2f} GiB/s added",
            f"products, a rank       {products} GFLOP/s, all ranks at once",
            f"memory, a rank         {compute['bandwidth'] / 1e9:10.2f} GB/s read and written by operations",
            f"kernel, a call         {compute['kernel'] * 1e6:10.1f} us",
            f"# Residual of computing: {100 * math.expm1(message['compute_error']):.0f}%",
            f"# Residual: {100 * math.expm1(message['error']):.0f}% (root mean square of the logarithm), at worst a "
            f"factor of {math.exp(abs(error)):.2f} ({algorithm}, {size} B)",
            f"# What it finds fastest takes {message['loss']:.2f} of the time of what is, on average over the sizes",
        )
        for line in lines:
            self._print(line)

    def _end(self, wrong: int) -> None:
        ours = sum(row["wrong"] for row in self._rows)
        self._print(f"# Out of bounds values : {ours} {'FAILED' if ours else 'OK'}")
        for name in self._request.rivals:
            theirs = sum(row["vs"][name]["wrong"] for row in self._rows)
            if theirs:
                self._print(f"# Out of bounds values of {name} : {theirs} FAILED")
        average = sum(row["busbw"] for row in self._rows) / len(self._rows)
        self._print(f"# Avg bus bandwidth    : {average:.4f}")
        if wrong and not self._table:
            print(f"ringhold: {wrong} values were wrong", file=sys.stderr)
        if self._plot_to is not None:
            self._plot(self._plot_to)

    def _plot(self, path: Path) -> None:
        """Draw the time over the size, a line for each competitor and form."""
        from launch.chart import line_chart

        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self._rows:
            form = "in place" if row["inplace"] else "out of place"
            times = {f"ringhold {row['transport']}": row["time_us"]}
            times |= {name: rival["time_us"] for name, rival in row["vs"].items()}
            for name, microseconds in times.items():
                lines.setdefault(f"{name}, {form}", []).append((row["size"], microseconds))
        title = f"{self._request.kind}, {self._peers} ranks on one host"
        sizes = sorted({row["size"] for row in self._rows})
        path.write_text(
            line_chart(lines, title, "bytes", "microseconds", log_x=True, log_y=True, x_format=_short, x_ticks=sizes)
        )

    def _print(self, line: str) -> None:
        if self._table:
            print(line, flush=True)

    def _clear(self) -> None:
        """Take the progress line away."""
        if self._progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _short(size: float) -> str:
    """Write a number of bytes with its unit: 64K."""
    for unit, bytes_ in (("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if size >= bytes_:
            return f"{size / bytes_:.3g}{unit}"
    return f"{size:.3g}"
