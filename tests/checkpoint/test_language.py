"""The pattern language: what combines comes apart again, claims are unique, errors name pattern and parameter."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.formats.deepspeed_tp import by_affine_map, spec_of
from checkpoint.language import Pattern, PatternMissing, Spec, SpecError, cleaned, evaluate
from checkpoint.lazy import Given, Lazy, PiecesMissing

fast = settings(max_examples=40, derandomize=True, deadline=None)
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def lazy(array: Array) -> Lazy:
    return Given(np.ascontiguousarray(array, "<f4").tobytes(), "F32", array.shape)


def array(tensor: Lazy) -> Array:
    return tensor.whole().view("<f4").reshape(tensor.shape)


def ramp(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@fast
@given(st.data())
def test_fragments_of_fused_parts_come_together_again(data: st.DataObject) -> None:
    """Any number of parts of any sizes, each cut over the ranks in any widths, along any dimension."""
    ranks, dim = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 2))
    widths = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks), min_size=1, max_size=3))
    total = sum(map(sum, widths))
    if not total:
        return
    shape = [3, 2, 4]
    shape[dim] = total
    whole = ramp(*shape)
    edges = np.cumsum([0, *(w for row in widths for w in row)])
    pieces = [np.take(whole, range(a, b), dim) for a, b in pairwise(edges)]
    shards = [np.concatenate([pieces[p * ranks + r] for p in range(len(widths))], dim) for r in range(ranks)]
    held = [tuple(row[r] for r in range(ranks) if shards[r].size) for row in widths]
    spec = Spec((Pattern(".*", "fragment", dim=dim, widths=tuple(held)),))
    if sum(bool(shard.size) for shard in shards) > 1:
        assert np.array_equal(array(spec.combine("w", [lazy(s) for s in shards if s.size])), whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_grouped_queries_and_gates(ranks: int) -> None:
    q, k, v = ramp(16, 3), ramp(8, 3) + 100, ramp(8, 3) + 200
    shards = [np.concatenate([np.split(x, ranks)[r] for x in (q, k, v)]) for r in range(ranks)]
    spec = Spec.parse('[[pattern]]\nmatch = "qkv"\nhow = "fragment"\nparts = ["heads * 4", "groups * 4", "groups * 4"]')
    spec = spec.with_settings({"heads": 4, "groups": 2})
    assert np.array_equal(array(spec.combine("qkv", [lazy(s) for s in shards])), np.concatenate([q, k, v]))
    gate, up = ramp(8, 3), ramp(8, 3) + 50
    halves = [np.concatenate([np.split(gate, ranks)[r], np.split(up, ranks)[r]]) for r in range(ranks)]
    two = Spec.parse('[[pattern]]\nmatch = "fc1"\nhow = "fragment"\nparts = "1 + gated"').with_settings({"gated": 1})
    assert np.array_equal(array(two.combine("fc1", [lazy(h) for h in halves])), np.concatenate([gate, up]))


def test_unique_replicated_average_and_vocabulary() -> None:
    a, b = ramp(4, 2), ramp(4, 2) + 1
    spec = Spec.parse("""
        [[pattern]]
        match = "norm"
        how = "replicated"
        [[pattern]]
        match = "scale"
        how = "average"
        [[pattern]]
        match = "one"
        how = "unique"
        [[vocabulary]]
        match = "embed"
        rows = "vocab"
        [settings]
        vocab = 3
    """)
    assert np.array_equal(array(spec.combine("norm", [lazy(a), lazy(a)])), a)
    assert np.array_equal(array(spec.combine("scale", [lazy(a), lazy(b)])), (a + b) / 2)
    assert np.array_equal(array(spec.combine("one", [lazy(a)])), a)
    assert np.array_equal(array(spec.unpadded("embed", lazy(a))), a[:3])
    assert np.array_equal(array(spec.unpadded("other", lazy(a))), a)
    with pytest.raises(PiecesMissing, match="'one' says that one rank of tp holds it, and 2 do"):
        spec.combine("one", [lazy(a), lazy(b)])
    with pytest.raises(PiecesMissing, match="'norm' says that it is replicated"):
        spec.combine("norm", [lazy(a), lazy(ramp(2, 2))])
    with pytest.raises(PiecesMissing, match="'embed' keeps 3 rows"):
        spec.unpadded("embed", lazy(ramp(2, 2)))


def test_ranks_of_patterns_and_the_default() -> None:
    text = """
        [[pattern]]
        match = '.*\\.weight'
        how = "fragment"
        rank = 1
        [[pattern]]
        match = 'norm\\.weight'
        how = "replicated"
    """
    spec = Spec.parse(text)
    assert spec.pattern("norm.weight").how == "replicated"
    assert spec.pattern("dense.weight").how == "fragment"
    with pytest.raises(PatternMissing, match=r"(?s)^bias: no pattern .* no default.*match = 'bias'"):
        spec.pattern("bias")
    assert Spec.parse('default = "replicated"\n' + text).pattern("bias").how == "replicated"
    both = Spec.parse(text.replace("rank = 1", ""))
    with pytest.raises(PatternMissing, match=r"^norm\.weight: patterns .*norm.* are of rank 0 and both claim it"):
        both.pattern("norm.weight")
    assert both.pattern("dense.weight").how == "fragment"
    mine = Spec.parse('[[pattern]]\nmatch = "norm.weight"\nhow = "average"')
    assert mine.over(spec).pattern("norm.weight").how == "average"
    assert mine.over(spec).pattern("dense.weight").how == "fragment"


def test_a_pattern_may_refuse() -> None:
    spec = Spec.parse('[[pattern]]\nmatch = "odd"\nhow = "refuse"')
    with pytest.raises(PatternMissing, match="'odd' of spec says that it cannot be converted"):
        spec.combine("odd", [lazy(ramp(2)), lazy(ramp(2))])


def test_names_compute_with_groups_and_settings() -> None:
    spec = Spec.parse("""
        [[name]]
        match = 'layers\\.(?P<layer>\\d+)\\.(.*)'
        to = 'model.layers.{layer + first_layer}.{2}'
        [[name]]
        match = 'experts\\.(\\d+)\\.w'
        to = 'experts.{$1 + expert_rank * local_experts}.w'
        [settings]
        first_layer = 4
        expert_rank = 2
        local_experts = 8
    """)
    assert spec.targets("layers.3.mlp") == (spec.names[0], ("model.layers.7.mlp",))
    assert spec.targets("experts.5.w") == (spec.names[1], ("experts.21.w",))
    assert spec.targets("other") is None
    assert cleaned(Spec.built_in("dcp"), "_orig_mod.a._checkpoint_wrapped_module.b._fsdp_wrapped_module.c") == "a.b.c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pattern]]\nmatch = '('\nhow = 'unique'", "no regular expression"),
        ("[[pattern]]\nmatch = 'x'\nhow = 'sideways'", "write one of unique"),
        ("[[pattern]]\nmatch = 'x'\nhow = 'unique'\naxis = 'up'", "write one of tp"),
        ("[[pattern]]\nmatch = 'x'\nhow = 'unique'\ncolour = 1", "unknown colour"),
        ("[[pattern]]\nhow = 'unique'", "match"),
        ("[[pattern]]\nmatch = 'x'\nhow = 'tied'", "write of"),
        ("[pattern]\nmatch = 'x'", r"\[\[pattern\]\]"),
        ("patterns = 1", "unknown patterns"),
        ("this is no toml", "no TOML"),
        ("default = 3", "default 3"),
    ],
)
def test_what_has_no_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec.parse(text)


def test_files_and_built_in_specs(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there are .*deepspeed.*megatron"):
        Spec.find("nothing")
    with pytest.raises(SpecError, match="No such file"):
        Spec.find(str(tmp_path / "none.toml"))
    (tmp_path / "mine.toml").write_text('[[pattern]]\nmatch = "x"\nhow = "unique"')
    assert Spec.find(str(tmp_path / "mine.toml")).pattern("x").how == "unique"
    for name in ("deepspeed", "megatron", "dcp", "hf", "megatron-gpt-to-hf-llama"):
        assert Spec.built_in(name).title == f"spec {name}"


@pytest.mark.parametrize(
    "text", ["__import__('os')", "f(1)", "a.b", "1 ** 9", "1.5", "[1]", "x", "1 // 0", "1 if 1 else 2"]
)
def test_expressions_are_whole_numbers_alone(text: str) -> None:
    with pytest.raises(SpecError, match="cannot compute"):
        evaluate(text, {"y": 1}, "here")


def test_expressions_compute() -> None:
    assert evaluate("(a + 2) * b // 3 % 5 - 1", {"a": 4, "b": 4}, "here") == 2


INFO = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": 7,
    "vocabulary_parameter_patterns": [r"embed"],
    "tp_replicated_parameter_patterns": [r"norm"],
    "parameter_to_average_patterns": [r"scale"],
    "parameter_with_row_parallelism_patterns": [r".*row\.weight$"],
    "parameter_with_2_sub_params_cat_dim_0": [r"gate"],
    "parameter_with_sub_params": [{"patterns": [r"qkv"], "shape": ((4, 2, 2), -1), "partition_dim": 0}],
    "sub_param_shard_widths": {r"qkv": [[3, 1], [1, 1], [1, 1]]},
}


def test_the_lists_of_deepspeed_become_patterns() -> None:
    spec = spec_of(INFO)
    embed = ramp(8, 2)
    assert np.array_equal(array(spec.unpadded("embed.weight", spec.combine("embed.weight", halves(embed)))), embed[:7])
    assert spec.pattern("norm.bias").how == "replicated"
    assert spec.pattern("scale").how == "average"
    assert np.array_equal(array(spec.combine("a.row.weight", halves(ramp(4, 6), 1))), ramp(4, 6))
    assert spec.pattern("anything").how == "fragment"
    q, k, v = ramp(4, 3), ramp(2, 3) + 50, ramp(2, 3) + 90
    left, right = np.concatenate([q[:3], k[:1], v[:1]]), np.concatenate([q[3:], k[1:], v[1:]])
    assert np.array_equal(array(spec.combine("qkv", [lazy(left), lazy(right)])), np.concatenate([q, k, v]))
    gate = spec.combine("gate", [lazy(np.concatenate([ramp(4)[:2], ramp(4)[2:] + 50])), lazy(ramp(4) + 9)])
    assert array(gate).tolist() == [0, 1, 9, 10, 52, 53, 11, 12]


def halves(whole: Array, dim: int = 0) -> list[Lazy]:
    return [lazy(part) for part in np.array_split(whole, 2, dim)]


def test_malformed_lists_of_deepspeed() -> None:
    with pytest.raises(SpecError, match="original_vocab_size"):
        spec_of({"vocabulary_parameter_patterns": ["x"]})
    with pytest.raises(SpecError, match="malformed"):
        spec_of({"parameter_with_sub_params": [{"patterns": ["x"]}]})
    with pytest.raises(SpecError, match="among its patterns"):
        spec_of({"tp_replicated_parameter_patterns": [3]})


def test_affine_maps() -> None:
    whole = ramp(6, 5)
    pieces = [
        {"shape": [6, 3], "source": [0, [5, 1]], "dest": [0, [3, 1]], "locations": [0]},
        {"shape": [6, 2], "source": [3, [5, 1]], "dest": [0, [2, 1]], "locations": [1]},
    ]
    ranks = {r: {"shard_shape": p["shape"], "pieces": [p]} for r, p in enumerate(pieces)}
    info = {"affine_map": {"version": 1, "params": {"^w$": {"logical_shape": [6, 5], "ranks": ranks}}}}
    shards = [lazy(whole[:, :3]), lazy(whole[:, 3:])]
    found = by_affine_map("w", info, shards)
    assert found is not None
    assert np.array_equal(array(found), whole)
    assert by_affine_map("other", info, shards) is None
    with pytest.raises(PiecesMissing, match="its affine map says"):
        by_affine_map("w", info, shards[::-1])
    with pytest.raises(SpecError, match="version 2"):
        by_affine_map("w", {"affine_map": {"version": 2, "params": {"w": {}}}}, shards)
