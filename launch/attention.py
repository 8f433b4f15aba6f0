"""`ringhold attention`, also `python -m launch.attention` under torchrun or MPI launchers: attention over ranks.

Each rank is a process of its own, on an emulated network unless another transport is asked for.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from collectives.errors import CorruptFile, UsageError
from launch import bench_host, console, units
from launch.attention_request import AttentionRequest, affordable
from launch.bench_request import parse_size
from launch.display import print_table
from launch.environment import Launcher, detect
from launch.overlap_chart import overlap_chart
from launch.trace import Event, merge, read

SCHEMES = ("ring", "bidirectional", "token_ring", "token_ring_relay", "hybrid", "ulysses", "usp", "tree")


@click.command("attention", context_settings={"max_content_width": 100})
@click.option(
    "--scheme", default="token_ring", show_default=True, help=f'{", ".join(SCHEMES)}; several; "all"; "auto".'
)
@click.option("--ranks", type=click.IntRange(1), help="Processes.  [default: 4; under a launcher its processes]")
@click.option("--seq", type=click.IntRange(1), default=8192, show_default=True, help="Rows of the sequence.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Heads of queries.")
@click.option("--kv-heads", type=click.IntRange(1), help="Heads of keys and values.  [default: as many]")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True, help="Features of a head.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--dtype", type=click.Choice(["float", "double", "bfloat16", "half"]), default="float", show_default=True)
@click.option("--causal/--full", default=False, show_default=True, help="Whether rows see only what is before them.")
@click.option("--backward", is_flag=True, help="The gradients as well, as a row of their own.")
@click.option(
    "--balance",
    type=click.Choice(["contiguous", "zigzag", "striped"]),
    help="[default: contiguous; zigzag if causal]",
)
@click.option("--parts", type=click.IntRange(1), default=8, show_default=True, help="Pieces of a rank's rows.")
@click.option(
    "--columns", type=click.IntRange(1), default=2, show_default=True, help="Ranks a node, or that share heads."
)
@click.option("--transport", default="emulated:sockets", show_default=True, help="What carries the tensors.")
@click.option("--topology", type=click.Path(path_type=Path), help="File of the network.  [default: a mesh of --link]")
@click.option("--link", default="25M", show_default=True, help="Bytes a second of each link of the mesh.")
@click.option("--latency", type=float, default=100e-6, show_default=True, help="Seconds that each link of it takes.")
@click.option(
    "--compute",
    type=click.Choice(["auto", "real", "modelled"]),
    default="auto",
    show_default=True,
    help="Compute, or sleep as long; auto: sleep where ranks outnumber cores.",
)
@click.option("--ratio", type=float, default=1.0, show_default=True, help="Of modelled computing to communicating.")
@click.option(
    "--check", "checked", type=click.IntRange(1), help="Rows compared with one process.  [default: what fits]"
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Timed rounds; the best counts.")
@click.option("--data", multiple=True, type=click.Path(), help="Text files.  [default: Python's own text]")
@click.option("--trace", "trace_to", type=console.OutputFile(), help="Write a trace for Perfetto.")
@click.option(
    "--svg",
    "svg_to",
    type=console.OutputFile(),
    help="Draw computing and transfers (of the last scheme).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a scheme.")
def command(scheme: str, ranks: int | None, trace_to: Path | None, svg_to: Path | None, **given: Any) -> int:
    """Run attention over a sequence that is spread over ranks, on embeddings of real text, and check it.

    Prints the largest error against one process, the bytes sent beside the closed formula, the time beside that of the
    simulator for the same schedule, and eta: which part of the possible overlap of computing and communicating was had;
    with --backward also of the gradients of q, k and v. Exits with 1 if an error or a number of bytes is off.

    \b
    ringhold attention --scheme token_ring --ranks 4 --seq 32768 --heads 32 --trace out.json --svg out.svg
    torchrun --nproc-per-node 4 -m launch.attention --scheme all
    mpirun -n 4 ringhold attention --scheme ring
    """
    launcher = detect(os.environ)
    if launcher is not None and ranks not in (None, launcher.size):
        raise UsageError(f"under {launcher.title} each of its {launcher.size} processes is a rank; drop --ranks")
    world = launcher.size if launcher is not None else ranks or 4
    with tempfile.TemporaryDirectory(prefix="ringhold-attention-") as folder:
        traced = bool(trace_to or svg_to)
        if traced and launcher is not None:
            raise UsageError("--trace and --svg are for ranks started from here; under a launcher set RINGHOLD_TRACE")
        request = _request(scheme, world, given, folder if traced else "")
        wrong = _measure(request, launcher, world, given["as_json"])
        if traced:
            _draw(Path(folder), trace_to, svg_to, f"{request.schemes[-1]}, {world} ranks, {request.seq} rows")
    return 1 if wrong else 0


def _measure(request: AttentionRequest, launcher: Launcher | None, world: int, as_json: bool) -> int:
    report = _Report(as_json)
    if launcher is None:
        wrong = bench_host.alone(request, world, report, "launch.attention_child")
    else:
        wrong = bench_host.launched(request, launcher, report, _be_rank)
    report.close()
    return wrong


def _be_rank(request: AttentionRequest, launcher: Launcher, addresses: Mapping[str, str], token: str, show: Any) -> int:
    from launch.attention_rank import measure  # imports torch
    from launch.bench_rank import Place

    return measure(request, Place(launcher.rank, launcher.size, addresses, token), show)


def _request(scheme: str, world: int, given: dict[str, Any], trace_to: str) -> AttentionRequest:
    """Check the options. Raises `UsageError`."""
    columns = given["columns"] if world % given["columns"] == 0 else 1
    schemes = tuple(name for name in SCHEMES if columns > 1 or name not in ("hybrid", "usp"))
    schemes = schemes if scheme == "all" else tuple(scheme.split(","))
    if unknown := [name for name in schemes if name not in (*SCHEMES, "auto")]:
        raise UsageError(f"--scheme {unknown[0]}: there are {', '.join(SCHEMES)}, auto and all")
    if columns == 1 and {"hybrid", "usp"} & set(schemes):
        raise UsageError(f"--columns {given['columns']} do not divide {world} ranks; hybrid and usp need that they do")
    heads, kv_heads = given["heads"], given["kv_heads"] or given["heads"]
    if heads % kv_heads:
        raise UsageError(f"--kv-heads {kv_heads} must divide --heads {heads}")
    seq = given["seq"]
    checked = min(seq, given["checked"] or affordable(seq, heads, given["head_dim"], given["batch"], given["backward"]))
    if min(seq, checked) < 2 * world:
        raise UsageError(f"--seq {seq} (checked: {checked}) is too short: {world} ranks need {2 * world} rows or more")
    if not (given["ratio"] > 0 and given["latency"] >= 0):
        raise UsageError("--ratio must be positive, and --latency not negative")
    if given["topology"] is not None and not given["topology"].exists():
        raise UsageError(f"--topology {given['topology']}: there is no such file")
    bandwidth = float(parse_size(given["link"]))
    if not bandwidth:
        raise UsageError("--link must be positive")
    plain = ("head_dim", "batch", "dtype", "causal", "backward", "parts", "transport", "latency", "ratio", "rounds")
    outnumbered = world > (os.cpu_count() or 1)
    return AttentionRequest(
        schemes=schemes,
        seq=seq,
        checked=checked,
        heads=heads,
        kv_heads=kv_heads,
        balance=given["balance"] or ("zigzag" if given["causal"] else "contiguous"),
        columns=columns,
        topology=str(given["topology"].resolve()) if given["topology"] else "",
        bandwidth=bandwidth,
        modelled=given["compute"] == "modelled" or (given["compute"] == "auto" and outnumbered),
        data=tuple(given["data"]),
        trace_to=trace_to,
        **{name: given[name] for name in plain},
    )


class _Report:
    """Takes the messages of rank 0: rows become a table, or a line of JSON each."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: list[dict[str, Any]] = []

    def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "progress" and sys.stderr.isatty():
            print(message["text"], file=sys.stderr)
        if message["type"] == "row":
            self._rows.append(message["row"])
            if self._as_json:
                print(json.dumps(message["row"]), flush=True)

    def close(self) -> None:
        """Print the table."""
        if self._as_json or not self._rows:
            return
        print_table(
            ("scheme", "error", "sent", "formula", "time", "simulated", "eta", "simulated", ""),
            [
                (
                    row["scheme"] + " backward" * (row["pass"] == "backward"),
                    f"{row['max_error']:.1e}",
                    units.size(row["bytes_sent"]),
                    "equal" if row["bytes_sent"] == row["bytes_formula"] else units.size(row["bytes_formula"]),
                    units.duration(row["time_s"]),
                    "-" if row["predicted_s"] is None else units.duration(row["predicted_s"]),
                    _share(row["eta"]),
                    _share(row["predicted_eta"]),
                    "ok" if row["correct"] else "WRONG",
                )
                for row in self._rows
            ],
        )
        first = self._rows[0]
        if first["checked_seq"] < first["seq"]:
            print(f"errors are of a sequence of {first['checked_seq']} rows, all else of {first['seq']}")
        if first["compute"] == "modelled":
            print("computation was modelled by sleeping while the times were taken")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _draw(folder: Path, trace_to: Path | None, svg_to: Path | None, title: str) -> None:
    """Put the members' traces together. Raises `UsageError` if a file cannot be written."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise CorruptFile(f"the ranks left no traces in {folder}")
    events: list[Event] = merge([read(path) for path in paths])
    texts = []
    if trace_to is not None:
        texts.append((trace_to, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"))
    if svg_to is not None:
        texts.append((svg_to, overlap_chart(events, title)))
    for path, text in texts:
        try:
            path.write_text(text)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(console.run(command))
