"""Every cell of the table in docs/formats.md: each real checkpoint into each target, and what the target holds then.

What is written is read again and compared bit for bit with the source, the groups too, and with the library's truth.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoint.compare import compare
from checkpoint.convert import WRITERS, convert
from checkpoint.formats.detect import READERS, open_source
from checkpoint.source import WEIGHTS
from collectives.errors import UsageError
from launch.cli import ringhold
from tests.harness.checkpoints import VOCABULARY, differences, safetensors, unpacked
from tests.harness.cluster import ROOT

SOURCES = (
    *(f"ds/{name}/ckpt" for name in ("z1_dp2_bf16", "z1_dp4_fp32", "z2_dp2_fp32", "z3_dp2_bf16", "z3_dp4_fp32")),
    *(f"ds/{name}/ckpt" for name in ("tp2dp2_z1", "pp2dp2_z1", "moe_ep2dp2_z1")),
    *(f"ds/{name}/universal" for name in ("z1_dp2_bf16", "z3_dp4_fp32", "tp2dp2_z1", "pp2dp2_z1")),
    "more/z3_groups_frozen_subgroups/ckpt",
    *(f"fsdp/{name}/dcp" for name in ("dp2", "dp4_flatten", "fsdp2xtp2")),
    *(f"fsdp/dp2_zstd_and_hf/{name}" for name in ("dcp_zstd", "dcp_hf")),
    *(f"mcore/{name}/torch_dist" for name in ("tp2pp2", "tp2dp2_distopt", "tp2pp2_gqa_swiglu", "ep2_moe4")),
    *(f"mcore/{name}/torch" for name in ("tp2pp2", "ep2_moe4")),
    *(f"hf/{name}" for name in ("tied_fp32_40KB", "untied_bf16_30KB")),
)
REASONS = {"names": "is not what Megatron calls a parameter", "refused": "has no state of an optimizer"}


def table() -> dict[str, dict[str, str]]:
    """The table: source -> target -> cell."""
    lines = (ROOT / "docs" / "formats.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| from |"))
    head = [cell.strip() for cell in lines[start].strip("|").split("|")]
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        source, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[source] = dict(zip(head[1:], cells, strict=True))
    return found


TABLE = table()


def path(name: str) -> Path:
    family, rest = name.split("/", 1)
    return unpacked(family) / rest


def truth(name: str) -> Path:
    found = path(name)
    return found.with_suffix(".truth.safetensors") if name.startswith("hf/") else found.parent / "truth.safetensors"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one, since every conversion is flushed to the disk."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="ringhold-matrix-", dir=memory if memory.is_dir() else None))
    yield made
    shutil.rmtree(made)


def test_the_table_has_every_format() -> None:
    assert set(TABLE) == set(READERS) - {"ringhold"}
    assert all(set(row) == set(WRITERS) for row in TABLE.values())


@pytest.mark.parametrize("name", SOURCES)
def test_a_real_checkpoint_goes_into_every_target_that_can_hold_it(name: str, folder: Path) -> None:
    source = open_source(path(name))
    wanted = safetensors(truth(name))
    rows = VOCABULARY if name.startswith("mcore/") else None
    for target, cell in TABLE[source.format].items():
        if cell in REASONS:
            with pytest.raises(UsageError, match=REASONS[cell]):
                convert(path(name), folder / target, to=target)
            assert list(folder.iterdir()) == [], "a refused conversion left something behind"
            continue
        convert(path(name), folder / target, to=target)
        written = open_source(folder / target)
        found = compare(source, written)
        only_weights = cell == "weights"
        lost = [one for one in found.tensors if one.key.rsplit("|", 1)[1] in WEIGHTS or not only_weights]
        assert lost == [], target
        assert found.groups == ()
        if not only_weights:
            moments = {key: value for key, value in wanted.items() if key.rsplit("|", 1)[1] not in WEIGHTS}
            assert differences(written, moments, rows) == [], target
            assert len(written.groups) == len(source.groups)
            for key in ("iteration", "scheduler"):
                assert (written.extras.get(key) or 0) == (source.extras.get(key) or 0), (target, key)
        written.close()
        shutil.rmtree(folder / target) if (folder / target).is_dir() else (folder / target).unlink()
    source.close()


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("more/z3_groups_frozen_subgroups/ckpt", ("dcp", "deepspeed-universal", "ringhold", "dcp", "plain")),
        ("fsdp/fsdp2xtp2/dcp", ("deepspeed-universal", "plain", "dcp", "ringhold", "deepspeed-universal")),
        ("mcore/ep2_moe4/torch", ("megatron", "deepspeed-universal", "dcp", "megatron", "ringhold", "megatron")),
    ],
)
def test_a_way_through_many_formats_ends_at_the_truth(name: str, way: tuple[str, ...], folder: Path) -> None:
    at = path(name)
    for number, target in enumerate(way):
        convert(
            at, folder / f"{number}", to=target, layout={"dcp": {"dp": 3}, "megatron": {"tp": 2, "pp": 2}}.get(target)
        )
        at = folder / f"{number}"
    first, last = open_source(path(name)), open_source(at)
    found = compare(first, last)
    assert found.equal, found
    rows = VOCABULARY if name.startswith("mcore/") else None
    moments = {key: value for key, value in safetensors(truth(name)).items() if "|exp_avg" in key}
    assert moments
    assert differences(last, moments, rows) == []
    decays = [[group.options["weight_decay"] for group in source.groups] for source in (first, last)]
    assert decays[0] == decays[1]
    first.close()
    last.close()


@pytest.mark.parametrize(
    "name", ["ds/z3_dp2_bf16/ckpt", "fsdp/dp4_flatten/dcp", "mcore/tp2pp2/torch", "hf/tied_fp32_40KB"]
)
def test_inspect_tells_what_any_of_them_holds(name: str) -> None:
    done = CliRunner().invoke(ringhold, ["ckpt", "inspect", str(path(name)), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    source = open_source(path(name))
    assert {row["key"]: row["shape"] for row in told["tensors"]} == {
        key: list(entry.shape) for key, entry in source.entries.items()
    }
    assert [group["params"] for group in told["groups"]] == [len(group.names) for group in source.groups]
    source.close()
