"""Saving, loading, compressing: against torch.distributed.checkpoint, zipnn and plain zstd, in turns in one run.

    python -m benchmarks.checkpoint                        # all rows
    python -m benchmarks.checkpoint --rows codec,partial

Times are medians of turns in which both sides do the same on the same disk with the same bytes, fsync included. Ratios
above 1 are in favour of Ringhold. `--weights FILE` takes a safetensors file of bf16 or fp32 weights for the codec row;
else the weights are those of a small network that is trained here for some seconds. The codec's speeds are by processor
time, so that a busy machine does not count.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import zstandard
from torch import Tensor
from torch import multiprocessing as mp
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.figures import table
from checkpoint import LoadOptions, SaveOptions, load, save, save_async
from checkpoint.codec import Codec, decode
from collectives.communicator import Communicator
from parallel.layout import Layout, Mesh, Split

MIB = 1 << 20
ROWS = ("codec", "save", "async", "dedup", "partial", "memory")
RUN, TOKEN = "benchmark", "benchmark"


@click.command()
@click.option("--rows", default=",".join(ROWS), show_default=True, help="Which, with commas between.")
@click.option("--size", type=click.IntRange(1), default=256, show_default=True, help="MiB of state over all ranks.")
@click.option("--ranks", type=click.IntRange(1), default=4, show_default=True, help="For the row save.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write.  [default: a temporary one]")
@click.option("--weights", type=click.Path(path_type=Path), help="A safetensors file, for the row codec.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    rows: str, size: int, ranks: int, turns: int, folder: Path | None, weights: Path | None, as_json: bool
) -> None:
    """Measure checkpoints."""
    torch.set_num_threads(1)
    wanted = rows.split(",")
    place = Path(tempfile.mkdtemp(prefix="ringhold-checkpoint-", dir=folder))
    found: list[dict[str, Any]] = []
    try:
        if "codec" in wanted:
            found += codec_rows(weights, turns)
        if "save" in wanted:
            found += save_rows(place, size * MIB, ranks, turns)
        if "async" in wanted:
            found += async_rows(place, size * MIB, turns)
        if "dedup" in wanted:
            found += dedup_rows(place, size * MIB)
        if "partial" in wanted:
            found += partial_rows(place, size * MIB)
        if "memory" in wanted:
            found += memory_rows(place, size * MIB)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if as_json:
        print(json.dumps(found))
        return
    print(
        table(
            ("what", "ringhold", "other", "ratio"), [[r["what"], r["ringhold"], r["other"], r["ratio"]] for r in found]
        )
    )


def row(what: str, ringhold: str, other: str = "", ratio: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of the table."""
    return {
        "what": what,
        "ringhold": ringhold,
        "other": other,
        "ratio": "" if ratio is None else f"{ratio:.2f}",
        **more,
    }


def timed(work: Callable[..., Any], *given: Any, **named: Any) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work(*given, **named)
    return time.perf_counter() - start


# --- codec ---


