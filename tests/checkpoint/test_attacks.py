"""Bad stores are refused by clear errors, with exit code 4, and nothing outside of them is touched."""

import contextlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.codec import Codec, decode
from checkpoint.loading import load, load_state
from checkpoint.manifest import Manifest
from checkpoint.saving import save
from checkpoint.store import Store
from checkpoint.verify import verify
from collectives.errors import CorruptChunk, CorruptFile, NoCheckpoint, RingholdError, UnknownFormat
from collectives.hashing import digest
from tests.checkpoint.attacks.forge import MANIFESTS, Attack, body_of, forge, manifest_of, seal

fuzz = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A good store of one step."""
    place = tmp_path / "store"
    chance = torch.Generator().manual_seed(0)
    save(place, {"w": torch.randn(300, 200, generator=chance), "z": torch.zeros(50), "lr": 0.125}, step=1)
    return place


@pytest.mark.parametrize("attack", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_says_what_cannot_be_is_refused(store: Path, attack: Attack) -> None:
    forge(store, attack)
    with pytest.raises(CorruptFile, match=r"000000001\.json is malformed") as caught:
        load_state(store)
    assert caught.value.exit_code == 4
    with Store(store) as opened:
        assert verify(opened, [1]).damages


def test_what_is_no_manifest_of_ours_is_told_from_a_newer_one(store: Path) -> None:
    body = json.dumps(body_of(store)).encode()
    seal(store, body)
    load_state(store)
    seal(store, body, schema=2)
    with pytest.raises(UnknownFormat, match="has schema 2; this version reads up to 1: upgrade Ringhold"):
        load_state(store)
    seal(store, body, name="other")
    with pytest.raises(UnknownFormat, match="is no manifest of a Ringhold checkpoint"):
        load_state(store)
    seal(store, b'{"step": 1, "step": 1, ')
    with pytest.raises(CorruptFile, match="is malformed"):
        load_state(store)
    manifest_of(store).write_bytes(b"")
    with pytest.raises(UnknownFormat):
        load_state(store)
    manifest_of(store).unlink()
    with pytest.raises(NoCheckpoint):
        load_state(store)


def test_every_flipped_bit_is_found(store: Path) -> None:
    """A bit of each of some bytes that are spread over the manifest and the pack, and of every byte of their heads."""
    (pack,) = (store / "packs").iterdir()
    heads = {8 + at for at in range(30)}
    for path, dense in ((manifest_of(store), set(range(140))), (pack, set(range(8)) | heads)):
        content = path.read_bytes()
        chance = np.random.default_rng(0)
        places = sorted(dense | set(chance.integers(0, len(content), 60).tolist()) | {len(content) - 1})
        for at in places:
            bit = int(chance.integers(0, 8))
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with Store(store) as opened:
                assert verify(opened, [1]).damages, f"{path.name}: bit {bit} of byte {at}"
        path.write_bytes(content)
    with Store(store) as opened:
        assert not verify(opened, [1]).damages


def test_a_damaged_pack_is_told_by_chunk_and_tensor(store: Path) -> None:
    (pack,) = (store / "packs").iterdir()
    content = pack.read_bytes()
    into = {"w": torch.zeros(300, 200), "z": torch.zeros(50), "lr": 0.0}

    def told(kind: type[RingholdError], words: str) -> None:
        with pytest.raises(kind, match=words):
            load(store, into)
        with Store(store) as opened:
            damages = verify(opened, [1]).damages
        assert damages
        assert any("1/w" in damage.tensors for damage in damages)

    pack.write_bytes(content[:100])
    told(CorruptFile, "ends at byte 100, before byte")
    pack.write_bytes(content[:5000] + b"\x00" * 64 + content[5064:])
    told(CorruptChunk, "is corrupt .*load another step")
    pack.unlink()
    told(NoCheckpoint, "cannot read .*pack: it is not there")
    pack.mkdir()
    with pytest.raises(RingholdError, match=r"cannot read .*it is a folder"):
        load(store, into)


def _bomb(raw: int, announced: int) -> bytes:
    """An encoded chunk whose one plane of `raw` bytes is a frame of `announced` zeros."""
    frame = zstandard.ZstdCompressor().compress(bytes(announced))
    rest = struct.pack("<I", len(frame)) + frame
    return bytes((1, 1)) + digest(rest)[:8] + rest


def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    size = 1 << 16
    bomb = _bomb(size, 1 << 30)
    assert len(bomb) < size
    store = tmp_path / "store"
    save(store, {"w": torch.zeros(size, dtype=torch.uint8)})
    (pack,) = (store / "packs").iterdir()
    pack.write_bytes(b"RINGPACK" + bomb)

    def lie(body: dict[str, Any]) -> None:
        for chunk in body["chunks"]:
            chunk[3], chunk[4] = 8, len(bomb)

    body = body_of(store)
    whole = {**body["tensors"]["w"], "grid": [[1, 1]], "chunks": [0]}
    lie(body)
    body["tensors"]["w"], body["chunks"] = whole, [["ab" * 32, size, 0, 8, len(bomb)]]
    (found,) = (store / "steps").glob("*.json")
    assert found.name == "000000000.json"
    seal(store, json.dumps(body).encode())
    code = (
        "import resource, sys\n"
        "from checkpoint.reader import Reader\n"
        "from collectives.errors import CorruptChunk\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    Reader(sys.argv[1]).read('w')\n"
        "except CorruptChunk as error:\n"
        "    assert 'announces 1073741824' in str(error), error\n"
        "    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store)], check=True)


def test_a_path_traversal_reads_nothing(tmp_path: Path) -> None:
    store, secret = tmp_path / "store", tmp_path / "secret.pack"
    save(store, {"w": torch.arange(100.0)})
    (pack,) = (store / "packs").iterdir()
    pack.rename(secret)
    forge(store, lambda body: body["packs"].__setitem__(0, "../../secret.pack"))
    with pytest.raises(CorruptFile, match="no name of a pack"):
        load_state(store)


@fuzz
@given(st.data())
def test_any_change_of_a_manifest_is_refused_or_harmless(store: Path, data: st.DataObject) -> None:
    content = manifest_of(store).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "byte", "insert", "drop"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    changed = {
        "cut": content[:at],
        "byte": content[:at] + byte + content[at + 1 :],
        "insert": content[:at] + byte + content[at:],
        "drop": content[:at] + content[at + 1 :],
    }[kind]
    try:
        read = Manifest.decode(changed, "it")
    except (CorruptFile, UnknownFormat):
        return
    assert changed == content or read == Manifest.decode(content, "it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(st.data())
def test_any_value_in_any_place_of_a_sealed_manifest_is_refused_or_read(store: Path, data: st.DataObject) -> None:
    body = body_of(store)
    node: Any = body
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(json_values)
    content = manifest_of(store).read_bytes()
    try:
        seal(store, json.dumps(body).encode())
        load_state(store)
    except RingholdError as error:
        assert error.exit_code in (2, 4)
    finally:
        manifest_of(store).write_bytes(content)


@fuzz
@given(st.binary(max_size=200), st.integers(0, 4096))
def test_any_bytes_decode_to_the_size_or_are_refused(data: bytes, size: int) -> None:
    with contextlib.suppress(CorruptChunk):
        assert len(decode(np.frombuffer(data, np.uint8), size)) == size


@fuzz
@given(st.integers(4, 400), st.sampled_from(["F32", "BF16", "I64", "F8_E4M3"]), st.data())
def test_an_encoded_chunk_that_was_sealed_again_decodes_or_is_refused(
    count: int, dtype: str, data: st.DataObject
) -> None:
    raw = np.zeros(count * 64, np.uint8)
    raw[::64] = 7
    stored = Codec().encode(raw, dtype).copy()
    assert len(stored) < len(raw)
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= 1 << data.draw(st.integers(0, 7))
    rest = stored[10:].tobytes()
    stored[2:10] = np.frombuffer(digest(rest)[:8], np.uint8)
    with contextlib.suppress(CorruptChunk):
        assert len(decode(stored, len(raw))) == len(raw)


def test_the_commands_end_with_code_4_and_one_line(store: Path) -> None:
    (pack,) = (store / "packs").iterdir()
    content = bytearray(pack.read_bytes())
    content[-3] ^= 4
    pack.write_bytes(content)
    code = (
        "import sys\n"
        "from launch import console\n"
        "from launch.cli import ringhold\n"
        "print([console.run(ringhold, ['ckpt', *words.split(), sys.argv[1]]) for words in sys.argv[2:]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), "verify", "verify --json", "ls"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[4, 4, 0]"
    assert "DAMAGED" in done.stdout
    missing = subprocess.run(
        [sys.executable, "-c", code, str(store / "no"), "verify", "ls", "inspect", "gc"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert missing.stdout.splitlines()[-1] == "[4, 4, 4, 4]"
    assert missing.stderr.count("ringhold: error: there is no Ringhold checkpoint in") == 3
    assert missing.stderr.count("does not exist; check the path") == 1, "which inspect says, as it knows all formats"
    assert "Traceback" not in missing.stderr + done.stderr
