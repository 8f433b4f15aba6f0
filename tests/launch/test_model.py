"""The model: sizes, determinism, causality, and the text it writes."""

import pytest
import torch

from collectives.errors import UsageError
from launch.model import DTYPES, GPT, PRESETS, build, generate


def make(preset: str = "tiny", context: int = 16, dtype: str = "fp32", seed: int = 0) -> GPT:
    shape = {str(name): shape for name, shape in PRESETS.items()}[preset]
    kinds = {str(name): kind for name, kind in DTYPES.items()}
    return build(shape, context, kinds[dtype], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "millions"), [("1m", 1), ("10m", 10)])
def test_presets_have_about_their_nominal_size(preset: str, millions: int) -> None:
    assert make(preset, 64).parameter_count == pytest.approx(millions * 1e6, rel=0.1)


def test_the_largest_preset_has_its_nominal_size_too() -> None:
    shape = PRESETS["100m"]
    assert 12 * shape.width**2 * shape.layers == pytest.approx(100e6, rel=0.1)


def test_equal_seeds_give_equal_bits_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, other, third = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(one.tokens, third.tokens)


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_logits_have_the_dtype_and_depend_on_the_past_alone(dtype: str) -> None:
    model = make(dtype=dtype)
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    with torch.no_grad():
        logits, others = model(ids), model(changed)
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == model.tokens.dtype
    torch.testing.assert_close(logits[:, :9], others[:, :9])
    assert not torch.allclose(logits[:, 9:], others[:, 9:])


def test_the_head_is_the_embedding() -> None:
    model = make()
    ids = torch.full((1, 4), 7)
    model(ids)[0, :, 200].sum().backward()
    gradient = model.tokens.grad
    assert gradient is not None
    assert gradient[200].abs().sum() > 0
    assert gradient[7].abs().sum() > 0
    assert gradient[100].abs().sum() == 0


def test_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="17 tokens do not fit"):
        make()(torch.zeros(1, 17, dtype=torch.int64))


def test_generation_continues_the_prompt_and_is_repeatable() -> None:
    model = make()
    texts = [generate(model, b"import", 30, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"import")
    assert len(texts[0]) == 36
