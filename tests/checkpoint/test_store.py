"""Stores on local disk, in memory and on an S3 server: steps, shared chunks, replacement, tidying."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from checkpoint import leases
from checkpoint.codec import Codec
from checkpoint.gc import gc
from checkpoint.loading import load, load_state
from checkpoint.packs import PackWriter, Piece
from checkpoint.reader import Reader
from checkpoint.saving import save
from checkpoint.store import Store, is_store, parse_reference, save_of
from checkpoint.verify import verify
from checkpoint.writer import Writer
from collectives.errors import CorruptFile, NoCheckpoint, StorageFailed, UsageError


def state_at(step: int) -> dict[str, Any]:
    """One tensor that changes with every step and one that does not."""
    return {
        "model": {"moves": torch.arange(70_000.0) * 10 + step, "stays": torch.arange(600_000.0).reshape(600, 1000)},
        "optimizer": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["moves"]}],
        "rng": {"python": b"\x00\xff", "big": 1 << 90},
        "nan": float("nan"),
    }


def check(place: str, step: int) -> None:
    state = load_state(place, step=step)
    wanted = state_at(step)
    assert all(torch.equal(state["model"][key], wanted["model"][key]) for key in wanted["model"])
    assert state["optimizer"] == wanted["optimizer"]
    assert state["rng"] == wanted["rng"]
    assert str(state["nan"]) == "nan"


def test_steps_come_and_go_and_share_what_did_not_change(place: str) -> None:
    assert not is_store(place)
    with pytest.raises(NoCheckpoint, match="there is no Ringhold checkpoint"):
        load_state(place)
    first = save(place, state_at(0), metadata={"note": "first"})
    others = [save(place, state_at(step), step=10 * step) for step in (1, 2, 3)]
    assert is_store(place)
    assert first.step == 0
    assert all(report.written.raw == 70_000 * 4 for report in others), "only what changed is written"
    with Store(place) as store:
        assert store.steps() == [0, 10, 20, 30]
        assert store.manifest(0).metadata == {"note": "first"}
        assert not verify(store, store.steps(), threads=2).damages
        assert store.storage.names("saves") == []
        with pytest.raises(NoCheckpoint, match="has no step 11; it has 0, 10, 20, 30"):
            store.manifest(11)
    for step in (1, 2, 3):
        check_at = load_state(place, step=10 * step)
        assert check_at["model"]["moves"][0].item() == step
    save(place, state_at(7), step=30)
    assert load_state(place)["model"]["moves"][0].item() == 7
    with Store(place) as store:
        dry = gc(store, keep_last=1, keep_every=20, dry_run=True)
        assert store.steps() == [0, 10, 20, 30]
        report = gc(store, keep_last=1, keep_every=20)
        assert (report.kept, report.removed) == (dry.kept, dry.removed) == ((0, 20, 30), (10,))
        assert len(report.packs) == 2, "that of step 10 and that of the step 30 that was replaced"
        assert not verify(store, store.steps()).damages
    check(place, 0)


def test_a_reader_gets_any_box_without_torch(place: str) -> None:
    save(place, state_at(5), step=5)
    with Reader(f"{place}@5") as reader:
        from collectives.region import Region

        raw = reader.read("model/stays", Region((3, 10), (8, 900)))
        wanted = state_at(5)["model"]["stays"][3:8, 10:900]
        assert raw.tobytes() == wanted.contiguous().numpy().tobytes()
        assert reader.state()["model"]["moves"] == "model/moves"
        with pytest.raises(NoCheckpoint, match="no tensor 'other'"):
            reader.read("other")


def test_a_writer_that_does_not_finish_leaves_nothing(place: str) -> None:
    raw = torch.ones(1000).numpy().view("uint8")
    with pytest.raises(UsageError, match="4000 bytes were wanted of 'b', 5 given"), Writer(place, 1) as writer:
        writer.add("a", "F32", (1000,), lambda _: raw)
        writer.add("b", "F32", (1000,), lambda _: raw[:5])
    with Writer(place, 1) as writer:
        writer.add("a", "F32", (1000,), lambda _: raw)
        with pytest.raises(UsageError, match="its state and its tensors differ"):
            writer.finish({})
    with Store(place) as store:
        assert store.steps() == []
        assert store.storage.names("saves") == []


def test_gc_keeps_what_a_running_save_needs(place: str) -> None:
    save(place, state_at(0), step=0)
    save(place, state_at(1), step=1)
    with Store(place) as store:
        lease = leases.take(store.storage, leases.Lease.mine("save", "000000002-abc", (0,)), "0")
        with PackWriter(store.storage, "000000002-abc-0.pack", Codec(), {}) as pack:
            pack.add([Piece(torch.rand(100).numpy().view("uint8"), "F32")])
        report = gc(store, keep_last=1)
        assert report.running == ("000000002-abc",)
        assert report.removed == ()
        assert report.kept == (0, 1)
        check(place, 0)
        lease.release()
        report = gc(store, keep_last=1)
        assert report.removed == (0,)
        assert "000000002-abc-0.pack" in report.packs
        check(place, 1)


def test_a_lease_ends_with_its_process_or_its_age(tmp_path: Path) -> None:
    code = (
        "import sys; from checkpoint import leases; from checkpoint.store import Store; "
        "leases.take(Store(sys.argv[1]).storage, leases.Lease.mine('save', 'x', ()), '0'); print('taken', flush=True); "
        "sys.stdin.read()"
    )
    with Store(tmp_path) as store:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"taken\n"
        (lease,) = leases.read_all(store.storage).values()
        assert lease.alive
        child.kill()
        child.communicate()
        assert not lease.alive
        away = msgspec.structs.replace(lease, host="elsewhere")
        assert away.alive
        assert not msgspec.structs.replace(away, since=away.since - leases.AWAY_SECONDS - 1).alive


def test_a_save_beside_a_gc_shares_nothing(tmp_path: Path) -> None:
    save(tmp_path, state_at(0), step=0)
    with Store(tmp_path) as store, leases.take(store.storage, leases.Lease.mine("gc", "g"), "gc"):
        report = save(tmp_path, state_at(0), step=1)
    assert report.written.shared == 0
    assert report.written.raw == report.nbytes


def test_gc_takes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, state_at(0), step=0)
    left = ["steps/.000000009.json.1.2", "packs/000000009-0123456789ab-3r1.pack", "saves/000000009-0123456789ab-3.json"]
    others = ["packs/mine.pack", "packs/notes.txt", "steps/readme.md"]
    for name in (*left, *others):
        (tmp_path / name).write_bytes(b"x")
    dead = msgspec.structs.replace(leases.Lease.mine("save", "000000009-0123456789ab"), born="0")
    (tmp_path / left[2]).write_bytes(msgspec.json.encode(dead))
    with Store(tmp_path) as store:
        assert gc(store).packs == (left[1].removeprefix("packs/"),)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in others)
    check(str(tmp_path), 0)


def test_gc_removes_nothing_if_a_manifest_that_is_kept_cannot_be_read(tmp_path: Path) -> None:
    for step in range(3):
        save(tmp_path, state_at(step), step=step)
    bad = tmp_path / "steps" / "000000001.json"
    bad.write_bytes(bad.read_bytes()[:-40])
    before = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    with Store(tmp_path) as store, pytest.raises(CorruptFile, match="altered or cut short"):
        gc(store, keep_last=2)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == before
    with Store(tmp_path) as store:
        assert gc(store, keep_last=1).removed == (0, 1)
    check(str(tmp_path), 2)


def test_a_full_disk_leaves_earlier_steps_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, state_at(0), step=0)
    fired = []

    def full(handle: int, data: Any) -> int:
        fired.append(handle)
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFailed, match="No space left on device; free some space"):
            save(tmp_path, state_at(1), step=1)
    assert fired
    with Store(tmp_path) as store:
        assert store.steps() == [0]
        assert len(store.packs()) == 1
        assert store.storage.names("saves") == []
    check(str(tmp_path), 0)


def test_no_permission_and_no_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StorageFailed, match="Not a directory; a part of the path is a file"):
        save(file / "store", state_at(0))
    with pytest.raises(StorageFailed, match="cannot open nosuch://"):
        load("nosuch://bucket/x", {})
    save(tmp_path / "s", state_at(0))

    def denied(*_: Any, **__: Any) -> int:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StorageFailed, match="Permission denied; check who owns it"):
        load(tmp_path / "s", state_at(1))


def test_references_and_names() -> None:
    assert parse_reference("a/b@12") == ("a/b", 12)
    assert parse_reference("s3://user@host/b") == ("s3://user@host/b", None)
    assert parse_reference("a@b@3") == ("a@b", 3)
    assert save_of("000000002-abc-17.pack") == "000000002-abc"


def test_the_store_and_its_commands_need_no_torch(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(10)}, step=3)
    code = (
        "import sys, json\n"
        "from launch import console\n"
        "from launch.cli import ringhold\n"
        "for words in (['ls'], ['inspect', '--json'], ['verify'], ['gc', '--keep-last', '1']):\n"
        "    assert console.run(ringhold, ['ckpt', words[0], sys.argv[1], *words[1:]]) == 0, words\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert shown["tensors"][0]["shape"] == [10]
    assert "all is as it was saved" in done.stdout


def test_an_error_after_the_manifest_appeared_leaves_its_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Store.publish

    def late(self: Store, manifest: Any) -> None:
        publish(self, manifest)
        raise StorageFailed("the folder cannot be brought to the disk")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", late)
        with pytest.raises(StorageFailed, match="brought to the disk"):
            save(tmp_path, state_at(1), step=1)
    check(str(tmp_path), 1)