def codec_rows(weights: Path | None, turns: int) -> list[dict[str, Any]]:
    """Size and speed on bf16 weights, chunk by chunk, one thread, against zipnn and plain zstd at its default level."""
    from zipnn import ZipNN

    data = bf16_weights(weights)
    pieces = [data[at : at + MIB] for at in range(0, len(data), MIB)]
    zip_nn = ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
    plain, unplain = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    ours = Codec(1)
    sides: dict[str, tuple[Callable[[Any], Any], Callable[[Any, int], Any]]] = {
        "ringhold": (lambda piece: ours.encode(piece, "BF16"), decode),
        "zipnn": (
            lambda piece: zip_nn.compress(bytearray(piece.tobytes())),
            lambda packed, _: zip_nn.decompress(packed),
        ),
        "zstd": (lambda piece: plain.compress(piece), lambda packed, _: unplain.decompress(packed)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    sizes: dict[str, int] = {}
    for _ in range(turns):
        for name, (pack, unpack) in sides.items():
            start = time.process_time()
            packed = [pack(piece) for piece in pieces]
            between = time.process_time()
            back = [unpack(one, len(piece)) for one, piece in zip(packed, pieces, strict=True)]
            times[name].append((between - start, time.process_time() - between))
            sizes[name] = sum(map(len, packed))
            assert all(bytes(one) == piece.tobytes() for one, piece in zip(back, pieces, strict=True)), name
    ratios = {name: size / len(data) for name, size in sizes.items()}
    found = [
        row(
            f"bf16 weights, {len(data) / MIB:.0f} MiB: size against {name}",
            f"{ratios['ringhold']:.4f}",
            f"{ratios[name]:.4f}",
        )
        for name in ("zipnn", "zstd")
    ]
    for index, direction in enumerate(("compress", "decompress")):
        speed = {
            name: len(data) / statistics.median(t[index] for t in several) / 1e6 for name, several in times.items()
        }
        for name in ("zipnn", "zstd"):
            found.append(
                row(
                    f"{direction} against {name}",
                    f"{speed['ringhold']:.0f} MB/s",
                    f"{speed[name]:.0f} MB/s",
                    speed["ringhold"] / speed[name],
                )
            )
    return found


def bf16_weights(path: Path | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Raw bytes of weights as bf16: those of a file, or of a model that is trained for some seconds."""
    if path is not None:
        from safetensors.torch import load_file

        tensors = [t.to(torch.bfloat16) for t in load_file(path).values() if t.is_floating_point() and t.dim() > 1]
    else:
        tensors = [t.detach().to(torch.bfloat16) for t in trained().parameters() if t.dim() > 1]
    joined = torch.cat([t.reshape(-1) for t in tensors])
    data: np.ndarray[Any, np.dtype[np.uint8]] = joined.view(torch.uint8).numpy()
    return data


def trained() -> torch.nn.Module:
    """A small network after some steps of Adam on a task that it can learn."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU()) for _ in range(8)),
        torch.nn.Linear(1024, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    teacher = torch.randn(1024, 256)
    for _ in range(60):
        x = torch.randn(64, 1024)
        loss = torch.nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return model


# --- many ranks against torch's distributed checkpoint ---


def save_rows(place: Path, nbytes: int, ranks: int, turns: int) -> list[dict[str, Any]]:
    """Blocking save uncompressed, and load on another layout, of shards by rows on some ranks."""
    from tests.harness.cluster import Cluster  # a coordinator on a free port, ended with the run

    with Cluster(founders=ranks, transport="gloo") as cluster:
        context = mp.get_context("spawn")
        queue: Any = context.SimpleQueue()
        arguments = (ranks, cluster.address, str(place), nbytes, turns, queue)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = queue.get()
        for process in processes:
            process.join()
    lines = []
    for what, ours, theirs in found:
        mine, other = statistics.median(ours), statistics.median(theirs)
        lines.append(
            row(f"{what}, {ranks} ranks, {nbytes // MIB} MiB", f"{mine:.3f} s", f"{other:.3f} s", other / mine)
        )
    return lines


def _rank(rank: int, world: int, address: str, place: str, nbytes: int, turns: int, queue: Any) -> None:
    """One rank: both libraries save and load the same shards in turns."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    comm = Communicator.join(address, run="test", token="harness", transport="gloo")
    layers = 8
    side = int((nbytes / layers / 4) ** 0.5) // (8 * world) * (8 * world)
    torch.manual_seed(0)
    wholes = {f"layer{n}": torch.randn(side, side) for n in range(layers)}
    torchs: dict[str, Any] = {key: distribute_tensor(t, mesh, [Shard(0)]) for key, t in wholes.items()}
    ours = {key: t.chunk(world)[comm.rank].clone() for key, t in wholes.items()}
    rows, columns = (Layout(Mesh.of(x=world), (Split(dim),)) for dim in (0, 1))
    other: dict[str, Any] = {key: distribute_tensor(torch.zeros_like(t), mesh, [Shard(1)]) for key, t in wholes.items()}
    into = {key: torch.zeros_like(t.chunk(world, 1)[comm.rank]).contiguous() for key, t in wholes.items()}
    times: dict[str, tuple[list[float], list[float]]] = {
        what: ([], []) for what in ("save uncompressed", "save compressed (other: uncompressed)", "load by columns")
    }
    for turn in range(turns + 1):
        here = f"{place}/turn{turn}"
        mine = _together(save, f"{here}-ringhold", ours, rows, comm, options=SaveOptions(level=0))
        small = _together(save, f"{here}-small", ours, rows, comm)
        theirs = _together(dcp_save, torchs, checkpoint_id=f"{here}-torch")
        loaded = _together(load, f"{here}-ringhold", into, columns, comm)
        reloaded = _together(dcp_load, other, checkpoint_id=f"{here}-torch")
        for key, whole in wholes.items():
            assert torch.equal(into[key], whole.chunk(world, 1)[comm.rank])
            assert torch.equal(_local(other[key]), whole.chunk(world, 1)[rank])
        if turn:  # the first one warms up
            for what, pair in zip(times, ((mine, theirs), (small, theirs), (loaded, reloaded)), strict=True):
                times[what][0].append(pair[0])
                times[what][1].append(pair[1])
        dist.barrier()
        if rank == 0:
            for name in ("ringhold", "small", "torch"):
                shutil.rmtree(f"{here}-{name}")
    if rank == 0:
        queue.put([(what, *pair) for what, pair in times.items()])
    comm.leave()
    dist.destroy_process_group()


def _together(work: Callable[..., Any], *given: Any, **named: Any) -> float:
    """Seconds from the start of all ranks to the end of all."""
    dist.barrier()
    start = time.perf_counter()
    work(*given, **named)
    dist.barrier()
    return time.perf_counter() - start


def _local(tensor: Any) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


# --- one process ---


def state_of(nbytes: int, seed: int = 0) -> dict[str, Tensor]:
    """A hundred tensors."""
    torch.manual_seed(seed)
    side = int((nbytes / 100 / 4) ** 0.5) // 16 * 16
    return {f"tensor{n}": torch.randn(side, side) for n in range(100)}


def async_rows(place: Path, nbytes: int, turns: int) -> list[dict[str, Any]]:
    """How long training stands still."""
    state = state_of(nbytes)
    waits, blocks, fast = [], [], []
    for turn in range(turns + 1):
        for tensor in state.values():
            tensor.add_(1)
        waits.append(timed(save, place / f"b{turn}", state))
        fast.append(timed(save, place / f"r{turn}", state, options=SaveOptions(level=0)))
        start = time.perf_counter()
        handle = save_async(place / f"a{turn}", state)
        blocks.append(time.perf_counter() - start)
        handle.wait()
        for name in "bar":
            shutil.rmtree(place / f"{name}{turn}")
    block = statistics.median(blocks[1:])
    return [
        row(
            f"save_async blocks, other: save {what}, {nbytes // MIB} MiB",
            f"{block:.3f} s",
            f"{statistics.median(several[1:]):.3f} s",
            statistics.median(several[1:]) / block,
        )
        for what, several in (("compressed", waits), ("uncompressed", fast))
    ]


def dedup_rows(place: Path, nbytes: int) -> list[dict[str, Any]]:
    """What a second save writes when one tensor of a hundred changed."""
    state = state_of(nbytes)
    first = save(place / "dedup", state)
    state["tensor50"].add_(1)
    second = save(place / "dedup", state)
    share = second.written.stored / first.written.stored
    return [row("second save, 1% changed: bytes written of the first's", f"{share:.4f}", ratio=None)]


def partial_rows(place: Path, nbytes: int) -> list[dict[str, Any]]:
    """What one tensor-parallel rank of eight reads, rows of some tensors and columns of others."""
    state = state_of(nbytes)
    save(place / "partial", state, options=SaveOptions(level=0))
    mesh = Mesh.of(tp=8)
    found = []
    for kind, dims in (("rows", (0, 0)), ("columns", (1, 1)), ("both", (0, 1))):
        layouts = {key: Layout(mesh, (Split(dims[n % 2]),)) for n, key in enumerate(state)}
        shards = {key: t.chunk(8, layouts[key].placements[0].dim)[0].clone() for key, t in state.items()}  # type: ignore[union-attr]
        report = load(place / "partial", shards, layouts, options=LoadOptions())
        share = report.read / sum(t.nbytes for t in state.values())
        found.append(row(f"read by one rank of 8, {kind}: of all bytes", f"{share:.4f}", "0.1250"))
    return found


def memory_rows(place: Path, nbytes: int) -> list[dict[str, Any]]:
    """What a load takes beside the tensors that it fills, at the default bound of 256 MiB."""
    found = []
    for level in (0, 1):
        save(place / f"memory{level}", state_of(nbytes), options=SaveOptions(level=level))
        context = mp.get_context("spawn")
        queue: Any = context.SimpleQueue()
        process = context.Process(target=_peak, args=(str(place / f"memory{level}"), nbytes, queue))
        process.start()
        peak = queue.get()
        process.join()
        kind = "compressed" if level else "uncompressed"
        found.append(
            row(f"memory of a load beside {nbytes // MIB} MiB of tensors, {kind}", f"{peak / MIB:.0f} MiB", "256 MiB")
        )
    return found


def _peak(store: str, nbytes: int, queue: Any) -> None:
    """Growth of this process' resident set while it loads."""
    torch.set_num_threads(1)
    into = {key: torch.ones_like(tensor) for key, tensor in state_of(nbytes).items()}
    load(store, {"tensor0": into["tensor0"]}, options=LoadOptions(strict=False))  # imports and threads are there
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    load(store, into)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    queue.put(peak - before)


if __name__ == "__main__":
    command()
